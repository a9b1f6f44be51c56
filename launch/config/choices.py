"""Which choices each configuration group has, and which typed settings stand behind each choice.

The choices are the YAML files of `conf/`; reading their names needs neither Hydra nor torch.
"""

from functools import cache
from pathlib import Path
from typing import Any

from trainer.model.known_shapes import shape_names

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"
WHOLE_RUN_GROUPS = ("experiment", "debug", "local")
"""Groups whose files may set any key; their choice may be `null`."""
MODEL_GROUP = "model"
"""The group whose choices are also the models of which a published shape is known: `model=llama3_8b`."""
HARDWARE_DIRECTORY = "hardware"
"""A directory of conf/ whose files are no settings of a run: cards that `shardtune plan` plans for."""


USER_CONFIG_DIRS: list[Path] = []
"""Directories of the user's (`--config-dir`) whose files are choices too."""


@cache
def choices_by_group() -> dict[str, list[str]]:
    """The choices that each group of settings has, by which `tuning=lora` is checked: {"tuning": ["adalora", ...], ...}.

    A choice is a YAML file, `conf/tuning/lora.yaml`; those in the user's directories (`--config-dir`) count too. Groups and
    choices are in alphabetical order.
    """
    all_choices = dict(shipped_choices_by_group())
    for directory in USER_CONFIG_DIRS:
        for group, choices in all_choices.items():
            all_choices[group] = sorted({*choices, *_choices_in(directory / group)})
    return all_choices


def is_published_shape_choice(group: str, choice: str) -> bool:
    """Whether a choice names a published model of which only layer sizes are known (its shape), as in `model=llama3_8b`.

    False if there is a file `model/llama3_8b.yaml`, which counts first.
    """
    if group != MODEL_GROUP or choice not in shape_names():
        return False
    return not any(_choice_file(directory, group, choice).exists() for directory in (CONF_DIR, *USER_CONFIG_DIRS))


def _choice_file(directory: Path, group: str, choice: str) -> Path:
    """The file of a choice below `conf/`, or below a directory that is laid out like it."""
    return directory / group / f"{choice}.yaml"


def _choices_in(directory: Path) -> list[str]:
    """The names of the YAML files in a directory of a group."""
    return sorted(file.stem for file in directory.glob("*.yaml"))


@cache
def shipped_choices_by_group() -> dict[str, list[str]]:
    """The choices of every group of `conf/`, without those of the user's own directories: {"tuning": ["adalora", ...], ...}."""
    shipped: dict[str, list[str]] = {}
    for directory in sorted(CONF_DIR.iterdir()):
        if not directory.is_dir() or directory.name.startswith(("_", ".")) or directory.name == HARDWARE_DIRECTORY:
            continue
        choices = _choices_in(directory)
        if choices or directory.name == "local":  # `conf/local` is the user's and may be empty
            shipped[directory.name] = choices
    # `model=llama3_8b` names a published model whose layer sizes are known (its shape), also without a file of settings.
    shipped[MODEL_GROUP] = sorted([*shipped[MODEL_GROUP], *shape_names()])
    return shipped


def add_user_config_dir(directory: Path) -> None:
    """Add the settings files of a user's directory (`--config-dir`), laid out like `conf/`, to the choices of this process.

    Raises ConfigError if it has no choices, or if one of its files has the name of a file that we ship.
    """
    from strategies.errors import ConfigError

    user_choices = {group: _choices_in(directory / group) for group in shipped_choices_by_group()}
    if not any(user_choices.values()):
        raise ConfigError(
            f"--config-dir {directory}: has no <group>/<choice>.yaml, such as tuning/mine.yaml or experiment/mine.yaml; a whole "
            "file of settings is given by its name alone: my.yaml"
        )
    # Refused, because Hydra would silently take one of two files of the same name.
    name_clashes: list[str] = []
    for group, choices in user_choices.items():
        for choice in choices:
            if _choice_file(CONF_DIR, group, choice).exists():
                name_clashes.append(f"{group}/{choice}.yaml")
    if name_clashes:
        raise ConfigError(
            f"--config-dir {directory}: {', '.join(name_clashes)}: there is such a choice already; rename the file"
        )
    if directory not in USER_CONFIG_DIRS:
        USER_CONFIG_DIRS.append(directory)
    # It is cached, and was perhaps asked before.
    choices_by_group.cache_clear()


