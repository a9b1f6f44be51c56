"""Levels: a loss or gradient norm that rises within tens of steps and stays there, whether or not a single step stands out.

A step is compared with the median of earlier steps. If a number climbs in several small steps, none of them stands out, and
half a window later the new level is the median. So the median of the last steps is compared with the steps before them, too.
Both lie in one window, which makes slow drifts harmless: they widen the spread as much as they raise the median.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from trainer.monitors.rolling import DEVIATIONS_PER_MAD, MIN_SPREAD

LEVEL_STEPS = 10
"""The last steps, whose median is compared with the steps before them: half of them may be outliers."""
MIN_EARLIER_STEPS = 10
"""Steps before them without which there is nothing to compare with."""
STEPS_OF_STEADY_SPREAD = 25
"""Steps from which the spread counts as it is. That of fewer steps may be small by chance, and is widened."""
LEVEL_THRESHOLD_SHARE = 0.625
"""Share of `guards.threshold` from which a level is told: the median of several steps varies less than a single step does."""
MIN_RISE_SHARE_BY_METRIC = {"loss": 0.1, "grad_norm": 1.0}
"""Share of the median before by which a level must be higher, too. Gradient norms double for good reasons: in a warm-up of the
learning rate, or when an adapter leaves its initial zeros."""
RISING_ROBUST_SCORE = 3.0
"""Robust standard deviations from which the step before one that stands out counts as the way up to it."""
LEVEL_LOOK_BACK_STEPS = 2 * LEVEL_STEPS
"""Steps within which a level is found: a checkpoint as old as this is from before it, as a rule."""


@dataclass(frozen=True, slots=True)
class SustainedRise:
    """A loss or gradient norm that has risen and stayed high, at a new level."""

    metric: str
    """`loss` or `grad_norm`."""
    median_now: float
    """Median of the last `LEVEL_STEPS` steps."""
    deviation: float
    """How many robust standard deviations of single steps that is above the median of the steps before."""
    first_step: int
    """The first step of the level."""


class RememberedStep(NamedTuple):
    """A step among the last ones."""

    step: int
    first_sample: int
    """How many samples the run had consumed before it."""


class LevelShiftDetector:
    """Looks for levels in the numbers of the last steps, on the host. The same on all ranks; nothing communicates."""

    def __init__(self, threshold: float, window: int, rows: Sequence[Mapping[str, float]] = ()) -> None:
        """`threshold`: robust standard deviations from which a single step stands out. `window`: how many steps are remembered.

        `rows`: the remembered steps of a checkpoint, to go on from; empty for a new run.
        """
        self._min_robust_score = LEVEL_THRESHOLD_SHARE * threshold
        self._window = window
        self.rows: list[dict[str, float]] = [dict(row) for row in rows]
        """The last steps, oldest first: `step`, `samples` consumed before it, the numbers, and `told/NAME` if a number was told
        at this step, or is at a level that was. A checkpoint has them."""

    def add_step(self, row: Mapping[str, Any], first_sample: int, reported_names: Sequence[str]) -> list[SustainedRise]:
        """Take in a step, and return the loss or gradient norm that has risen and stayed, if this step is the first to show it.

        `first_sample`: samples consumed before the step. `reported_names`: which of `loss` and `grad_norm` were reported
        already since they stand out in this single step. A rise is not returned if one of its steps was reported already. A
        step whose update was left out, or with a number that is not finite, is not remembered and shows none.
        """
        numbers = {name: float(row[name]) for name in MIN_RISE_SHARE_BY_METRIC}
        if row.get("skipped") or not all(math.isfinite(number) for number in numbers.values()):
            return []
        newest = {"step": float(row["step"]), "samples": float(first_sample), **numbers}
        for name in reported_names:
            newest[_reported_key(name)] = 1.0
        self.rows = [*self.rows, newest][-self._window :]
        new_rises = []
        for name in MIN_RISE_SHARE_BY_METRIC:
            rise = self._current_rise(name)
            if rise is None:
                continue
            steps_of_rise = [remembered for remembered in self.rows if remembered["step"] >= rise.first_step]
            # A norm that rises beside the loss is reported with it.
            reported_keys = {_reported_key(name), _reported_key("loss")}
            if not any(reported_keys & remembered.keys() for remembered in steps_of_rise):
                new_rises.append(rise)
            newest[_reported_key(name)] = 1.0
        return new_rises

    def _current_rise(self, name: str) -> SustainedRise | None:
        """Judge whether a number (`loss` or `grad_norm`) has risen and stayed until now; None if not.

        It has if all three hold:

        - The median of the last `LEVEL_STEPS` steps is above that of the steps before them by many robust standard deviations.
        - It is above it by the share in `MIN_RISE_SHARE_BY_METRIC`.
        - All of the last `LEVEL_STEPS // 2` steps are above that median: the number did not go down in between.
        """
        values = [row[name] for row in self.rows]
        values_before = values[:-LEVEL_STEPS]
        if len(values_before) < MIN_EARLIER_STEPS:
            return None
        median_now = median(values[-LEVEL_STEPS:])
        median_before = median(values_before)
        robust_score = _robust_score(median_now, values_before)
        rose_enough = median_now - median_before >= MIN_RISE_SHARE_BY_METRIC[name] * abs(median_before)
        if robust_score <= self._min_robust_score or not rose_enough:
            return None
        first_step = self._first_step_above(name, median_before)
        if self.rows[-1]["step"] - first_step < LEVEL_STEPS // 2:  # it went down in between, and has just come back
            return None
        return SustainedRise(metric=name, median_now=median_now, deviation=robust_score, first_step=first_step)

    def first_step_of_rise(self, names: Sequence[str]) -> int | None:
        """The step at which a number began to rise, if it rose already before the step that stands out now; else None.

        A rollback returns to a checkpoint from before that step. Called before the step that stands out is added. `names`: the
        numbers that stand out (`loss`, `grad_norm`); of several rises the earliest counts. A number was rising if the newest
        step added is more than `RISING_ROBUST_SCORE` robust standard deviations above the median.
        """
        first_steps = []
        for name in names:
            values = [row[name] for row in self.rows]
            if len(values) <= MIN_EARLIER_STEPS:
                continue
            if _robust_score(values[-1], values) > RISING_ROBUST_SCORE:
                first_steps.append(self._first_step_above(name, median(values)))
        return min(first_steps, default=None)

    def _first_step_above(self, name: str, threshold: float) -> int:
        """When a number that is high now became so: the first step since which all remembered steps are above `threshold`.

        `name`: `loss` or `grad_norm`. It is the newest step if that one is not above it.
        """
        first_step = int(self.rows[-1]["step"])
        for row in reversed(self.rows):
            if row[name] <= threshold:
                break
            first_step = int(row["step"])
        return first_step

    def step_before(self, step: int) -> RememberedStep | None:
        """The last remembered step before `step`, whose update led to `step`; None if none is remembered."""
        for row in reversed(self.rows):
            if row["step"] < step:
                return RememberedStep(step=int(row["step"]), first_sample=int(row["samples"]))
        return None


def _reported_key(name: str) -> str:
    """The key of a remembered step, with the value 1, at which the metric `name` was reported, alone or as part of a level."""
    return f"told/{name}"


def _robust_score(value: float, earlier_values: Sequence[float]) -> float:
    """How far a value lies above earlier ones, in robust standard deviations above their median; negative below it.

    Robust: estimated by medians, so that outliers among them do not count. The deviation of fewer than
    `STEPS_OF_STEADY_SPREAD` numbers may be small by chance, and is widened. If all are positive, logarithms are compared:
    gradient norms vary by factors, and a high one is less odd than it looks. The deviation is never taken for smaller than
    `MIN_SPREAD` of the median; the score is 0 if it is still 0, because most earlier values are 0.
    """
    compared_value = value
    compared_earlier = list(earlier_values)
    if min(value, *earlier_values) > 0:
        compared_value = math.log(value)
        compared_earlier = [math.log(earlier) for earlier in earlier_values]
        min_spread = MIN_SPREAD  # a difference of logarithms is a share already
    else:
        min_spread = MIN_SPREAD * abs(median(earlier_values))
    middle = median(compared_earlier)
    deviation = DEVIATIONS_PER_MAD * median(abs(earlier - middle) for earlier in compared_earlier)
    widening = max(1.0, STEPS_OF_STEADY_SPREAD / len(compared_earlier))
    spread = widening * max(deviation, min_spread)
    return (compared_value - middle) / spread if spread > 0 else 0.0
