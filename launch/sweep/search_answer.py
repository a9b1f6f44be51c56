"""Prints the trials of a search as a table, and the words of the best one."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from launch.output import Column, TableRow, fold
from launch.output import table as draw_table
from launch.sweep.sweeper import Search

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

STATES = {"COMPLETE": "done", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "not done", "WAITING": "not done"}


def table(study: Study, search: Search, base: Path) -> str:
    """What a person reads in a terminal: the best first, then those that have no value."""
    # Sorting is ascending: with the sign, the best trial comes first.
    sign = -1 if search.greater_is_better else 1
    trials = study.get_trials(deepcopy=False)
    complete = sorted(
        (trial for trial in trials if trial.state.name == "COMPLETE"),
        key=lambda trial: (sign * (trial.value or 0.0), trial.number),
    )
    unfinished = [trial for trial in trials if trial.state.name != "COMPLETE"]
    columns = (Column("trial", is_number=True), Column(search.metric, is_number=True), Column("state"), Column("words"))
    lines = [*draw_table(columns, [_row(trial, search) for trial in [*complete, *unfinished]]), ""]
    if not complete:
        return "\n".join([*lines, "no trial is done: there is no best one"])
    best = complete[0]
    directory = base / str(best.user_attrs.get("twin", best.number))
    lines += fold(f"best: trial {best.number}, {search.metric} {best.value:.6g}, in {directory}; its words:", 0)
    return "\n".join([*lines, f"  {shlex.join(search.words_of(best.params))}"])


def _row(trial: FrozenTrial, search: Search) -> TableRow:
    """A trial's row: number, metric, state and words. A pruned trial shows its last evaluation."""
    is_pruned = trial.state.name == "PRUNED" and bool(trial.intermediate_values)
    last_step = max(trial.intermediate_values) if is_pruned else None
    metric = trial.value
    if metric is None and last_step is not None:
        metric = trial.intermediate_values[last_step]
    words = [" ".join(search.words_of(trial.params))]
    if last_step is not None:
        words.append(f"behind the median at step {last_step}")
    if "twin" in trial.user_attrs:
        words.append(f"the same words as trial {trial.user_attrs['twin']}, not run again")
    if trial.state.name == "FAIL":
        words.append(trial.user_attrs.get("reason", "its command was killed while it was drawn"))
    metric_text = "-" if metric is None else f"{metric:.6g}"
    return TableRow((str(trial.number), metric_text, STATES[trial.state.name], "\n".join(words)))
