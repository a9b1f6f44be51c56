"""Prints the trials of a search as a table, and the arguments of the best one."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.output import TableColumn, TableRow, wrap_text
from launch.output import format_table as text_table
from launch.sweep.sweeper import PlannedSearch

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

STATE_BY_OPTUNA_STATE = {
    "COMPLETE": "done",
    "PRUNED": "pruned",
    "FAIL": "failed",
    "RUNNING": "not done",
    "WAITING": "not done",
}


def completed_trials_best_first(trials: Sequence[FrozenTrial], search: PlannedSearch) -> list[FrozenTrial]:
    """Rank the trials of a search that have a result: the best first; equal ones in the order of their numbers."""
    completed = [trial for trial in trials if trial.state.name == "COMPLETE" and trial.value is not None]
    # Sorting is ascending: with the sign, the best trial comes first.
    sign = -1 if search.greater_is_better else 1
    return sorted(completed, key=lambda trial: (sign * (trial.value or 0.0), trial.number))


def run_dir_of_trial(trial: FrozenTrial, search_dir: Path) -> Path:
    """The run directory of a trial. A trial with the arguments of an earlier one (its twin) was not run: it has the twin's."""
    return search_dir / str(trial.user_attrs.get("twin", trial.number))


def failure_reason(trial: FrozenTrial) -> str:
    """Why a failed trial failed; a trial whose command was killed before it was started has recorded no reason."""
    return str(trial.user_attrs.get("reason", "its command was killed while it was drawn"))


def search_result_text(study: Study, search: PlannedSearch, search_dir: Path) -> str:
    """Write what is printed after a search: a table of all trials, the best first, and the arguments of the best one.

    `study`: Optuna's record of the trials. `search_dir`: with a directory for each trial.
    """
    trials = study.get_trials(deepcopy=False)
    completed = completed_trials_best_first(trials, search)
    unfinished = [trial for trial in trials if trial.state.name != "COMPLETE"]
    columns = (
        TableColumn("trial", is_number=True),
        TableColumn(search.metric, is_number=True),
        TableColumn("state"),
        TableColumn("settings"),
    )
    rows = [_trial_row(trial, search) for trial in [*completed, *unfinished]]
    lines = [*text_table(columns, rows), ""]
    if not completed:
        return "\n".join([*lines, "no trial is done: there is no best one"])
    best = completed[0]
    run_dir = run_dir_of_trial(best, search_dir)
    best_line = f"best: trial {best.number}, {search.metric} {best.value:.6g}, in {run_dir}; its settings:"
    lines += wrap_text(best_line, 0)
    return "\n".join([*lines, f"  {shlex.join(search.trial_arguments(best.params))}"])


def _trial_row(trial: FrozenTrial, search: PlannedSearch) -> TableRow:
    """A trial's row of the table: number, metric, state and arguments, and below the arguments how it ended.

    The metric of a pruned trial is that of its last evaluation. A trial that drew the arguments of an earlier one (its twin)
    was not run.
    """
    metric = trial.value
    cell_lines = [" ".join(search.trial_arguments(trial.params))]
    if trial.state.name == "PRUNED" and trial.intermediate_values:
        last_step = max(trial.intermediate_values)
        if metric is None:
            metric = trial.intermediate_values[last_step]
        cell_lines.append(f"behind the median at step {last_step}")
    if "twin" in trial.user_attrs:
        cell_lines.append(f"the same settings as trial {trial.user_attrs['twin']}, not run again")
    if trial.state.name == "FAIL":
        cell_lines.append(failure_reason(trial))
    metric_cell = "-" if metric is None else f"{metric:.6g}"
    return TableRow((str(trial.number), metric_cell, STATE_BY_OPTUNA_STATE[trial.state.name], "\n".join(cell_lines)))
