"""Names the file, the setting and the reason when Hydra cannot compose the files of a user."""

from __future__ import annotations

import yaml

from launch.config.choices import CONF_DIR, USER_CONFIG_DIRS


def suspected_files_text(choices: dict[str, str]) -> str:
    """The files that may be at fault if Hydra cannot compose these choices (by group), as "conf/debug/x.yaml or my/a.yaml".

    Only files of the user and those that hold settings of every group are named: the groups that we ship are tested.
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
    """An error of Hydra, OmegaConf or the YAML reader as one line for the user, with the setting in front if one is to blame."""
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1} is not valid YAML: {error.problem}"
    # Hydra repeats OmegaConf's error as a text of several lines. OmegaConf's has the setting and the reason apart.
    original = error if isinstance(error, OmegaConfBaseException) else error.__context__
    if not isinstance(original, OmegaConfBaseException) or not original.full_key:
        return " ".join(str(error).split())
    if original.full_key in ("experiment", "debug"):
        # Without `# @package _global_` Hydra puts the file's settings below the name of its group.
        return "must hold settings (key: value), and begin with the line `# @package _global_`"
    if isinstance(original, ConfigKeyError):
        return f"there is no setting {original.full_key}"
    reason = str(original.msg or original).splitlines()[0]
    return f"{original.full_key}: {reason}"
