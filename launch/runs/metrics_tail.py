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


def last_rows(path: Path) -> list[dict[str, Any]]:
    """The last rows, oldest first: of steps, which have `loss`, and of evaluations."""
    try:
        with atomic_io.open_regular(path) as (descriptor, size):
            start = max(0, size - TAIL)
            lines = os.pread(descriptor, TAIL, start).split(b"\n")
    except OSError:
        return []
    return rows_in(lines[1:] if start else lines)


def loss_curve(path: Path, points: int) -> list[float]:
    """The loss at about so many places of the run, in order; rows that are not finite are left out."""
    loss_at_step: dict[int, float] = {}
    try:
        with atomic_io.open_regular(path) as (descriptor, size):
            for place in range(points):
                start = size * place // points
                lines = os.pread(descriptor, PIECE, start).split(b"\n")
                whole_lines = lines[1:] if start else lines  # a read in the middle begins within a line
                row = next((row for row in rows_in(whole_lines) if "loss" in row), None)
                if row is not None and (loss := finite_number(row, "loss")) is not None:
                    loss_at_step[row["step"]] = loss
    except OSError:
        return []
    return [loss_at_step[step] for step in sorted(loss_at_step)]


def finite_number(row: dict[str, Any], key: str) -> float | None:
    """A number of a row; None if it has none. What was not finite is no number in the file."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value


def recent_median(step_rows: list[dict[str, Any]], key: str) -> float | None:
    """The median of a metric over the last rows of steps; None if no row has it."""
    metrics = []
    for row in step_rows[-20:]:
        metric = finite_number(row, key)
        if metric is not None:
            metrics.append(metric)
    return median(metrics) if metrics else None
