"""Names the file, the setting and the reason when Hydra cannot compose the files of a user."""

from __future__ import annotations

import yaml

from launch.config.choices import CONF_DIR, OWN_DIRECTORIES


def suspected_files(choices: dict[str, str]) -> str:
    """The files of which one must be wrong if Hydra cannot compose. The groups that we ship are tested."""
    files = []
    for group in ("experiment", "debug"):
        shipped = CONF_DIR / group / f"{choices.get(group)}.yaml"
        if shipped.exists():
            files.append(f"conf/{group}/{shipped.name}")
    for directory in OWN_DIRECTORIES:
        own_files = [directory / group / f"{choice}.yaml" for group, choice in choices.items()]
        files += [str(file) for file in own_files if file.exists()]
    if (CONF_DIR / "local" / "default.yaml").exists() or not files:
        files.append("conf/local/default.yaml")
    return " or ".join(files)


def composition_problem(error: Exception) -> str:
    """What Hydra, OmegaConf or the YAML reader found wrong, on one line, with the setting in front if one is to blame."""
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1} is not valid YAML: {error.problem}"
    # Hydra repeats OmegaConf's error as a text of several lines. The error itself has the setting and the reason apart.
    original = error if isinstance(error, OmegaConfBaseException) else error.__context__
    if not isinstance(original, OmegaConfBaseException) or not original.full_key:
        return " ".join(str(error).split())
    if original.full_key in ("experiment", "debug"):
        return "must hold settings (key: value), and begin with the line `# @package _global_`"
    if isinstance(original, ConfigKeyError):
        return f"there is no setting {original.full_key}"
    reason = str(original.msg or original).splitlines()[0]
    return f"{original.full_key}: {reason}"
