"""Checks numbers against the range that their field declares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from strategies.settings import setting_metadata
from trainer.config.run import AUTO, MICRO_BATCH_KEY


def range_problems(settings: Any, key: str = "") -> list[str]:
    """Check each number against the range that its setting declares, whatever the others are; returns a message for each outside.

    `settings`: a whole `RunConfig`, or the settings of one group, whose key is `key`: "optim.lr=-1: must be above 0; ...".
    """
    return list(_range_problems(settings, key))


def _range_problems(settings: Any, key: str, advice_override: Mapping[str, str] | None = None) -> Iterator[str]:
    """Do the work of `range_problems` for a settings object and, recursively, for the groups inside of it.

    `key`: under which the settings stand, such as `optim`; empty for the whole. `advice_override`: what to advise for some
    fields, by name, in place of their own advice: a class may serve several groups, whose usual values differ.
    """
    for field in fields(settings):
        own_key = f"{key}.{field.name}" if key else field.name
        value = getattr(settings, field.name)
        # What the field declares: bounds of its number, texts that are allowed instead such as `auto` (`words`), advice.
        metadata = setting_metadata(type(settings), field.name, advice_override)
        if is_dataclass(value):  # a group, such as `optim`
            yield from _range_problems(value, own_key, metadata.advice_below)
        elif metadata.entries is not None:  # `batch`, a dictionary whose entries are declared by a class
            yield from _entry_problems(value, own_key, metadata.entries)
        elif isinstance(value, dict):  # a table whose names the user chooses, such as `data.sources`
            for name, entry in value.items():
                if is_dataclass(entry):
                    yield from _range_problems(entry, f"{own_key}.{name}")
        elif isinstance(value, str) and metadata.words:
            if value not in metadata.words:
                yield f"{own_key}={value}: must be a whole number, or {' or '.join(metadata.words)}; {metadata.advice}"
        elif metadata.bounds is not None and value is not None and not metadata.bounds.contains(value):
            yield f"{own_key}={value:g}: must be {metadata.bounds}; {metadata.advice}"


def _entry_problems(sizes: dict[str, Any], group_key: str, entries_class: type) -> Iterator[str]:
    """Check `batch`, which is a dictionary: a message for each entry that is no whole number, or out of its range.

    `sizes`: its content, such as {"global": 32, "micro": "auto"}. `group_key`: "batch". `entries_class`: the class whose fields
    declare the ranges. Types are checked as well, because Hydra does not check those in a dictionary.
    """
    for field in fields(entries_class):
        name = field.name.removesuffix("_")  # the field of `global` is `global_`, since Python reserves the word
        key = f"{group_key}.{name}"
        size = sizes.get(name)
        metadata = setting_metadata(entries_class, field.name)
        if size is None or (key, size) == (MICRO_BATCH_KEY, AUTO):
            continue
        if isinstance(size, bool) or not isinstance(size, int):
            yield f"{key}={size}: {key} must be a whole number{', or auto' if key == MICRO_BATCH_KEY else ''}"
        elif metadata.bounds is not None and not metadata.bounds.contains(size):
            yield f"{key}={size:g}: must be {metadata.bounds}; {metadata.advice}"
