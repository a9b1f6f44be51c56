"""The user's own configuration files: a bare `my.yaml` among the overrides, and directories given by `--config-dir`."""

from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from launch.config.choices import CONF_DIR, USER_CONFIG_DIRS, choices_by_group
from strategies.errors import ConfigError

YAML_SUFFIXES = (".yaml", ".yml")
GROUPS_CHOSEN_BY_NAME = ("tuning", "objective", "strategy", "optim", "schedule", "launcher")
"""Groups whose block holds the choice as `name`. In other groups a `name` is a setting."""
KEYS_WITHOUT_SETTING = ("substitutions",)
"""Keys of a frozen `config.yaml` that are no settings."""


def is_settings_file(file_argument: str) -> bool:
    """Whether an argument names a file of settings, as `my.yaml` does."""
    return file_argument.endswith(YAML_SUFFIXES) and "=" not in file_argument and not file_argument.startswith("-")


def user_files_may_apply(overrides: Iterable[str]) -> bool:
    """Whether files of the user can change a configuration: a settings file among `overrides`, or files read in every run.

    The latter are those of `--config-dir` and `conf/local/default.yaml`.
    """
    if any(is_settings_file(file_argument) for file_argument in overrides):
        return True
    return bool(USER_CONFIG_DIRS) or (CONF_DIR / "local" / "default.yaml").exists()


class FileSettings(NamedTuple):
    """What a user's file of settings holds."""

    choices: dict[str, str]
    """The choice of each group that the file chooses: {"tuning": "lora"}."""
    values: list[tuple[str, Any]]
    """(full key, value) in the file's order. A file may have a key twice, as `optim.lr` and within `optim`; the last counts."""


def read_settings_file(file_argument: str) -> FileSettings:
    """Read a user's YAML file of settings, such as `my.yaml`, which the command line names.

    {tuning: {name: lora, rank: 16}} gives the choice {"tuning": "lora"} and the value ("tuning.rank", 16).

    There are three ways to write a choice: `tuning: lora`, an entry `- tuning: lora` of `defaults`, and a block with a `name`, as
    in the config.yaml of a run. Raises ConfigError if the file cannot be read or holds no settings.
    """
    tree = _read_yaml(file_argument)
    # Those of `defaults` first, because a choice in a block of its own overrides them, as in Hydra.
    choices = dict(_choices_in_defaults_list(file_argument, tree.pop("defaults", [])))
    values: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if key in KEYS_WITHOUT_SETTING:
            continue
        is_group = key in choices_by_group()  # such as `tuning`, of which `lora` is a choice
        if is_group and isinstance(value, str):
            choices[key] = value
        elif is_group and isinstance(value, dict):
            block = dict(value)
            if key in GROUPS_CHOSEN_BY_NAME and "name" in block:
                choices[key] = str(block.pop("name"))
            values += _flatten_block(key, block)
        elif isinstance(value, dict):
            values += _flatten_block(str(key), value)
        elif value is None and is_settings_block(str(key)):
            continue  # all lines of the block are comments
        else:
            values.append((str(key), value))
    return FileSettings(choices, values)


def _read_yaml(file_argument: str) -> dict[Any, Any]:
    """Read a user's YAML file of settings as nested dictionaries, with `${...}` unresolved: they may name settings outside of it.

    Raises ConfigError if it cannot be read, is no YAML, or holds no settings.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = Path(file_argument).expanduser()
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.create(path.read_text(encoding="utf-8")), resolve=False)
    except OSError as error:
        raise ConfigError(
            f"{file_argument}: cannot be read ({error.strerror}); a bare *.yaml is a file of settings"
        ) from error
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file_argument}: is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{file_argument}: holds no settings; write them as in `tuning: lora` or `optim: {{lr: 2e-4}}`"
        )
    return tree


def is_settings_block(key: str) -> bool:
    """Whether a key at the outermost level of a settings file holds settings of its own, such as `optim`."""
    from trainer.config.run import RunConfig

    names = [config_field.name for config_field in fields(RunConfig)]
    return key in names and key != "precision"  # the one field of a run that is a single value


def _choices_in_defaults_list(file_argument: str, entries: Any) -> Iterator[tuple[str, str]]:
    """The choices in a Hydra `defaults` list of a settings file: `- tuning: lora` is ("tuning", "lora").

    `file_argument`: the file, for messages.
    `entries`: what stands under `defaults`.
    Raises ConfigError for an entry of another form.
    """
    entries = entries if isinstance(entries, list) else [entries]
    for entry in entries:
        # Hydra's mark for the file's own place among the others, which is the last here.
        if entry == "_self_":
            continue
        if not isinstance(entry, dict) or len(entry) != 1:
            raise ConfigError(
                f"{file_argument}: defaults: {entry}: write a group and its choice, as in `- tuning: lora`"
            )
        for key, choice in entry.items():
            # Hydra also writes `override /tuning: lora`.
            group = str(key).removeprefix("override ").strip().lstrip("/")
            yield group, str(choice)


def _flatten_block(prefix: str, tree: dict[str, Any]) -> list[tuple[str, Any]]:
    """The settings within a block of a settings file, as (full key, value): `optim`, {"lr": 1e-4} is [("optim.lr", 1e-4)].

    Blocks within it are flattened too; an empty block gives nothing.
    """
    settings: list[tuple[str, Any]] = []
    for key, value in tree.items():
        # A dictionary with a dot in a name stays one value, because such a dot does not separate the names of a key.
        is_block_of_settings = isinstance(value, dict) and not any("." in str(name) for name in value)
        if is_block_of_settings:
            settings += _flatten_block(f"{prefix}.{key}", value)
        else:
            settings.append((f"{prefix}.{key}", value))
    return settings


def take_config_dirs(argv: list[str]) -> list[str]:
    """Take each `--config-dir <directory>` (or `-cd`) out of a command line; returns the remaining arguments.

    The YAML files of the directory become choices of this process: `tuning/mine.yaml` allows `tuning=mine`. Raises ConfigError if
    the directory is missing or has no choices.
    """
    from launch.config.choices import add_user_config_dir

    other_arguments = []
    remaining = list(argv)
    while remaining:
        argument = remaining.pop(0)
        flag, has_value, value = argument.partition("=")
        if flag not in ("--config-dir", "-cd"):
            other_arguments.append(argument)
            continue
        if not has_value:
            if not remaining:
                raise ConfigError(f"{argument}: give a directory, as in --config-dir my/conf")
            value = remaining.pop(0)
        directory = Path(value).expanduser().resolve()
        if not directory.is_dir():
            raise ConfigError(f"--config-dir {directory}: there is no such directory")
        add_user_config_dir(directory)
    return other_arguments
