"""Which choices each configuration group has, and which typed settings stand behind each choice.

The choices are the YAML files of `conf/`; reading their names needs neither Hydra nor torch.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"
WHOLE_RUN_GROUPS = ("experiment", "debug", "local")
"""Groups whose files may set any key; their choice may be `null`."""
HARDWARE_DIRECTORY = "hardware"
"""A directory of conf/ whose files are no settings of a run: cards that `shardtune plan` plans for."""


OWN_DIRECTORIES: list[Path] = []
"""Directories of the user's (`--config-dir`) whose files are choices too."""


@cache
def groups() -> dict[str, list[str]]:
    """The choices of every group, both in alphabetical order, those of the user's directories included."""
    choices_by_group = dict(shipped())
    for directory in OWN_DIRECTORIES:
        for group, choices in choices_by_group.items():
            choices_by_group[group] = sorted({*choices, *_choices_in(directory / group)})
    return choices_by_group


def _choices_in(directory: Path) -> list[str]:
    """The names of the YAML files in a directory of a group."""
    return sorted(file.stem for file in directory.glob("*.yaml"))


@cache
def shipped() -> dict[str, list[str]]:
    """The choices that `conf/` has."""
    choices_by_group = {}
    for directory in sorted(CONF_DIR.iterdir()):
        if not directory.is_dir() or directory.name.startswith(("_", ".")) or directory.name == HARDWARE_DIRECTORY:
            continue
        choices = _choices_in(directory)
        if choices or directory.name == "local":  # `conf/local` is the user's and may be empty
            choices_by_group[directory.name] = choices
    return choices_by_group


def add_directory(directory: Path) -> None:
    """Offer the files of a directory that is laid out as `conf/` as choices.

    Errors: ConfigError if it has no choices, or if one of them would hide a choice of ours.
    """
    from strategies.errors import ConfigError

    choices_by_group = {group: _choices_in(directory / group) for group in shipped()}
    if not any(choices_by_group.values()):
        raise ConfigError(
            f"--config-dir {directory}: has no <group>/<choice>.yaml, such as tuning/mine.yaml or experiment/mine.yaml; a whole "
            "file of settings is given as a bare word: my.yaml"
        )
    hidden = []
    for group, choices in choices_by_group.items():
        hidden += [f"{group}/{choice}.yaml" for choice in choices if choice in shipped()[group]]
    if hidden:
        raise ConfigError(
            f"--config-dir {directory}: {', '.join(hidden)}: there is such a choice already; rename the file"
        )
    if directory not in OWN_DIRECTORIES:
        OWN_DIRECTORIES.append(directory)
    groups.cache_clear()


def variants() -> dict[str, dict[str, type]]:
    """For the groups whose choices differ in their keys: the settings behind each schema node's name."""
    from trainer.config.tree import VARIANTS

    return VARIANTS


SHARED_SETTINGS = {"hsdp": "fsdp2", "zero1": "zero", "zero2": "zero", "zero3": "zero"}
"""Strategies that have the settings of another one."""
REGISTRIES = {
    "strategy": "VARIANTS in trainer/config/tree.py",
    "tuning": "TUNINGS in trainer/tuning/config.py",
    "objective": "FAMILIES in trainer/objectives/registry.py",
    "optim": "OPTIMIZERS in trainer/optim/config.py",
    "launcher": "VARIANTS in trainer/config/tree.py",
}
"""The place that lists a group's settings by name."""


def settings_of(group: str, name: str) -> type:
    """The settings class of a choice; the choices of ZeRO share one, and hsdp is fsdp2 with replicas.

    Raises ConfigError for a file of `conf/` that no class answers.
    """
    nodes = variants()[group]
    if group == "strategy" and name not in nodes:
        name = SHARED_SETTINGS.get(name, name)
    if name not in nodes:
        from strategies.errors import ConfigError

        raise ConfigError(
            f"conf/{group}/{name}.yaml: no settings of that name ({', '.join(nodes)}); add its class to {REGISTRIES[group]}, or "
            "remove the file"
        )
    return nodes[name]


@cache
def register_schemas() -> None:
    """Once a process: make the typed settings known to Hydra as `schema_run` and `<group>/schema_<name>`."""
    from hydra.core.config_store import ConfigStore

    from trainer.config.run import RunConfig

    store: Any = ConfigStore.instance()
    store.store(name="schema_run", node=RunConfig)
    for group, nodes in variants().items():
        for name, settings in nodes.items():
            store.store(group=group, name=f"schema_{name}", node=settings)
