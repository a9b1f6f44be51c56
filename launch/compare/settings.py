"""The settings of a comparison: its rows, and `comparison.json`, which keeps them beside the runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from strategies import atomic_io
from strategies.errors import ConfigError
from trainer.reporting.file_version import FILE_VERSION, VERSION_KEY, version_of
from trainer.reporting.shared_choice import COMPARISON
from trainer.reporting.status import write_text_atomic

COMPARISON_FILE = COMPARISON
MAX_FILE_BYTES = 2**26
"""A longer `comparison.json` is refused: somebody else may have written it."""


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
    """Conditions such as strategy=ddp+tuning=full: a point that has all these arguments is left out."""
    where: list[str] = field(default_factory=list)
    """Conditions such as tuning=full+optim.lr=2e-5: a point that has the first argument but lacks another is left out."""


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """Where one point of a comparison is read from: the run directories of its repeats, or the reasons why it was refused."""

    directories: tuple[Path, ...]
    name: str | None = None
    """None: the point is named by the settings in which it differs from the others."""
    refused: tuple[str, ...] = ()
    """Why the point cannot be run; empty if it can."""
    config: dict[str, Any] = field(default_factory=dict)
    """The settings of a refused point, by dotted key; other points have theirs in their run directories."""
    warmup: int = 1
    price_per_hour: float | None = None
    command_keys: tuple[str, ...] = field(default=(), compare=False)
    """Keys of the settings on the command line, which is the order of the axes; empty if the runs existed already."""


def setting_keys(arguments: Sequence[str]) -> tuple[str, ...]:
    """The keys of settings such as `strategy=ddp,fsdp2`, in their order."""
    return tuple(argument.partition("=")[0] for argument in arguments)


def write_comparison_file(to: Path, rows: list[ComparisonRow], arguments: list[str]) -> None:
    """Write `comparison.json` into `to`: the arguments of the command, and a row for each point.

    Errors: StorageError.
    """
    points = []
    for row in rows:
        # Relative, so that a comparison can be moved or mounted elsewhere.
        directories = [str(path.relative_to(to)) for path in row.directories]
        point = {**asdict(row), "directories": directories}
        del point["command_keys"]  # they follow from `words`
        points.append(point)
    record = {VERSION_KEY: FILE_VERSION, "words": arguments, "points": points}
    write_text_atomic(to / COMPARISON_FILE, json.dumps(record, indent=1) + "\n")


def read_comparison_file(to: Path) -> list[ComparisonRow]:
    """The rows of the comparison that was run in `to`; empty if `to` has no `comparison.json`.

    Raises ConfigError where the file is damaged.
    """
    path = to / COMPARISON_FILE
    if not path.is_file():
        return []
    try:
        record = json.loads(atomic_io.read_bytes(path, max_bytes=MAX_FILE_BYTES))
        version_of(record)  # refuses the file of a later version
        command_keys = setting_keys(record.get("words") or [])
        return [replace(_row_from_json(point, to), command_keys=command_keys) for point in record["points"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); name the run directories below {to} instead, or repeat the command that made it"
        ) from error


def _row_from_json(point: dict[str, Any], to: Path) -> ComparisonRow:
    """A row from its JSON values; the directories in the file are relative to `to`."""
    directories = tuple(to / name for name in point["directories"])
    refused = tuple(point["refused"])
    return ComparisonRow(**{**point, "directories": directories, "refused": refused})
