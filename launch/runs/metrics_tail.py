"""Reads the last rows of `metrics.jsonl`, and samples its loss curve, without reading a file that grows for weeks.

The file may be growing, torn or empty. What cannot be read is left out. Nothing here raises.
"""

from __future__ import annotations

import os
from pathlib import Path
from statistics import median
from typing import Any

from strategies import atomic_io
from trainer.reporting.metric_rows import rows_in

TAIL_BYTES = 2**16
"""Bytes at the end of the file that are read for the last rows."""
SAMPLE_BYTES = 2**13
"""Bytes read for each point of the loss curve: several rows, of which the first whole one is taken."""
RECENT_ROWS = 20
"""Rows over which rates are medians: a single step may be slow, for example for a checkpoint."""


def last_rows(path: Path) -> list[dict[str, Any]]:
    """The last rows of `metrics.jsonl`, oldest first: of steps, which have the key `loss`, and of evaluations."""
    try:
        with atomic_io.open_regular_file(path) as (descriptor, size):
            start = max(0, size - TAIL_BYTES)
            lines = os.pread(descriptor, TAIL_BYTES, start).split(b"\n")
    except OSError:
        return []
    whole_lines = lines[1:] if start else lines  # from the middle of the file, the first line is torn
    return rows_in(whole_lines)


def loss_curve(path: Path, points: int) -> list[float]:
    """About `points` losses from evenly spread positions of `metrics.jsonl`, in the order of the steps.

    Only a few KiB are read at each position. Losses that are not finite are left out.
    """
    loss_at_step: dict[int, float] = {}
    try:
        with atomic_io.open_regular_file(path) as (descriptor, size):
            for number in range(points):
                start = size * number // points
                lines = os.pread(descriptor, SAMPLE_BYTES, start).split(b"\n")
                whole_lines = lines[1:] if start else lines  # from the middle of the file, the first line is torn
                step_row = next((row for row in rows_in(whole_lines) if "loss" in row), None)
                if step_row is None:
                    continue
                loss = finite_number(step_row, "loss")
                if loss is not None:
                    loss_at_step[step_row["step"]] = loss
    except OSError:
        return []
    return [loss_at_step[step] for step in sorted(loss_at_step)]


def finite_number(row: dict[str, Any], key: str) -> float | None:
    """The number of a row under `key`; None if it has none. NaN and infinity are null in the file."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value


def recent_median(step_rows: list[dict[str, Any]], key: str) -> float | None:
    """The median of a metric over the last `RECENT_ROWS` rows of steps; None if no row has it."""
    metrics = []
    for row in step_rows[-RECENT_ROWS:]:
        metric = finite_number(row, key)
        if metric is not None:
            metrics.append(metric)
    return median(metrics) if metrics else None
