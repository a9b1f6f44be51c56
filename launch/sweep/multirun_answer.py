"""Prints the points of `train -m`: the settings that differ, how each ended, its losses, speed and memory."""

from __future__ import annotations

from pathlib import Path

from launch.compare.run_files import RecordedRun, measure_run, read_recorded_run
from launch.output import TableColumn, TableRow, wrap_sentences
from launch.output import format_table as text_table
from strategies.errors import ConfigError
from trainer.reporting.status import is_refused_start

POINT_COLUMNS = (
    TableColumn(),
    TableColumn("steps", is_number=True),
    TableColumn("loss", is_number=True),
    TableColumn("held-out", is_number=True),
    TableColumn("tokens/s", is_number=True),
    TableColumn("GiB", is_number=True),
    TableColumn("point"),
)
REASON_INDENT_COLUMNS = 10
LABEL_BY_RUN_STATE = {"failed": "failed", "preempted": "stopped", "not started": "not run"}


def sweep_points_table_text(labels: list[str], run_dirs: list[Path], exit_codes: list[int]) -> str:
    """Write what `train -m` prints at its end: a row for each point, with the reason below if it is not done.

    A point is one combination of the values that settings were given; `labels` names each: "optim.lr=1e-4 tuning=lora".
    `exit_codes` are those of the points that were started, in their order; it is shorter if the command was stopped.
    """
    rows = []
    for index, (label, run_dir) in enumerate(zip(labels, run_dirs, strict=True)):
        exit_code = exit_codes[index] if index < len(exit_codes) else None  # None for a point that was not started
        run = None
        reason = None
        if exit_code is not None:
            try:
                run = read_recorded_run(run_dir)
                reason = run.reason
            except ConfigError as error:
                reason = " ".join(error.problems)
        notes = wrap_sentences([reason], indent=REASON_INDENT_COLUMNS) if reason else []
        # The label is the last cell, because it may be long and need not line up with anything.
        rows.append(TableRow((_state_cell(exit_code, run), *_metric_cells(run), label), notes))
    return "\n".join([*text_table(POINT_COLUMNS, rows), "", f"side by side: shardtune compare {run_dirs[0].parent}"])


def _state_cell(exit_code: int | None, run: RecordedRun | None) -> str:
    """How a point of `train -m` ended, as a word of its row: `done`, `failed`, `stopped`, `not run`, or `exit <code>`.

    The last is for a run that left no status.
    `exit_code`: None for a point that was not started. `run`: None if its run cannot be read.
    """
    if exit_code is None:
        return "not run"
    if exit_code == 0:
        return "done"
    if run is not None and is_refused_start(run.status):
        return "failed"  # it could not go on, although nothing of it is lost
    if run is not None and run.state in LABEL_BY_RUN_STATE:
        return LABEL_BY_RUN_STATE[run.state]
    return f"exit {exit_code}"


def _metric_cells(run: RecordedRun | None) -> tuple[str, ...]:
    """The numbers of a point in the table of `train -m`: steps, loss, held-out metric, tokens/s and GiB; dashes without a step.

    The held-out metric is the one that the run watches (`evaluation.watch`). `run`: None if its run cannot be read.
    """
    if run is None or not run.steps:
        return ("-",) * 5
    measured = measure_run(run)
    monitored_metric = str(run.config.get("evaluation.watch") or "eval/loss")
    return (
        str(max(run.steps)),
        _number_cell(measured.loss, ".4f"),
        _number_cell(measured.metrics_at_end.get(monitored_metric), ".4f"),
        _number_cell(measured.tokens_per_s, ",.0f"),
        _number_cell(measured.memory_gib, ".3g"),
    )


def _number_cell(value: float | None, number_format: str) -> str:
    return "-" if value is None else format(value, number_format)
