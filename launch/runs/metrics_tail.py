"""Reads the last rows of `metrics.jsonl`, and samples its loss curve, without reading a file that grows for weeks.

The file may be growing, torn or empty. What cannot be read is left out. Nothing here raises.
"""

from __future__ import annotations

import os
from pathlib import Path
from statistics import median
from typing import Any

from strategies import atomic_io
from trainer.reporting.metric_rows import readable_rows
from trainer.reporting.status import read_status

TAIL_BYTES = 2**16
"""Bytes at the end of the file that are read for the last rows."""
SAMPLE_BYTES = 2**13
"""Bytes read for each point of the loss curve: several rows, of which the first whole one is taken."""
RECENT_ROWS = 20
"""Rows over which rates are medians: a single step may be slow, for example for a checkpoint."""


def read_last_rows(path: Path) -> list[dict[str, Any]]:
    """Read only the end of `metrics.jsonl`: its last rows, oldest first, of steps (which have the key `loss`) and of evaluations.

    Empty if the file cannot be read.
    """
    try:
        with atomic_io.open_regular_file(path) as (descriptor, size):
            start = max(0, size - TAIL_BYTES)
            lines = os.pread(descriptor, TAIL_BYTES, start).split(b"\n")
    except OSError:
        return []
    begins_within_line = start > 0
    return readable_rows(lines[1:] if begins_within_line else lines)


def loss_curve(path: Path, num_samples: int) -> list[float]:
    """Sample the losses of a run for a small picture: from `num_samples` evenly spread positions of `metrics.jsonl`, by step.

    Only a few KiB are read at each position. There are fewer losses if positions have the same row, or none with a finite
    loss. Empty if the file cannot be read.
    """
    loss_by_step: dict[int, float] = {}
    try:
        with atomic_io.open_regular_file(path) as (descriptor, size):
            for sample_index in range(num_samples):
                start = size * sample_index // num_samples
                lines = os.pread(descriptor, SAMPLE_BYTES, start).split(b"\n")
                begins_within_line = start > 0
                rows = readable_rows(lines[1:] if begins_within_line else lines)
                step_row = next((row for row in rows if "loss" in row), None)  # the row of an evaluation has none
                if step_row is None:
                    continue
                loss = finite_number(step_row, "loss")
                if loss is not None:
                    loss_by_step[step_row["step"]] = loss
    except OSError:
        return []
    return [loss_by_step[step] for step in sorted(loss_by_step)]


def finite_number(row: dict[str, Any], key: str) -> float | None:
    """The number that a row of metrics has under `key`.

    None if it has none, or one that is not finite, which is null in the file.
    """
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value


def last_step(run_dir: Path) -> int:
    """The optimizer step that a run has reached, whether it runs, has ended or was killed; 0 before the first.

    `status.json` has the step at which it was last written, mostly that of the start, of a resume, or of the end. The rows
    of `metrics.jsonl` have those in between.
    """
    steps = [int(read_status(run_dir).get("step") or 0)]
    for row in read_last_rows(run_dir / "metrics.jsonl"):
        steps.append(int(finite_number(row, "step") or 0))
    return max(steps)


def recent_median(step_rows: list[dict[str, Any]], metric: str) -> float | None:
    """The median of a metric over the last `RECENT_ROWS` rows of steps; None if none of these rows has it."""
    values = []
    for row in step_rows[-RECENT_ROWS:]:
        value = finite_number(row, metric)
        if value is not None:
            values.append(value)
    return median(values) if values else None
