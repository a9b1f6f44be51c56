"""Names the file, the setting and the reason when Hydra cannot compose the files of a user."""

import yaml

from launch.config.choices import CONF_DIR, USER_CONFIG_DIRS


def suspected_files_text(choices: dict[str, str]) -> str:
    """Name the files that may be at fault if Hydra cannot compose a configuration: "conf/debug/x.yaml or my/a.yaml".

    `choices`: by group, {"debug": "x"}.
    Only files of the user and those that hold settings of every group are named: the groups that we ship are tested.
    `conf/local/default.yaml` is the user's too, and is read in every run that does not choose another one.
    """
    files = []
    for group in ("experiment", "debug"):
        shipped_file = CONF_DIR / group / f"{choices.get(group)}.yaml"
        if shipped_file.exists():
            files.append(f"conf/{group}/{shipped_file.name}")
    for directory in USER_CONFIG_DIRS:
        for group, choice in choices.items():
            user_file = directory / group / f"{choice}.yaml"
            if user_file.exists():
                files.append(str(user_file))
    if (CONF_DIR / "local" / "default.yaml").exists() or not files:
        files.append("conf/local/default.yaml")
    return " or ".join(files)


def composition_problem_line(error: Exception) -> str:
    """Write an error of Hydra, OmegaConf or the YAML reader as one line for the user, with the setting that is at fault.

    Such as "line 3 is not valid YAML: mapping values are not allowed here", or "optim.lr: Value 'x' could not be converted".
    """
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1} is not valid YAML: {error.problem}"
    # Hydra raises its own error while it handles OmegaConf's, which Python keeps as the context. Hydra's repeats it as a text of
    # several lines; OmegaConf's has the setting and the reason apart.
    omegaconf_error = error if isinstance(error, OmegaConfBaseException) else error.__context__
    if not isinstance(omegaconf_error, OmegaConfBaseException) or not omegaconf_error.full_key:
        return " ".join(str(error).split())
    if omegaconf_error.full_key in ("experiment", "debug"):
        # Without `# @package _global_` Hydra puts the file's settings below the name of its group.
        return "must hold settings (key: value), and begin with the line `# @package _global_`"
    if isinstance(omegaconf_error, ConfigKeyError):
        return f"there is no setting {omegaconf_error.full_key}"
    reason = str(omegaconf_error.msg or omegaconf_error).splitlines()[0]
    return f"{omegaconf_error.full_key}: {reason}"