def settings_classes_by_group() -> dict[str, dict[str, type]]:
    """The settings class of each choice, by group and name, for the groups whose choices differ in their settings."""
    from trainer.config.tree import SETTINGS_CLASSES_BY_GROUP

    return SETTINGS_CLASSES_BY_GROUP


SETTINGS_BORROWED_FROM_CHOICE = {
    "strategy": {"hsdp": "fsdp2", "zero1": "zero", "zero2": "zero", "zero3": "zero"},
    "objective": dict.fromkeys(("dr_grpo", "dapo", "gspo", "rloo", "reinforce_pp", "cispo", "max_rl"), "grpo"),
}
"""Choices that have the settings of another one, by group."""
REGISTRY_LOCATION_BY_GROUP = {
    "strategy": "SETTINGS_CLASSES_BY_GROUP in trainer/config/tree.py",
    "tuning": "TUNINGS in trainer/tuning/config.py",
    "objective": "FAMILIES in trainer/objectives/registry.py",
    "optim": "OPTIMIZERS in trainer/optim/config.py",
    "launcher": "SETTINGS_CLASSES_BY_GROUP in trainer/config/tree.py",
}
"""The place that lists a group's settings by name."""


def settings_class_of(group: str, name: str) -> type:
    """The dataclass of a choice's settings, such as `LoraConfig` for `tuning`, `lora`.

    Some choices share the class of another one (SETTINGS_BORROWED_FROM_CHOICE): zero1, zero2 and zero3 have the class of `zero`.
    Raises ConfigError for a file of `conf/` without a class.
    """
    classes = settings_classes_by_group()[group]
    if name not in classes:
        name = SETTINGS_BORROWED_FROM_CHOICE.get(group, {}).get(name, name)
    if name not in classes:
        from strategies.errors import ConfigError

        raise ConfigError(
            f"conf/{group}/{name}.yaml: no settings of that name ({', '.join(classes)}); add its class to "
            f"{REGISTRY_LOCATION_BY_GROUP[group]}, or remove the file"
        )
    return classes[name]


@cache
def register_schemas() -> None:
    """Register the settings dataclasses with Hydra, so that it checks the types of what it composes; done once per process.

    The files of conf/ name them: `schema_run`, and in a group such as `tuning` `schema_lora`.
    """
    from hydra.core.config_store import ConfigStore

    from trainer.config.run import RunConfig

    store: Any = ConfigStore.instance()
    store.store(name="schema_run", node=RunConfig)
    for group, nodes in settings_classes_by_group().items():
        for name, settings in nodes.items():
            store.store(group=group, name=f"schema_{name}", node=settings)


def add_table_entry(tree: Any, key: str) -> None:
    """Make sure that a table has the entry which the setting `key` belongs to, since OmegaConf sets nothing in a missing one.

    A table is a setting whose entries the user names: `evaluation.tasks.qa.kind` adds the entry `qa` to `evaluation.tasks`, with
    defaults. A key outside of such tables adds nothing.
    `tree`: the OmegaConf tree of a run's settings.
    """
    from omegaconf import OmegaConf

    for table, entry_class in entry_class_by_table().items():
        if not key.startswith(f"{table}."):
            continue
        entry_name, _, setting_name = key.removeprefix(f"{table}.").partition(".")
        if setting_name and entry_name not in OmegaConf.select(tree, table):
            OmegaConf.update(tree, f"{table}.{entry_name}", entry_class(), force_add=True)


@cache
def entry_class_by_table() -> dict[str, type]:
    """The dataclass of an entry, for each table whose entries the user names: {"data.sources": SourceConfig, ...}."""
    from trainer.data.config import SourceConfig
    from trainer.evaluation.base import TaskConfig
    from trainer.objectives.rollouts import RewardEntry
    from trainer.optim.config import GroupRule

    return {
        "data.sources": SourceConfig,
        "optim.groups": GroupRule,
        "evaluation.tasks": TaskConfig,
        "objective.rewards": RewardEntry,
    }
