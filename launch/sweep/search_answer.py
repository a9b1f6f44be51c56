"""The trials of a search as a table of 80 columns, and the words of the best one."""

from __future__ import annotations

import shlex
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from launch.sweep.sweeper import Search

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

WIDTH = 80
LEAST = 30
"""Columns of words, however long the name of the metric is."""
STATES = {"COMPLETE": "done", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "not done", "WAITING": "not done"}


def table(study: Study, search: Search, base: Path) -> str:
    """What a person reads in a terminal: the best first, then those that have no value."""
    sign = -1 if search.greater_is_better else 1
    trials = study.get_trials(deepcopy=False)
    done = sorted(
        (trial for trial in trials if trial.state.name == "COMPLETE"),
        key=lambda trial: (sign * (trial.value or 0.0), trial.number),
    )
    others = [trial for trial in trials if trial.state.name != "COMPLETE"]
    width = max(len(search.metric), 9)
    lines = [f"{'trial':>5}  {search.metric:>{width}}  {'state':<8}  words"]
    for trial in [*done, *others]:
        lines += _row(trial, search, width)
    lines.append("")
    if not done:
        lines.append("no trial is done: there is no best one")
        return "\n".join(lines)
    best = done[0]
    where = base / str(best.user_attrs.get("twin", best.number))
    lines += textwrap.wrap(
        f"best: trial {best.number}, {search.metric} {best.value:.6g}, in {where}; its words:", WIDTH
    )
    lines.append(f"  {shlex.join(search.words_of(best.params))}")
    return "\n".join(lines)


def _row(trial: FrozenTrial, search: Search, width: int) -> list[str]:
    value = trial.value
    if value is None and trial.state.name == "PRUNED" and trial.intermediate_values:
        value = trial.intermediate_values[max(trial.intermediate_values)]
    shown = "-" if value is None else f"{value:.6g}"
    head = f"{trial.number:>5}  {shown:>{width}}  {STATES[trial.state.name]:<8}  "
    said = [" ".join(search.words_of(trial.params))]
    if trial.state.name == "PRUNED" and trial.intermediate_values:
        said.append(f"behind the median at step {max(trial.intermediate_values)}")
    if "twin" in trial.user_attrs:
        said.append(f"the same words as trial {trial.user_attrs['twin']}, not run again")
    if trial.state.name == "FAIL":
        said.append(trial.user_attrs.get("reason", "its command was killed while it was drawn"))
    folded = [
        line
        for part in said
        for line in textwrap.wrap(part, max(LEAST, WIDTH - len(head)), break_on_hyphens=False) or [""]
    ]
    return [head + folded[0], *(" " * len(head) + line for line in folded[1:])]
