"""The settings of a comparison: its rows, and `comparison.json`, which keeps them beside the runs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from strategies import atomic_io
from strategies.errors import ConfigError
from trainer.reporting.file_version import FILE_VERSION, VERSION_KEY, version_of
from trainer.reporting.shared_choice import COMPARISON
from trainer.reporting.status import write_text_atomic

RECORD = COMPARISON
MOST_BYTES = 2**26
"""Bytes of a record that are read at most: somebody else may have written the file."""


@dataclass(kw_only=True, slots=True)
class CompareConfig:
    """Settings of a comparison that runs its points."""

    steps: int | None = None
    """Optimizer steps of each point, instead of a budget."""
    repeats: int = 1
    """How often each point runs. The order of the points alternates."""
    warmup: int = 1
    """First steps that do not count for speeds, together with the rest of their logging interval."""
    price_per_hour: float | None = None
    """US dollars per hour for the device of one rank. null takes the price of its card in conf/hardware."""
    skip: list[str] = field(default_factory=list)
    """Conditions such as strategy=ddp+tuning=full: a point that has all these words is left out."""
    where: list[str] = field(default_factory=list)
    """Conditions such as tuning=full+optim.lr=2e-5: a point that has the first word but lacks another is left out."""


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """One point: the directories of its repeats, or why it was refused."""

    directories: tuple[Path, ...]
    name: str | None = None
    """None takes the settings in which it differs."""
    refused: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    """Of a refused point, by dotted key; others have theirs in their directories."""
    warmup: int = 1
    price_per_hour: float | None = None


def write_rows(to: Path, rows: list[ComparisonRow], words: list[str]) -> None:
    """Write `comparison.json` into `to`. Errors: StorageError."""
    points = []
    for row in rows:
        # Relative, so that a comparison can be moved or mounted elsewhere.
        directories = [str(path.relative_to(to)) for path in row.directories]
        points.append({**asdict(row), "directories": directories})
    record = {VERSION_KEY: FILE_VERSION, "words": words, "points": points}
    write_text_atomic(to / RECORD, json.dumps(record, indent=1) + "\n")


def read_rows(to: Path) -> list[ComparisonRow]:
    """The rows of the comparison that was run in `to`; empty where none was. Raises ConfigError where its record is damaged."""
    path = to / RECORD
    if not path.is_file():
        return []
    try:
        record = json.loads(atomic_io.read_bytes(path, most=MOST_BYTES))
        version_of(record)
        return [_row_of(point, to) for point in record["points"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); name the run directories below {to} instead, or repeat the command that made it"
        ) from error


def _row_of(point: dict[str, Any], to: Path) -> ComparisonRow:
    """A row out of its JSON values: directories are relative to that of the comparison."""
    directories = tuple(to / name for name in point["directories"])
    return ComparisonRow(**{**point, "directories": directories, "refused": tuple(point["refused"])})
