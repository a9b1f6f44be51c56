"""The settings of a comparison: where the runs of its points are, and `comparison.json`, which keeps that beside the runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from strategies import atomic_io
from strategies.errors import ConfigError
from trainer.reporting.file_version import FILE_VERSION, VERSION_KEY, readable_file_version
from trainer.reporting.shared_choice import COMPARISON_FILE
from trainer.reporting.status import write_text_atomic

MAX_FILE_BYTES = 2**26
"""A longer `comparison.json` is refused: somebody else may have written it."""


@dataclass(kw_only=True, slots=True)
class CompareConfig:
    """Settings of a comparison that runs its points."""

    steps: int | None = None
    """Number of optimizer steps of each point, instead of a budget."""
    repeats: int = 1
    """How often each point runs. The order of the points alternates between repeats."""
    warmup: int = 1
    """Number of first steps that do not count for speeds, together with the rest of their logging interval."""
    price_per_hour: float | None = None
    """US dollars per hour for the device of one rank. null: the price of its card in conf/hardware."""
    skip: list[str] = field(default_factory=list)
    """Conditions such as strategy=ddp+tuning=full. A point that has all these settings is left out."""
    where: list[str] = field(default_factory=list)
    """Conditions such as tuning=full+optim.lr=2e-5. A point that has the first setting but lacks another one is left out."""


@dataclass(frozen=True, slots=True)
class PointSource:
    """Where one point of a comparison is read from: the run directories of its repeats, or the reasons why it was refused.

    A point is one combination of settings.
    """

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


def write_comparison_file(comparison_dir: Path, sources: list[PointSource], arguments: list[str]) -> None:
    """Write `comparison.json`, by which a later `shardtune compare <comparison_dir>` finds the runs of each point again.

    It holds the arguments of the command (as `words`) and where the runs of each point are. Raises StorageError.
    """
    point_records = []
    for source in sources:
        # Relative, so that a comparison can be moved or mounted elsewhere.
        relative_dirs = [str(path.relative_to(comparison_dir)) for path in source.directories]
        point_record = {**asdict(source), "directories": relative_dirs}
        del point_record["command_keys"]  # they follow from `words`
        point_records.append(point_record)
    record = {VERSION_KEY: FILE_VERSION, "words": arguments, "points": point_records}
    write_text_atomic(comparison_dir / COMPARISON_FILE, json.dumps(record, indent=1) + "\n")


def read_comparison_file(comparison_dir: Path) -> list[PointSource]:
    """Find the points of an earlier comparison: for each, where its runs are. Empty if the directory has no `comparison.json`.

    The keys of the command's arguments (`words` in the file) give the axes of tables and plots their order. Raises
    ConfigError if the file is damaged, or a later version of shardtune wrote it.
    """
    path = comparison_dir / COMPARISON_FILE
    if not path.is_file():
        return []
    try:
        record = json.loads(atomic_io.read_bytes(path, max_bytes=MAX_FILE_BYTES))
        readable_file_version(record)  # raises for the file of a later version
        command_keys = setting_keys(record.get("words") or [])
        return [
            replace(_point_source_from_record(point_record, comparison_dir), command_keys=command_keys)
            for point_record in record["points"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); name the run directories below {comparison_dir} instead, or repeat the command "
            "that made it"
        ) from error


def _point_source_from_record(point_record: dict[str, Any], comparison_dir: Path) -> PointSource:
    """Build the source of one point from its entry in `comparison.json`, whose directories are relative to `comparison_dir`."""
    run_dirs = tuple(comparison_dir / name for name in point_record["directories"])
    refusals = tuple(point_record["refused"])
    return PointSource(**{**point_record, "directories": run_dirs, "refused": refusals})
