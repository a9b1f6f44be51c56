"""The user's own configuration files: a bare `my.yaml` among the overrides, and directories given by `--config-dir`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from launch.config.choices import CONF_DIR, USER_CONFIG_DIRS, choices_by_group
from strategies.errors import ConfigError

SUFFIXES = (".yaml", ".yml")
CHOSEN_BY_NAME = ("tuning", "objective", "strategy", "optim", "schedule", "launcher")
"""Groups whose block holds the choice as `name`. In other groups a `name` is a setting."""
NOT_SETTINGS = ("substitutions",)
"""Keys of a frozen `config.yaml` that are no settings."""


def is_settings_file(override: str) -> bool:
    """Whether a positional argument names a file of settings."""
    return override.endswith(SUFFIXES) and "=" not in override and not override.startswith("-")


def user_files_may_apply(overrides: Iterable[str]) -> bool:
    """Whether files of the user can set something: a file among `overrides`, `--config-dir`, or `conf/local/default.yaml`."""
    if any(is_settings_file(override) for override in overrides):
        return True
    return bool(USER_CONFIG_DIRS) or (CONF_DIR / "local" / "default.yaml").exists()


def read_settings_file(override: str) -> tuple[dict[str, str], list[tuple[str, Any]]]:
    """(choices of groups, values by full key) of a user's YAML file of settings, which `override` names as typed.

    A choice is `tuning: lora`, an entry of `defaults`, or a block with a `name`, as in the config.yaml of a run. A file
    {tuning: {name: lora, rank: 16}} gives ({"tuning": "lora"}, [("tuning.rank", 16)]). Errors: ConfigError if the file cannot be
    read or holds no settings.
    """
    tree = _read_tree(override)
    # Choices of `defaults` first: a choice in a block of its own overrides them, as in Hydra.
    choices = dict(_defaults(override, tree.pop("defaults", [])))
    values: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if key in NOT_SETTINGS:
            continue
        is_group = key in choices_by_group()  # such as `tuning`, of which `lora` is a choice
        if is_group and isinstance(value, str):
            choices[key] = value
        elif is_group and isinstance(value, dict):
            block = dict(value)
            if key in CHOSEN_BY_NAME and "name" in block:
                choices[key] = str(block.pop("name"))
            values += _flatten_block(key, block)
        elif isinstance(value, dict):
            values += _flatten_block(str(key), value)
        elif value is None and is_block(str(key)):
            continue  # all lines of the block are comments
        else:
            values.append((str(key), value))
    return choices, values


def _read_tree(override: str) -> dict[Any, Any]:
    """A YAML file of settings as nested dictionaries, `${...}` unresolved. Errors: ConfigError."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = Path(override).expanduser()
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.create(path.read_text(encoding="utf-8")), resolve=False)
    except OSError as error:
        raise ConfigError(
            f"{override}: cannot be read ({error.strerror}); a bare *.yaml is a file of settings"
        ) from error
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{override}: is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{override}: holds no settings; write them as in `tuning: lora` or `optim: {{lr: 2e-4}}`")
    return tree


def is_block(key: str) -> bool:
    """Whether a key at the outermost level of a settings file holds settings of its own, such as `optim`."""
    from trainer.config.run import RunConfig

    names = [config_field.name for config_field in fields(RunConfig)]
    return key in names and key != "precision"  # the one field of a run that is a single value


def _defaults(override: str, entries: Any) -> Iterator[tuple[str, str]]:
    """(group, choice) of each entry of a Hydra `defaults` list in the file `override`. Errors: ConfigError."""
    entries = entries if isinstance(entries, list) else [entries]
    for entry in entries:
        if entry == "_self_":
            continue
        if not isinstance(entry, dict) or len(entry) != 1:
            raise ConfigError(f"{override}: defaults: {entry}: write a group and its choice, as in `- tuning: lora`")
        for key, choice in entry.items():
            # Hydra also writes `override /tuning: lora`.
            group = str(key).removeprefix("override ").strip().lstrip("/")
            yield group, str(choice)


def _flatten_block(prefix: str, tree: dict[str, Any]) -> list[tuple[str, Any]]:
    """(full key, value) of each setting in a block: `optim`, {"lr": 1e-4} gives [("optim.lr", 1e-4)]; an empty block none."""
    settings: list[tuple[str, Any]] = []
    for key, value in tree.items():
        # A block in which a name has a dot is a table of the user's, and stays one value: the dot is no boundary of keys.
        is_block_of_settings = isinstance(value, dict) and not any("." in str(name) for name in value)
        if is_block_of_settings:
            settings += _flatten_block(f"{prefix}.{key}", value)
        else:
            settings.append((f"{prefix}.{key}", value))
    return settings


def take_config_dirs(argv: list[str]) -> list[str]:
    """Take each `--config-dir <directory>` out of a command line; returns the other arguments.

    Also adds the directory's files to the choices of this process. Errors: ConfigError.
    """
    from launch.config.choices import add_directory

    overrides = []
    remaining = list(argv)
    while remaining:
        override = remaining.pop(0)
        flag, assigned, value = override.partition("=")
        if flag not in ("--config-dir", "-cd"):
            overrides.append(override)
            continue
        if not assigned:
            if not remaining:
                raise ConfigError(f"{override}: give a directory, as in --config-dir my/conf")
            value = remaining.pop(0)
        directory = Path(value).expanduser().resolve()
        if not directory.is_dir():
            raise ConfigError(f"--config-dir {directory}: there is no such directory")
        add_directory(directory)
    return overrides
