"""A run's held-out metrics as its page shows them: before and after, the best step, and whether that is better or worse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from launch.compare.metric_meaning import greater_is_better_by_name, greater_is_better_in_run, monitored_metric
from launch.compare.run_files import RecordedRun
from trainer.pages.numbers import format_number, format_percent
from trainer.pages.pieces import Arrow, Tone

TITLE_BY_METRIC = {
    "eval/loss": "Held-out loss",
    "eval/accuracy": "Held-out accuracy",
    "eval/margin": "Held-out margin",
    "eval/reward": "Held-out reward",
}
"""What people call the common metrics; any other has its own name."""
MAX_CARDS = 3
"""Held-out metrics at the head of the page."""
METRICS_IN_PERCENT = {"accuracy", "token_accuracy", "f1", "f1_macro", "f1_micro", "exact_match", "win_rate"}
"""Last parts of names of metrics that are shares, and shown in percent."""


@dataclass(frozen=True, slots=True)
class MetricChange:
    """One held-out metric before the first step and at the last evaluation."""

    name: str
    value_after: float
    value_before: float | None = None
    greater_is_better: bool | None = None
    """None if that is not known of the metric."""

    @property
    def title(self) -> str:
        """Its name in words."""
        return metric_title(self.name)

    @property
    def improvement(self) -> float | None:
        """How much better the value got, in the metric's own unit; negative if it got worse, None if that is not known."""
        if self.value_before is None or self.greater_is_better is None:
            return None
        return self.value_after - self.value_before if self.greater_is_better else self.value_before - self.value_after

    @property
    def tone(self) -> Tone:
        """The colour of the change on the page: `good` if it got better, `bad` if worse, none if neither or not known."""
        tones: dict[str, Tone] = {"better": "good", "worse": "bad"}
        return tones.get(self.judgement, "")

    @property
    def arrow(self) -> Arrow:
        """Whether the number went up, down or stayed level; empty if it was not evaluated before training."""
        if self.value_before is None:
            return ""
        if self.value_after == self.value_before:
            return "level"
        return "up" if self.value_after > self.value_before else "down"

    @property
    def judgement(self) -> Literal["better", "worse", "the same", ""]:
        """How the value changed during training; empty if it was not evaluated before, or nobody knows which is better."""
        if self.improvement is None:
            return ""
        if self.improvement == 0:
            return "the same"
        return "better" if self.improvement > 0 else "worse"

    def format_value(self, value: float) -> str:
        """A value of this metric as the page writes it: `61 %` for a share such as accuracy, else `2.872`."""
        is_share = self.name.rsplit("/", 1)[-1] in METRICS_IN_PERCENT
        return format_percent(value) if is_share else format_number(value)

    @property
    def change_text(self) -> str:
        """The change as text, such as `2.872 to 2.336 (-18.7%)`. Only a loss has the percentage."""
        if self.value_before is None:
            return self.format_value(self.value_after)
        change = f"{self.format_value(self.value_before)} to {self.format_value(self.value_after)}"
        is_loss = self.name.endswith("loss")
        if is_loss and self.value_before > 0 and math.isfinite(self.value_after):
            change += f" ({self.value_after / self.value_before - 1:+.1%})"
        return change


@dataclass(frozen=True, slots=True)
class BestStep:
    """The evaluation with the best value of the monitored metric."""

    step: int
    value: float
    is_last_step_as_good: bool
    """Whether the last evaluation has the same value: then nothing is gained by going back."""
    is_better_than_before_training: bool
    """Whether it is better than before the first step; true if that was not evaluated."""


def metric_changes(run: RecordedRun) -> list[MetricChange]:
    """How each held-out metric of a run changed from before training to the last evaluation, the monitored metric first.

    Empty if the run was not evaluated after a step. The monitored metric is the one that decides which checkpoint is the
    best.
    """
    last_step = max(run.evaluations, default=0)
    if last_step == 0:
        return []
    values_before = run.evaluations.get(0, {})
    values_after = run.evaluations[last_step]
    monitored = monitored_metric(run)
    changes = []
    for name in sorted(values_after, key=lambda name: name != monitored):
        if name == monitored:
            greater_is_better = greater_is_better_in_run(run, name)
        else:  # only of the monitored metric may the run have recorded which direction is better
            greater_is_better = greater_is_better_by_name(name)
        changes.append(MetricChange(name, values_after[name], values_before.get(name), greater_is_better))
    return changes


def card_changes(changes: list[MetricChange]) -> list[MetricChange]:
    """Choose the few metrics that get a card at the head of the page: the first, and those in `TITLE_BY_METRIC`.

    At most `MAX_CARDS`.

    `changes`: of all held-out metrics, that of the monitored one first.
    """
    shown = [change for index, change in enumerate(changes) if index == 0 or change.name in TITLE_BY_METRIC]
    return shown[:MAX_CARDS]


def monitored_change(run: RecordedRun) -> MetricChange | None:
    """How the monitored metric (which decides the best checkpoint) changed; None if the last evaluation has no number for it."""
    changes = metric_changes(run)
    return changes[0] if changes and changes[0].name == monitored_metric(run) else None


def monitored_metric_is_lost(run: RecordedRun) -> bool:
    """Whether the monitored metric became NaN or infinite: it is so in the last evaluation, and was finite in an earlier one."""
    monitored = monitored_metric(run)
    # A value that is not finite is missing from the metrics of its evaluation.
    has_finite_value = [monitored in run.evaluations[step] for step in sorted(run.evaluations)]
    return any(has_finite_value) and not has_finite_value[-1]


def metric_title(metric: str) -> str:
    """What people call a metric: `eval/loss` -> `Held-out loss`, `eval/qa/f1` -> `qa/f1`."""
    return TITLE_BY_METRIC.get(metric, metric.removeprefix("eval/"))


def best_step(run: RecordedRun) -> BestStep | None:
    """Find the evaluation after the first step with the best value of the monitored metric, which decides the best checkpoint.

    None if no evaluation after the first step has a finite value, or nobody knows whether a larger value is better.
    """
    monitored = monitored_metric(run)
    greater_is_better = greater_is_better_in_run(run, monitored)
    value_by_step: dict[int, float] = {}
    for step, metrics in run.evaluations.items():
        value = metrics.get(monitored)
        if value is not None and math.isfinite(value):
            value_by_step[step] = value
    value_before = value_by_step.pop(0, None)  # step 0 is the evaluation before the first step
    if not value_by_step or greater_is_better is None:
        return None
    choose = max if greater_is_better else min
    step = choose(value_by_step, key=lambda candidate: value_by_step[candidate])
    best_value = value_by_step[step]
    is_better_than_before_training = True
    if value_before is not None:
        is_better_than_before_training = best_value > value_before if greater_is_better else best_value < value_before
    # None if the last evaluation has no finite value: then it is not as good as the best.
    last_value = value_by_step.get(max(run.evaluations))
    return BestStep(
        step,
        best_value,
        is_last_step_as_good=last_value == best_value,
        is_better_than_before_training=is_better_than_before_training,
    )
