"""Checks numbers against the range that their field declares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from strategies.settings import setting_metadata
from trainer.config.run import AUTO, MICRO_BATCH_KEY


def range_problems(settings: Any, key: str = "") -> list[str]:
    """A line for each number that is out of the range of its setting, whatever the others are.

    `settings` is a whole `RunConfig`, or the settings of one group, which stands at `key`.
    """
    return list(_problems_below(settings, key))


def _problems_below(settings: Any, key: str, better_advice: Mapping[str, str] | None = None) -> Iterator[str]:
    """A line for each number out of its range, in `settings` and the groups inside of it: "optim.lr=-1: must be above 0; ...".

    `key`: under which the settings stand, such as `optim`; empty for the whole. `better_advice`: advice by name of a number,
    which the field that holds `settings` gives in place of the number's own.
    """
    for field in fields(settings):
        own_key = f"{key}.{field.name}" if key else field.name
        content = getattr(settings, field.name)
        # What the field declares: bounds of its number, words that are allowed instead, advice, the class of a table's entries.
        traits = setting_metadata(type(settings), field.name, better_advice)
        if is_dataclass(content):
            yield from _problems_below(content, own_key, traits.advice_below)
        elif traits.entries is not None:
            yield from _entry_problems(content, own_key, traits.entries)
        elif isinstance(content, dict):  # settings by name, such as `data.sources`
            for name, entry in content.items():
                if is_dataclass(entry):
                    yield from _problems_below(entry, f"{own_key}.{name}")
        elif isinstance(content, str) and traits.words:
            if content not in traits.words:
                yield f"{own_key}={content}: must be a whole number, or {' or '.join(traits.words)}; {traits.advice}"
        elif traits.bounds is not None and content is not None and not traits.bounds.contains(content):
            yield f"{own_key}={content:g}: must be {traits.bounds}; {traits.advice}"


def _entry_problems(table: dict[str, Any], table_key: str, entries: type) -> Iterator[str]:
    """A line for each entry of a table that is no whole number, or out of its range; the table is `batch`.

    `entries`: the class whose fields declare the ranges. A field is called like its entry, with a `_` behind a Python keyword
    (`global_`). Nothing has checked the types of the entries yet.
    """
    for field in fields(entries):
        name = field.name.removesuffix("_")
        key = f"{table_key}.{name}"
        size = table.get(name)
        bounds = setting_metadata(entries, field.name).bounds
        if size is None or (key, size) == (MICRO_BATCH_KEY, AUTO):
            continue
        if isinstance(size, bool) or not isinstance(size, int):
            yield f"{key}={size}: {key} must be a whole number{', or auto' if key == MICRO_BATCH_KEY else ''}"
        elif bounds is not None and not bounds.contains(size):
            yield f"{key}={size:g}: must be {bounds}; {setting_metadata(entries, field.name).advice}"
