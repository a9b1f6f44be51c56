"""`--cfg job|hydra|all` and `--info`: shows how a configuration is composed, without starting a run."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from strategies.errors import ConfigError
from strategies.redaction import redacted

if TYPE_CHECKING:
    from launch.config.frozen import Composed

CFG_KINDS = ("job", "hydra", "all")
INFO_KINDS = ("all", "config", "defaults", "searchpath", "plugins")


def show(composed: Composed, kind: str) -> None:
    """Print the configuration of the run, Hydra's own, or both. Raises ConfigError, after that, for values out of range.

    What a run needs besides, such as a model, may be missing: a part of a configuration can be looked at.
    """
    from trainer.config.ranges import range_problems

    if kind in ("job", "all"):
        print(f"# sha256: {composed.sha256}\n{redacted(composed.yaml)}", end="")
    if kind in ("hydra", "all"):
        print(f"# Hydra's own settings, which are fixed here\n{hydra_yaml(composed.overrides)}", end="")
    if problems := range_problems(composed.config):
        sys.stdout.flush()
        raise ConfigError(problems)


def hydra_yaml(words: list[str]) -> str:
    """Hydra's own configuration for these words, as YAML."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create({"hydra": _hydra(words)}), resolve=False)


def composition_lines(words: list[str]) -> list[str]:
    """Where the configuration comes from: directories, the choice of each group, versions; for a person, in 80 columns."""
    from importlib.metadata import version
    from pathlib import Path

    from launch.config.choices import CONF_DIR, OWN_DIRECTORIES

    choices = _hydra(words)["runtime"]["choices"]
    lines = [f"hydra       {version('hydra-core')}, omegaconf {version('omegaconf')}", "searched    " + str(CONF_DIR)]
    lines += [f"            {directory} (--config-dir)" for directory in OWN_DIRECTORIES]
    lines.append("chosen, in this order; the last word wins:")
    for group, choice in reversed(choices.items()):
        if group.startswith("hydra/"):
            continue
        candidates = [directory / group / f"{choice}.yaml" for directory in (CONF_DIR, *OWN_DIRECTORIES)]
        file: Path | None = next((directory for directory in candidates if directory.exists()), None)
        text = "none" if choice is None else f"{choice}" + (f"  {_short_path(file)}" if file else "  no such file")
        lines.append(f"  {group:<12}{text}")
    file_words = [word for word in words if word.endswith((".yaml", ".yml")) and "=" not in word]
    return [*lines, *(f"  {'file':<12}{word}" for word in file_words)]


def _hydra(words: list[str]) -> dict[str, dict[str, dict[str, str]]]:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from launch.config import overrides
    from launch.config.choices import CONF_DIR, register_schemas
    from launch.config.compose import hydra_words

    register_schemas()
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
        tree = compose("train", hydra_words(overrides.parse(words).choices), return_hydra_config=True)
    hydra_settings = OmegaConf.to_container(tree.hydra, resolve=False)
    assert isinstance(hydra_settings, dict)
    return hydra_settings  # type: ignore[return-value]


def _short_path(path: object) -> str:
    from launch.config.choices import CONF_DIR

    text = str(path)
    return text.removeprefix(f"{CONF_DIR.parent}/") if text.startswith(str(CONF_DIR)) else text
