"""Reads `metrics.jsonl` for everybody: one JSON object a line, each with its step.

A disk can flip a bit in any line, and a kill or a power cut can tear the last one. A line that cannot be read costs
that line: it never stops a start or a verb. A file of a later version is refused as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from strategies import atomic_io
from strategies.errors import ConfigError
from trainer.reporting.file_version import VERSION_KEY, readable_file_version

METRICS_FILE = "metrics.jsonl"
MAX_FILE_BYTES = 2**34
"""A larger file is not read, since it is read at once."""


@dataclass(frozen=True, slots=True)
class UnreadableLine:
    """A line of `metrics.jsonl` that is no row of metrics."""

    number: int
    """Number of the line in the file, from 1."""
    reason: str
    line_bytes: bytes

    def __str__(self) -> str:
        return f"line {self.number} {self.reason}"


@dataclass(slots=True)
class MetricRows:
    """The rows of a file, in its order."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    lines: list[bytes] = field(default_factory=list)
    """The line of the file that each of `rows` was read from: who rewrites the file copies lines byte for byte."""
    unreadable: list[UnreadableLine] = field(default_factory=list)
    """Lines that are no rows, without a last line that has no newline: it is being written, or was when the run was killed."""
    version: int = 0
    """Version of the file, from its first row; 0 for a file from before there were versions. It is taken out of the row."""


def read_rows(path: Path) -> MetricRows:
    """Read all rows of a `metrics.jsonl` (metrics of steps and evaluations), and the lines that are no rows.

    Empty if there is no file. Errors: OSError; ConfigError if a later version of shardtune wrote the file.
    """
    try:
        raw = atomic_io.read_bytes(path, max_bytes=MAX_FILE_BYTES)
    except FileNotFoundError:
        return MetricRows()
    metrics = MetricRows()
    lines = raw.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _parse_metrics_row(line)
        except ValueError as error:
            is_last = number == len(lines)  # it has no newline yet: it is being written
            if not is_last:
                metrics.unreadable.append(UnreadableLine(number=number, reason=str(error), line_bytes=line))
            continue
        if VERSION_KEY in row:  # the first row
            metrics.version = _require_readable_version(row, path)
            del row[VERSION_KEY]
        metrics.rows.append(row)
        metrics.lines.append(line)
    return metrics


def readable_rows(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """The rows among some lines of a `metrics.jsonl`; lines that are cut off or broken are left out."""
    rows = []
    for line in lines:
        try:
            rows.append(parse_metrics_row(line))
        except ValueError:
            continue
    return rows


def _require_readable_version(row: dict[str, Any], path: Path) -> int:
    """The version of the file, from its first row. Raises ConfigError if this code cannot read it."""
    try:
        return readable_file_version(row)
    except ValueError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def parse_metrics_row(line: bytes) -> dict[str, Any]:
    """The row in a line such as b'{"step": 3, "loss": 2.1}'. Raises ValueError with what is wrong, to follow "line 7"."""
    row = _parse_metrics_row(line)
    row.pop(VERSION_KEY, None)
    return row


def _parse_metrics_row(line: bytes) -> dict[str, Any]:
    """Parse a line of `metrics.jsonl`; the first row of a file also has the file's version, under `VERSION_KEY`.

    Raises ValueError for a line that is no JSON object with a whole-numbered step. Its text says what is wrong, to follow "line
    7".
    """
    if b"\0" in line:
        raise ValueError("has NUL bytes, as a power cut leaves them")
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    except RecursionError:
        raise ValueError("is nested too deep") from None
    except ValueError:
        raise ValueError("is not JSON") from None
    if not isinstance(row, dict):
        raise ValueError("is no object")
    if type(row.get("step")) is not int:
        raise ValueError("has no step that is a whole number")
    if not isinstance(row.get("loss"), int | float | None):
        raise ValueError("has a loss that is no number")
    return row
