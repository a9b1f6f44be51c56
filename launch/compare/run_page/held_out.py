"""A run's held-out metrics as its page shows them: before and after, the best step, and whether that is better or worse."""

from __future__ import annotations

import math
from dataclasses import dataclass

from launch.compare.quality import DEFAULT_WATCH, direction_of, watched_direction
from launch.compare.run_files import RecordedRun
from trainer.pages.numbers import number, percent
from trainer.pages.pieces import Arrow, Tone

TITLES = {
    "eval/loss": "Held-out loss",
    "eval/accuracy": "Held-out accuracy",
    "eval/margin": "Held-out margin",
    "eval/reward": "Held-out reward",
}
"""What people call the common metrics; any other has its own name."""
REWARD = "eval/reward"
"""What decides the best checkpoint in online reinforcement learning, if the settings name nothing else."""
MAX_CARDS = 3
"""Held-out metrics at the head of the page."""
SHARES = {"accuracy", "token_accuracy", "f1", "f1_macro", "f1_micro", "exact_match", "win_rate"}
"""Last parts of names of metrics that are shares, and shown in percent."""


@dataclass(frozen=True, slots=True)
class MetricChange:
    """One held-out metric before the first step and at the last evaluation."""

    name: str
    after: float
    before: float | None = None
    greater_is_better: bool | None = None
    """None if that is not known of the metric."""

    @property
    def title(self) -> str:
        """Its name in words."""
        return title_of(self.name)

    @property
    def gain(self) -> float | None:
        """How much better it got, in its own unit; negative if it got worse, None if it is not known."""
        if self.before is None or self.greater_is_better is None:
            return None
        return self.after - self.before if self.greater_is_better else self.before - self.after

    @property
    def tone(self) -> Tone:
        """Green if it got better, red if it got worse, none where that is not known."""
        if self.gain is None or self.gain == 0:
            return ""
        return "good" if self.gain > 0 else "bad"

    @property
    def arrow(self) -> Arrow:
        """Which way the number went."""
        if self.before is None:
            return ""
        if self.after == self.before:
            return "level"
        return "up" if self.after > self.before else "down"

    @property
    def judgement(self) -> str:
        """`better`, `worse` or `the same`; empty where that is not known."""
        if self.gain is None:
            return ""
        return {"good": "better", "bad": "worse", "": "the same"}[self.tone]

    def shown(self, value: float) -> str:
        """A value of this metric as the page writes it."""
        is_share = self.name.rsplit("/", 1)[-1] in SHARES
        return percent(value) if is_share else number(value)

    @property
    def change(self) -> str:
        """The change in words: `2.872 to 2.336 (-18.7%)`; of a metric that is no loss without the percentage."""
        if self.before is None:
            return self.shown(self.after)
        change = f"{self.shown(self.before)} to {self.shown(self.after)}"
        is_loss = self.name.endswith("loss")
        if is_loss and self.before > 0 and math.isfinite(self.after):
            change += f" ({self.after / self.before - 1:+.1%})"
        return change


@dataclass(frozen=True, slots=True)
class BestStep:
    """The evaluation with the best value of the watched metric."""

    step: int
    value: float
    last_is_as_good: bool
    """Whether the last evaluation has the same value: then nothing is gained by going back."""
    beats_beginning: bool
    """Whether it is better than before the first step; true if that was not evaluated."""


def metric_changes(run: RecordedRun) -> list[MetricChange]:
    """The held-out metrics of a run's last evaluation, the watched one first; empty if it was not evaluated after a step."""
    last_step = max(run.evaluations, default=0)
    if last_step == 0:
        return []
    before = run.evaluations.get(0, {})
    watched = watched_metric(run)
    names = sorted(run.evaluations[last_step], key=lambda name: name != watched)
    changes = []
    for name in names:
        # The setting is null where nobody typed it, so that the run's record, else the name, says it.
        greater_is_better = watched_direction(run, name) if name == watched else direction_of(name)
        changes.append(MetricChange(name, run.evaluations[last_step][name], before.get(name), greater_is_better))
    return changes


def card_changes(changes: list[MetricChange]) -> list[MetricChange]:
    """Those that stand at the head of the page: the watched one, then loss, accuracy, margin and reward."""
    shown = [change for index, change in enumerate(changes) if index == 0 or change.name in TITLES]
    return shown[:MAX_CARDS]


def watched_metric(run: RecordedRun) -> str:
    """The metric that decides the best checkpoint: what the run recorded, else `evaluation.watch`, else what is usual."""
    outcome = run.record.outcome
    recorded = outcome.watch if outcome is not None else None
    named = recorded or run.config.get("evaluation.watch")
    if named:
        return str(named)
    has_reward = any(REWARD in metrics for metrics in run.evaluations.values())
    return REWARD if has_reward else DEFAULT_WATCH


def watched_change(run: RecordedRun) -> MetricChange | None:
    """The change of the watched metric; None if the last evaluation has no number for it."""
    changes = metric_changes(run)
    return changes[0] if changes and changes[0].name == watched_metric(run) else None


def watched_is_lost(run: RecordedRun) -> bool:
    """Whether the watched metric was a number in an earlier evaluation and is none in the last one: NaN or infinite."""
    watched = watched_metric(run)
    has_it = [watched in run.evaluations[step] for step in sorted(run.evaluations)]
    return any(has_it) and not has_it[-1]


def title_of(name: str) -> str:
    """What people call a metric."""
    return TITLES.get(name, name.removeprefix("eval/"))


def best_step(run: RecordedRun) -> BestStep | None:
    """The best evaluation after the first step, by the watched metric.

    None if no evaluation has it, or nobody knows whether a larger value is better.
    """
    watched = watched_metric(run)
    greater_is_better = watched_direction(run, watched)
    values = {}
    for step, metrics in run.evaluations.items():
        value = metrics.get(watched)
        if value is not None and math.isfinite(value):
            values[step] = value
    before = values.pop(0, None)
    if not values or greater_is_better is None:
        return None
    choose = max if greater_is_better else min
    step = choose(values, key=lambda candidate: values[candidate])
    best = values[step]
    beats_beginning = before is None or (best > before if greater_is_better else best < before)
    last_is_as_good = values.get(max(run.evaluations)) == best
    return BestStep(step, best, last_is_as_good, beats_beginning)
