"""Reads the end of `metrics.jsonl`, and the loss at a few places, without reading a file that grows for weeks.

The file may be growing, torn or empty. What cannot be read is left out. Nothing here raises.
"""

from __future__ import annotations

import os
from pathlib import Path
from statistics import median
from typing import Any

from strategies import atomic_io
from trainer.reporting.metric_rows import rows_in

TAIL = 2**16
"""Bytes at the end of the file in which the newest rows are looked for."""
PIECE = 2**13
"""Bytes read at each place of a curve."""


def newest(path: Path) -> list[dict[str, Any]]:
    """The last rows, oldest first: of steps, which have `loss`, and of evaluations."""
    try:
        with atomic_io.open_regular(path) as (descriptor, size):
            start = max(0, size - TAIL)
            lines = os.pread(descriptor, TAIL, start).split(b"\n")
    except OSError:
        return []
    return rows_in(lines[1:] if start else lines)


def curve(path: Path, points: int) -> list[float]:
    """The loss at about so many places of the run, in its order; rows that are not finite are left out."""
    found: dict[int, float] = {}
    try:
        with atomic_io.open_regular(path) as (descriptor, size):
            for place in range(points):
                start = size * place // points
                lines = os.pread(descriptor, PIECE, start).split(b"\n")
                row = next((each for each in rows_in(lines[1:] if start else lines) if "loss" in each), None)
                if row is not None and (loss := number(row, "loss")) is not None:
                    found[row["step"]] = loss
    except OSError:
        return []
    return [found[step] for step in sorted(found)]


def number(row: dict[str, Any], key: str) -> float | None:
    """A number of a row; None where it has none, or one that was not finite."""
    value = row.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def recent(rows: list[dict[str, Any]], key: str) -> float | None:
    """The median over the last rows of steps."""
    values = [value for row in rows[-20:] if (value := number(row, key)) is not None]
    return median(values) if values else None
