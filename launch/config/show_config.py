"""`--cfg job|hydra|all` and `--info`: shows how a configuration is composed, without starting a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launch.config.user_files import is_settings_file
from strategies.errors import ConfigError
from strategies.redaction import redact

if TYPE_CHECKING:
    from launch.config.frozen import ComposedConfig

CFG_KINDS = ("job", "hydra", "all")
INFO_KINDS = ("all", "config", "defaults", "searchpath", "plugins")


def print_config(composed: ComposedConfig, kind: str) -> None:
    """Print a composed configuration for `--cfg`, without starting the run.

    `kind`: `job` for the configuration of the run, `hydra` for Hydra's own, `all` for both.
    Then raises ConfigError for values out of range.
    Nothing else is checked, so that a configuration can be looked at before its model and data exist.
    """
    from trainer.config.ranges import range_problems

    if kind in ("job", "all"):
        print(f"# sha256: {composed.sha256}\n{redact(composed.yaml)}", end="")
    if kind in ("hydra", "all"):
        print(f"# Hydra's own settings, which are fixed here\n{hydra_yaml(composed.overrides)}", end="")
    problems = range_problems(composed.config)
    if problems:
        sys.stdout.flush()
        raise ConfigError(problems)


def hydra_yaml(overrides: list[str]) -> str:
    """Hydra's own configuration for these overrides, as YAML."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create({"hydra": _hydra_settings(overrides)}), resolve=False)


def composition_lines(overrides: list[str]) -> list[str]:
    """The lines that `--info` prints: versions, directories of settings files, and which file each group's settings come from.

    Such as `  tuning      lora  conf/tuning/lora.yaml`.
    """
    from importlib.metadata import version

    from launch.config.choices import CONF_DIR, USER_CONFIG_DIRS

    choices = _hydra_settings(overrides)["runtime"]["choices"]
    lines = [f"hydra       {version('hydra-core')}, omegaconf {version('omegaconf')}", "searched    " + str(CONF_DIR)]
    lines += [f"            {directory} (--config-dir)" for directory in USER_CONFIG_DIRS]
    lines.append("chosen, in this order; the last one wins:")
    for group, choice in reversed(choices.items()):
        if not group.startswith("hydra/"):
            lines.append(f"  {group:<12}{_choice_text(group, choice)}")
    for override in overrides:
        if is_settings_file(override):
            lines.append(f"  {'file':<12}{override}")
    return lines


def _choice_text(group: str, choice: str | None) -> str:
    """The choice of a group with the file that it is read from, for display: "lora  conf/tuning/lora.yaml".

    "none" for no choice (None), "llama3_8b  no such file" for one that needs no file.
    """
    from launch.config.choices import CONF_DIR, USER_CONFIG_DIRS

    if choice is None:
        return "none"
    for directory in (CONF_DIR, *USER_CONFIG_DIRS):
        file = directory / group / f"{choice}.yaml"
        if file.exists():
            return f"{choice}  {_short_path(file)}"
    return f"{choice}  no such file"


def _hydra_settings(overrides: list[str]) -> dict[str, dict[str, dict[str, str]]]:
    """Hydra's own configuration for these overrides, as nested dictionaries: ["runtime"]["choices"]["tuning"] is `lora`.

    Composed anew, because a run's configuration does not keep Hydra's part.
    """
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from launch.config.choices import CONF_DIR, register_schemas
    from launch.config.compose import hydra_arguments
    from launch.config.overrides import parse_overrides

    register_schemas()
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
        tree = compose("train", hydra_arguments(parse_overrides(overrides).choices), return_hydra_config=True)
    hydra_settings = OmegaConf.to_container(tree.hydra, resolve=False)
    assert isinstance(hydra_settings, dict)
    return hydra_settings  # type: ignore[return-value]


def _short_path(path: Path) -> str:
    """The path of a settings file for display: `conf/tuning/lora.yaml` for one that we ship, the whole path for the user's."""
    from launch.config.choices import CONF_DIR

    text = str(path)
    return text.removeprefix(f"{CONF_DIR.parent}/") if text.startswith(str(CONF_DIR)) else text
