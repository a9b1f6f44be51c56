"""Finds the settings in which runs differ, and names the runs by them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.compare.run_files import Point
from trainer.reporting.numbers import short
from trainer.reporting.run_record import RunRecord

PER_RUN_KEYS = ("run.dir", "logging.name", "substitutions")
"""Keys that differ between any two runs, or follow from others."""
NOT_NAMED = (
    "run.resume",
    "run.accept",
    "logging",
    "profile",
    "launcher",
    "checkpoint",
    "export",
    "data.cache_dir",
    "data.workers",
)
"""Keys that are listed where they differ, and are no part of a name: they say how a run was started or what it reports."""
RECORD_KEYS = ("world_size", "precision", "attention", "layout", "device", "host", "git_revision")
"""Keys of `run.json` about how the steps were computed."""
FIRST_IN_NAME = (
    *("model.path", "data.path", "objective.name", "strategy.name", "tuning.name", "optim.name"),
    *("optim.lr", "batch.global", "batch.micro", "run.seed"),
)
"""Come first in a name, in this order."""
ABSENT = "-"
MAX_NAME_LENGTH = 40
"""Characters of a name."""


@dataclass(frozen=True, slots=True)
class SettingDifference:
    """A setting, and its value in each run; `-` where a run has no such setting."""

    key: str
    values: tuple[Any, ...]


def setting_differences(points: list[Point]) -> list[SettingDifference]:
    """Settings, then facts of `run.json`, in which runs differ.

    Settings that only one choice of a group has (`strategy.bucket_mib`) follow from the choice, and are compared between
    runs that made the same one.
    """
    differences = []
    keys: dict[str, None] = {}
    for point in points:
        keys |= dict.fromkeys(point.config)
    for key in keys:
        if not _under(key, PER_RUN_KEYS) and _differs(key, points):
            values = tuple(point.config.get(key, ABSENT) for point in points)
            differences.append(SettingDifference(key, values))
    for key in RECORD_KEYS:
        values = tuple(_recorded(point.record, key) for point in points)
        known = {_comparable(value) for value in values if value != ABSENT}
        if len(known) > 1:
            differences.append(SettingDifference(f"run.json {key}", values))
    return differences


def _differs(key: str, points: list[Point]) -> bool:
    """Whether runs that made the same choice of the setting's group have several values of it."""
    choice = f"{key.split('.')[0]}.name"
    values_by_choice: dict[Any, set[str]] = {}
    for point in points:
        name = None if key == choice else point.config.get(choice)
        values_by_choice.setdefault(name, set()).add(_comparable(point.config.get(key, ABSENT)))
    return any(len(values) > 1 for values in values_by_choice.values())


def _recorded(record: RunRecord, key: str) -> Any:
    return getattr(record, key) if key in record.keys else ABSENT


def _comparable(value: Any) -> str:
    """A value as a text that is equal for equal settings: JSON of trackers has 0.0 as 0."""
    if isinstance(value, list):
        return f"[{', '.join(map(_comparable, value))}]"
    if isinstance(value, float) and value.is_integer():
        return repr(int(value))
    return repr(value)


def run_names(points: list[Point], differences: list[SettingDifference]) -> list[str]:
    """A name for each run out of what differs, such as `fsdp2-lora-lr2e-4`; the name of its directory if nothing does."""
    names = [""] * len(points)
    for parts in _name_parts(differences):
        longer_names = [_joined(name, part) for name, part in zip(names, parts, strict=True)]
        if max(map(len, longer_names)) <= MAX_NAME_LENGTH:  # else the table alone says it
            names = longer_names
    # Runs that differ in nothing that is named, and runs beyond the length, may have the same name so far.
    counts = Counter(names)
    unique_names = []
    for name, point in zip(names, points, strict=True):
        is_unique = name and counts[name] == 1
        unique_names.append(name if is_unique else _joined(name, point.directory.resolve().name))
    return unique_names


def _joined(name: str, part: str) -> str:
    return "-".join(filter(None, (name, part)))


def _name_parts(differences: list[SettingDifference]) -> list[list[str]]:
    """For each difference, the most telling first, the part that it adds to the name of each run."""
    values_by_key = {difference.key: difference.values for difference in differences}
    settings = []
    for key in values_by_key:
        if not key.startswith("run.json ") and not _under(key, NOT_NAMED):
            settings.append(key)
    first = [key for key in FIRST_IN_NAME if key in settings]
    others = [key for key in settings if key not in FIRST_IN_NAME]
    parts = []
    for key in (*first, "run.json world_size", *others):
        if key == "run.json world_size":  # the only fact of `run.json` that is part of a name
            parts.append([_ranks(world_size) for world_size in values_by_key.get(key, ())])
        else:
            parts.append([_name_part(key, value) for value in values_by_key[key]])
    return [part for part in parts if part]


def _ranks(world_size: Any) -> str:
    if world_size == ABSENT:
        return ""
    return "1rank" if world_size == 1 else f"{world_size}ranks"


def _name_part(key: str, value: Any) -> str:
    """What a setting adds to a name: `lora`, `lr2e-4`, `no_dora`, or the stem of a data file."""
    leaf = key.rsplit(".", 1)[-1].strip("_")
    if value == ABSENT:
        return ""
    if leaf == "name":
        return str(value)
    if isinstance(value, bool):
        return leaf if value else f"no_{leaf}"
    if isinstance(value, int | float):
        return f"{leaf}{short(value)}"
    if leaf in ("path", "eval_path") and value:
        path = Path(str(value))
        return _word_characters(path.stem if leaf == "path" and "data" in key else path.name)
    return f"{leaf}_{_word_characters(short(value))}"


def _word_characters(text: str) -> str:
    return re.sub(r"[^\w.]+", "_", text).strip("_")


def _under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
