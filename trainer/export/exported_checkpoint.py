"""Which checkpoint leaves a run: the one that is exported, and by that chatted with, served and evaluated.

A run that was trained too long ends with worse weights than it had on the way. Its best checkpoint is on the disk, so that is
what leaves it. `choose_exported_checkpoint` decides when training ends, and `run.json` keeps the choice
(`exported_checkpoint`), which the verbs that read a run follow (`recorded_export_step`). Runs of earlier versions have no such
entry: of them the last checkpoint counts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.export.config import ExportedCheckpoint
from trainer.reporting.numbers import format_metric
from trainer.reporting.outcome import TrainingOutcome

EXPORTED_CHECKPOINT_KEY = "exported_checkpoint"
"""The key of `run.json` that records the choice."""


@dataclass(frozen=True, slots=True)
class ChosenCheckpoint:
    """The weights that leave a run. The names of the fields are keys of `run.json`."""

    step: int
    which: str
    """`best` or `last`."""
    reason: str
    """Why this checkpoint is taken, as a clause for people."""

    def __str__(self) -> str:
        return f"step {self.step}, the {self.which}: {self.reason}"


def choose_exported_checkpoint(
    setting: ExportedCheckpoint, outcome: TrainingOutcome, saved_steps: Collection[int]
) -> ChosenCheckpoint:
    """Choose the checkpoint whose weights leave a run when training has ended: its best or its last one.

    `setting`: `export.checkpoint`. `saved_steps`: steps whose checkpoint is on the disk. The first case that holds (the same
    on all ranks and at every start):
    - `setting` is `last`, there is no held-out metric, or the last step is the best: the last.
    - `auto`, and by the watched metric the end is not worse than the best (after early stopping: is better): the last.
    - the best checkpoint is not on the disk: the last.
    - else: the best.
    """
    progress = outcome.progress
    last_step = progress.step
    best_step = progress.best_step
    best_metric = progress.best_metric
    last_metric = outcome.last_metrics.get(outcome.watched_metric)
    if setting is ExportedCheckpoint.last:
        return ChosenCheckpoint(step=last_step, which="last", reason="export.checkpoint=last")
    if best_metric is None or best_step is None or last_metric is None:
        return ChosenCheckpoint(step=last_step, which="last", reason="nothing held out says which is the best")
    if best_step == last_step:
        return ChosenCheckpoint(step=last_step, which="last", reason=_reason_if_last_is_best(outcome, last_metric))

    ended_worse = _is_better(best_metric, last_metric, outcome)
    ended_better = _is_better(last_metric, best_metric, outcome)
    # A run that was stopped early went on for some steps without getting better: a tie counts for the best.
    takes_best = ended_worse or (outcome.stopped_early and not ended_better) or setting is ExportedCheckpoint.best
    if not takes_best:
        return ChosenCheckpoint(
            step=last_step, which="last", reason=f"no earlier checkpoint has a better {outcome.watched_metric}"
        )
    if best_step not in saved_steps:
        return ChosenCheckpoint(
            step=last_step, which="last", reason=f"step {best_step} was better, and its checkpoint is not there"
        )
    last_metric_text = f"{format_metric(last_metric)} at the last step, {last_step}"
    comparison = f"{outcome.watched_metric} was {format_metric(best_metric)} there, and {last_metric_text}"
    return ChosenCheckpoint(step=best_step, which="best", reason=comparison)


def _is_better(metric: float, reference: float, outcome: TrainingOutcome) -> bool:
    """Whether one value of the watched metric is better than another. Any number is better than NaN, and NaN than nothing."""
    if math.isnan(reference):
        return not math.isnan(metric)
    return metric > reference if outcome.greater_is_better else metric < reference


def _reason_if_last_is_best(outcome: TrainingOutcome, last_metric: float) -> str:
    """Say why the last checkpoint is taken if it is also the best one that was saved.

    Either a step between two checkpoints had a better metric ("step 40 had a better eval/loss (1.2), and was not saved ..."),
    or it is the best of all.
    """
    best_metric_of_any_step = outcome.progress.seen_metric
    if best_metric_of_any_step is not None and _is_better(best_metric_of_any_step, last_metric, outcome):
        step = outcome.progress.seen_step
        return (
            f"step {step} had a better {outcome.watched_metric} ({format_metric(best_metric_of_any_step)}), and was not saved "
            "(checkpoint.every_minutes)"
        )
    return f"it is also the best by {outcome.watched_metric} ({format_metric(last_metric)})"


def recorded_export_step(run_record: Mapping[str, Any]) -> int | None:
    """Which step a run has exported, from the content of its `run.json`.

    None if the run did not get so far, or is of an earlier version, or if the entry is no whole number.
    """
    exported_checkpoint = run_record.get(EXPORTED_CHECKPOINT_KEY)
    if not isinstance(exported_checkpoint, Mapping):
        return None
    step = exported_checkpoint.get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) else None
