"""The tree of settings: every key under every choice of its group, and what its field says.

Settings live beside the code that uses them. This module alone knows all of their classes, so importing it loads the
objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from strategies.base import AutoConfig, DdpConfig, Fsdp2Config, SingleConfig, ZeroConfig
from strategies.settings import FREE, SettingMetadata, setting_metadata
from trainer.config.run import LauncherConfig, RunConfig, SlurmConfig
from trainer.objectives.registry import FAMILIES
from trainer.optim.config import OPTIMIZERS
from trainer.tuning.config import TUNINGS

SETTINGS_CLASSES_BY_GROUP: dict[str, dict[str, type]] = {
    "strategy": {
        "auto": AutoConfig,
        "single": SingleConfig,
        "ddp": DdpConfig,
        "fsdp2": Fsdp2Config,
        "zero": ZeroConfig,
    },
    "tuning": {str(settings().name): settings for settings in TUNINGS},
    "objective": {name: family.settings for name, family in FAMILIES.items()},
    "optim": {str(settings().name): settings for settings in OPTIMIZERS},
    "launcher": {"local": LauncherConfig, "slurm": SlurmConfig},
}
"""For the groups whose choices differ in their keys: the settings class behind each choice, by the name of its schema."""
Attribute = TypeVar("Attribute")


class NestedSettings(NamedTuple):
    """The settings that a field of a settings class holds."""

    settings_class: type
    key_suffix: str
    """What follows the field's key in the keys of these settings: empty, or `.*` for a table whose names the user chooses."""


@dataclass(frozen=True, slots=True)
class KeyedField:
    """One field of the tree under its full key, such as `optim.lr`."""

    key: str
    type: Any
    metadata: SettingMetadata
    """What its declaration says of it: bounds, advice, what another value means for a resumed run."""
    is_group: bool
    """Whether it holds further settings instead of a value."""


def nested_settings(field_type: Any) -> NestedSettings | None:
    """Whether a field of a settings class holds further settings, to be visited as well: returns them, or None for a plain value.

    OptimConfig -> (OptimConfig, ""), so that the keys are `optim.lr`. dict[str, SourceConfig], a table whose names the user
    chooses -> (SourceConfig, ".*"), so that they are `data.sources.*.path`.
    """
    if isinstance(field_type, type) and is_dataclass(field_type):
        return NestedSettings(field_type, key_suffix="")
    entry_type = get_args(field_type)[1] if get_origin(field_type) is dict else None
    if isinstance(entry_type, type) and is_dataclass(entry_type):
        return NestedSettings(entry_type, key_suffix=".*")
    return None


def keyed_fields(
    settings: type, prefix: str = "", advice_override: Mapping[str, str] | None = None
) -> Iterator[KeyedField]:
    """Walk through all settings of a settings class, with their full keys: each field, and the fields of the groups in it.

    A group comes before what it holds. Keys are full, such as `optim.lr`; `*` in one stands for a name that the user
    chooses, as in `data.sources.*.path`. `prefix`: the key of the settings themselves. `advice_override`: advice by field,
    which the group that holds the settings gives.
    """
    hints = get_type_hints(settings)
    for field in fields(settings):
        hint = hints[field.name]
        key = f"{prefix}.{field.name}" if prefix else field.name
        metadata = setting_metadata(settings, field.name, advice_override)
        nested = nested_settings(hint)
        yield KeyedField(key, hint, metadata, is_group=nested is not None or metadata.entries is not None)
        if nested is not None:
            yield from keyed_fields(nested.settings_class, key + nested.key_suffix, metadata.advice_below)
        elif metadata.entries is not None:  # `batch`, a dictionary whose entries are declared by the fields of a class
            for inner in keyed_fields(metadata.entries, key):
                # The field of `batch.global` is `global_`, since `global` is a keyword of Python.
                yield replace(inner, key=inner.key.removesuffix("_"))


@cache
def metadata_by_key() -> dict[str, SettingMetadata]:
    """What the declaration of each setting says beside its type: range, advice, what a change means for a resumed run.

    By full key such as `optim.lr`, groups included. If several choices of a group (optimizers, say) have the same key, the
    first one counts.
    """
    metadata: dict[str, SettingMetadata] = {}
    for keyed in keyed_fields(RunConfig):
        metadata[keyed.key] = keyed.metadata
    for group, choices in SETTINGS_CLASSES_BY_GROUP.items():
        for settings_class in choices.values():
            for keyed in keyed_fields(settings_class, group):
                metadata.setdefault(keyed.key, keyed.metadata)
    return metadata


def nearest_metadata(key: str, read_attribute: Callable[[SettingMetadata], Attribute | None]) -> Attribute:
    """Look up what a setting declares, such as what a change of it means: at the setting, else at the nearest group above it.

    For `optim.lr` that is `optim.lr`, then `optim`. `read_attribute`: reads the wanted attribute from what a field declares;
    None if that field does not say. Raises KeyError if none of them says.
    """
    names = key.split(".")
    for length in range(len(names), 0, -1):
        metadata = metadata_by_key().get(".".join(names[:length]))
        attribute = read_attribute(metadata) if metadata else None
        if attribute is not None:
            return attribute
    raise KeyError(key)


def change_kind_of_setting(key: str) -> str | None:
    """What a run that is resumed with another value of this setting changes, such as `data`; None if it may change freely.

    The kinds are those of `resuming.KINDS_OF_CHANGE`; the user must accept them (`run.accept`). Raises KeyError for a setting
    that stands in no group of the tree.
    """
    kind = nearest_metadata(key, lambda metadata: metadata.resume)
    return None if kind == FREE else kind
