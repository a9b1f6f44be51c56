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
"""What `run.json` says of how the steps were computed."""
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
    """Settings, then facts, in which runs differ.

    Settings that only one choice of a group has (`strategy.bucket_mib`) follow from the choice, and are compared between
    runs that made the same one.
    """
    found = []
    keys = dict.fromkeys(key for point in points for key in point.config)
    for key in (key for key in keys if not _under(key, PER_RUN_KEYS)):
        choice = f"{key.split('.')[0]}.name"
        groups: dict[Any, set[str]] = {}
        for point in points:
            same = None if key == choice else point.config.get(choice)
            groups.setdefault(same, set()).add(_text(point.config.get(key, ABSENT)))
        if any(len(values) > 1 for values in groups.values()):
            found.append(SettingDifference(key, tuple(point.config.get(key, ABSENT) for point in points)))
    for key in RECORD_KEYS:
        told = tuple(_recorded(point.record, key) for point in points)
        if len({_text(value) for value in told if value != ABSENT}) > 1:
            found.append(SettingDifference(f"run.json {key}", told))
    return found


def _recorded(record: RunRecord, key: str) -> Any:
    return getattr(record, key) if key in record.keys else ABSENT


def _text(value: Any) -> str:
    """A value to be compared; JSON of trackers has 0.0 as 0."""
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return repr(int(value)) if isinstance(value, float) and value.is_integer() else repr(value)


def run_names(points: list[Point], differences: list[SettingDifference]) -> list[str]:
    """A name for each run out of what differs, such as `fsdp2-lora-lr2e-4`; its directory where that says nothing."""
    settings = {d.key: d for d in differences if not d.key.startswith("run.json ") and not _under(d.key, NOT_NAMED)}
    parts = [[_part(key, value) for value in settings[key].values] for key in FIRST_IN_NAME if key in settings]
    parts += [[_ranks(world) for world in d.values] for d in differences if d.key == "run.json world_size"]
    parts += [[_part(key, value) for value in settings[key].values] for key in settings if key not in FIRST_IN_NAME]
    made = [""] * len(points)
    for part in parts:
        longer = ["-".join(filter(None, pair)) for pair in zip(made, part, strict=True)]
        if max(map(len, longer)) <= MAX_NAME_LENGTH:  # else the table alone says it
            made = longer
    often = Counter(made)
    own = [point.directory.resolve().name for point in points]
    return [
        name if name and often[name] == 1 else "-".join(filter(None, (name, directory)))
        for name, directory in zip(made, own, strict=True)
    ]


def _ranks(world: Any) -> str:
    return "" if world == ABSENT else f"{world}rank{'s' if world != 1 else ''}"


def _part(key: str, value: Any) -> str:
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
        return _word_characters(Path(str(value)).stem if leaf == "path" and "data" in key else Path(str(value)).name)
    return f"{leaf}_{_word_characters(short(value))}"


def _word_characters(text: str) -> str:
    return re.sub(r"[^\w.]+", "_", text).strip("_")


def _under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
