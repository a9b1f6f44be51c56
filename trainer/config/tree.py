"""The tree of settings: every key under every choice of its group, and what its field says.

Settings live beside the code that uses them. This module alone knows all of their classes, so importing it loads the objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from strategies.base import AutoConfig, DdpConfig, Fsdp2Config, SingleConfig, ZeroConfig
from strategies.settings import FREE, SettingMetadata, setting_metadata
from trainer.config.run import LauncherConfig, RunConfig, SlurmConfig
from trainer.objectives.registry import FAMILIES
from trainer.optim.config import OPTIMIZERS
from trainer.tuning.config import TUNINGS

VARIANTS: dict[str, dict[str, type]] = {
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
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class KeyedField:
    """One field of the tree under its full key, such as `optim.lr`."""

    key: str
    type: Any
    traits: SettingMetadata
    is_group: bool
    """Whether it holds further settings instead of a value."""


def nested_settings_class(field_type: Any) -> tuple[type, str] | None:
    """(class of the settings that a field of this type holds, what follows the field's key in theirs); None for a plain value.

    OptimConfig -> (OptimConfig, ""), so that the keys are `optim.lr`. dict[str, SourceConfig], a table whose names the user
    chooses -> (SourceConfig, ".*"), so that they are `data.sources.*.path`.
    """
    if isinstance(field_type, type) and is_dataclass(field_type):
        return field_type, ""
    entry_type = get_args(field_type)[1] if get_origin(field_type) is dict else None
    if isinstance(entry_type, type) and is_dataclass(entry_type):
        return entry_type, ".*"
    return None


def keyed_fields(
    settings: type, prefix: str = "", advice_override: Mapping[str, str] | None = None
) -> Iterator[KeyedField]:
    """Every field of a settings class and of the groups in it, each group before what it holds.

    Keys are full, such as `optim.lr`; `*` in one stands for a name that the user chooses, as in `data.sources.*.path`. `prefix`:
    the key of the settings themselves. `advice_override`: advice by field, which the group that holds the settings gives.
    """
    hints = get_type_hints(settings)
    for field in fields(settings):
        hint = hints[field.name]
        key = f"{prefix}.{field.name}" if prefix else field.name
        traits = setting_metadata(settings, field.name, advice_override)
        nested = nested_settings_class(hint)
        yield KeyedField(key, hint, traits, is_group=nested is not None or traits.entries is not None)
        if nested is not None:
            nested_class, key_suffix = nested
            yield from keyed_fields(nested_class, key + key_suffix, traits.advice_below)
        elif traits.entries is not None:
            for inner in keyed_fields(traits.entries, key):
                yield replace(inner, key=inner.key.removesuffix("_"))  # a keyword of Python, typed as it is


@cache
def traits_by_key() -> dict[str, SettingMetadata]:
    """The traits of each field by full key, groups included. Of classes that share a key, the first one counts."""
    traits: dict[str, SettingMetadata] = {}
    for keyed in keyed_fields(RunConfig):
        traits[keyed.key] = keyed.traits
    for name, choices in VARIANTS.items():
        for settings in choices.values():
            for keyed in keyed_fields(settings, name):
                traits.setdefault(keyed.key, keyed.traits)
    return traits


def nearest_trait(key: str, read_trait: Callable[[SettingMetadata], Answer | None]) -> Answer:
    """A trait of the setting `key`, or else of the nearest table or group above it; KeyError if none of them has it.

    `read_trait`: reads it from a field's traits, None if the field has none. For `optim.lr`: `optim.lr`, then `optim`.
    """
    names = key.split(".")
    for length in range(len(names), 0, -1):
        traits = traits_by_key().get(".".join(names[:length]))
        trait = read_trait(traits) if traits else None
        if trait is not None:
            return trait
    raise KeyError(key)


def change_kind_of_setting(key: str) -> str | None:
    """The kind of change (`resuming.KINDS_OF_CHANGE`) that another value of the setting is; None if the setting may change.

    Raises KeyError for a setting that stands in no group of the tree.
    """
    kind = nearest_trait(key, lambda traits: traits.resume)
    return None if kind == FREE else kind
