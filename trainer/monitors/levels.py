"""Levels: a loss or gradient norm that rises within tens of steps and stays there, whether or not a single step stands out.

A step is compared with the median of earlier steps. If a number climbs in several small steps, none of them stands out, and half
a window later the new level is the median. So the median of the last steps is compared with the steps before them, too. Both
lie in one window, which makes slow drifts harmless: they widen the spread as much as they raise the median.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from trainer.monitors.rolling import DEVIATIONS_PER_MAD, MIN_SPREAD

LEVEL_STEPS = 10
"""Steps that make a level: half of them may be outliers."""
MIN_BEFORE = 10
"""Steps before them without which there is nothing to compare with."""
STEADY_STEPS = 25
"""Steps from which the spread counts as it is. That of fewer steps may be small by chance, and is widened."""
LEVEL_SHARE = 0.625
"""Share of `guards.threshold` from which a level is told: the median of several steps varies less than a single step does."""
MIN_RISE = {"loss": 0.1, "grad_norm": 1.0}
"""Share of the median before by which a level must be higher, too. Gradient norms double for good reasons: in a warm-up of the
learning rate, or when an adapter leaves its initial zeros."""
RISE = 3.0
"""Robust standard deviations from which the step before one that stands out counts as the way up to it."""
LOOK_BACK = 2 * LEVEL_STEPS
"""Steps within which a level is found: a checkpoint as old as this is from before it, as a rule."""


@dataclass(frozen=True, slots=True)
class RaisedLevel:
    """A number that has risen and stays."""

    name: str
    value: float
    """Median of the last steps."""
    score: float
    """How many robust standard deviations of single steps it is above the median before."""
    began: int
    """The first step of the level."""


class LevelWatch:
    """Looks for levels in the numbers of the last steps, on the host. The same on all ranks; nothing communicates."""

    def __init__(self, threshold: float, window: int, rows: Sequence[Mapping[str, float]] = ()) -> None:
        """`threshold`: from which a single step stands out. `window`: steps that are remembered. `rows`: of an earlier watch."""
        self._limit = LEVEL_SHARE * threshold
        self._window = window
        self.rows: list[dict[str, float]] = [dict(row) for row in rows]
        """The last steps, oldest first: `step`, `samples` consumed before it, the numbers, and `told/NAME` if a number was told
        at this step, or is at a level that was. A checkpoint has them."""

    def add(self, row: Mapping[str, Any], first_sample: int, told: Sequence[str]) -> list[RaisedLevel]:
        """Remember the metrics of a step, and return the levels that it shows for the first time.

        `first_sample`: samples consumed before the step. `told`: which of `loss` and `grad_norm` were reported already since they
        stand out in this single step. A level is not returned if one of its steps was reported already. A step whose update was
        left out, or with a number that is not finite, is not remembered and shows none.
        """
        numbers = {name: float(row[name]) for name in MIN_RISE}
        if row.get("skipped") or not all(math.isfinite(number) for number in numbers.values()):
            return []
        newest = {"step": float(row["step"]), "samples": float(first_sample), **numbers}
        newest |= {f"told/{name}": 1.0 for name in told}
        self.rows = [*self.rows, newest][-self._window :]
        found = []
        for name in MIN_RISE:
            level = self._level_of(name)
            if level is None:
                continue
            earlier_steps = [earlier for earlier in self.rows[:-1] if earlier["step"] >= level.began]
            reported_keys = {f"told/{name}", "told/loss"}  # a norm that rises beside the loss is reported with it
            if not any(reported_keys & row_of_level.keys() for row_of_level in [*earlier_steps, newest]):
                found.append(level)
            newest[f"told/{name}"] = 1.0
        return found

    def _level_of(self, name: str) -> RaisedLevel | None:
        """The level at which a number (`loss` or `grad_norm`) stands; None if it stands at none.

        It stands at one if the median of the last `LEVEL_STEPS` steps is above the median of the steps before them, both by
        many standard deviations and by the share in `MIN_RISE`.
        """
        values = [row[name] for row in self.rows]
        before = values[:-LEVEL_STEPS]
        if len(before) < MIN_BEFORE:
            return None
        now = median(values[-LEVEL_STEPS:])
        middle = median(before)
        score = _score(now, before)
        if score <= self._limit or now - middle < MIN_RISE[name] * abs(middle):
            return None
        began = self._first_above(name, middle)
        if self.rows[-1]["step"] - began < LEVEL_STEPS // 2:  # it has just come back
            return None
        return RaisedLevel(name, now, score, began)

    def began(self, names: Sequence[str]) -> int | None:
        """The step at which a number began to rise, if it rose already before the step that stands out now; else None.

        A rollback returns to a checkpoint from before that step. Called before the step that stands out is added. `names`: the
        numbers that stand out (`loss`, `grad_norm`); the earliest beginning counts. A number was rising if the newest step added
        is more than `RISE` robust standard deviations above the median.
        """
        steps = []
        for name in names:
            values = [row[name] for row in self.rows]
            if len(values) <= MIN_BEFORE:
                continue
            if _score(values[-1], values) > RISE:
                steps.append(self._first_above(name, median(values)))
        return min(steps, default=None)

    def _first_above(self, name: str, middle: float) -> int:
        """The first of the last steps that are all above `middle`."""
        first = int(self.rows[-1]["step"])
        for row in reversed(self.rows):
            if row[name] <= middle:
                break
            first = int(row["step"])
        return first

    def samples_before_update_of(self, step: int) -> tuple[int, int] | None:
        """(the last step before `step`, how many samples the run had consumed before it): its update led to `step`.

        None if that step is not remembered.
        """
        for row in reversed(self.rows):
            if row["step"] < step:
                return int(row["step"]), int(row["samples"])
        return None


def _score(now: float, before: Sequence[float]) -> float:
    """How many robust standard deviations the number `now` is above the median of those `before`.

    The deviation of fewer than `STEADY_STEPS` numbers may be small by chance, and is widened. If all are positive, logarithms
    are compared: gradient norms vary by factors, and a high one is less odd than it looks.
    """
    values = list(before)
    least_spread = MIN_SPREAD
    if min(now, *before) > 0:
        now = math.log(now)
        values = [math.log(value) for value in before]
    else:
        least_spread *= abs(median(before))
    middle = median(values)
    deviation = DEVIATIONS_PER_MAD * median(abs(value - middle) for value in values)
    widening = max(1.0, STEADY_STEPS / len(values))
    spread = widening * max(deviation, least_spread)
    return (now - middle) / spread if spread > 0 else 0.0
