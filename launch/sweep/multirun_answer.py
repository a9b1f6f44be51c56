"""Prints the points of `train -m`: the settings that differ, how each ended, its losses, speed and memory."""

from __future__ import annotations

from pathlib import Path

from launch.compare.run_files import RecordedRun, measure, read_recorded_run
from launch.output import Column, TableRow, fold_all
from launch.output import table as draw_table
from strategies.errors import ConfigError

COLUMNS = (
    Column(),
    Column("steps", is_number=True),
    Column("loss", is_number=True),
    Column("held-out", is_number=True),
    Column("tokens/s", is_number=True),
    Column("GiB", is_number=True),
    Column("point"),
)
REASON_INDENT = 10
SHORT_STATES = {"failed": "failed", "preempted": "stopped", "not started": "not run"}


def table(labels: list[str], run_dirs: list[Path], codes: list[int]) -> str:
    """What a person reads when the points have ended; `codes` are those of the points that were started, in their order."""
    rows = []
    for number, (label, run_dir) in enumerate(zip(labels, run_dirs, strict=True)):
        code = codes[number] if number < len(codes) else None
        point = None
        reason = None
        if code is not None:
            try:
                point = read_recorded_run(run_dir)
                reason = point.reason
            except ConfigError as error:
                reason = " ".join(error.problems)
        notes = fold_all([reason], indent=REASON_INDENT) if reason else []
        rows.append(TableRow((_state(code, point), *_metric_cells(point), label), notes))
    return "\n".join([*draw_table(COLUMNS, rows), "", f"side by side: shardtune compare {run_dirs[0].parent}"])


def _state(code: int | None, point: RecordedRun | None) -> str:
    if code is None:
        return "not run"
    if code == 0:
        return "done"
    if point is not None and point.state in SHORT_STATES:
        return SHORT_STATES[point.state]
    return f"exit {code}"


def _metric_cells(point: RecordedRun | None) -> tuple[str, ...]:
    """Steps, loss, held-out metric, tokens/s and GiB of a point; dashes if it has no step."""
    if point is None or not point.steps:
        return ("-",) * 5
    metrics = measure(point)
    watched_metric = str(point.config.get("evaluation.watch") or "eval/loss")
    return (
        str(max(point.steps)),
        _number(metrics.loss, ".4f"),
        _number(metrics.after.get(watched_metric), ".4f"),
        _number(metrics.tokens_per_s, ",.0f"),
        _number(metrics.memory_gib, ".3g"),
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
