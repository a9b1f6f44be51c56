"""One scale for differences of metrics of different units: the change in percent of the larger of both values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from trainer.evaluation.report.record import DifferenceRecord, MetricRecord
from trainer.pages.numbers import format_percent
from trainer.pages.pieces import IntervalBar, Tone

SCALE_REACHES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Ends that a scale may have, as shares; one that needs more ends at 100 %."""


@dataclass(frozen=True, slots=True)
class Change:
    """How a metric changed against the other model, as shares of the larger of both values. Positive is better."""

    low: float
    value: float
    high: float

    @classmethod
    def of_metric(cls, metric: MetricRecord, difference: DifferenceRecord | None) -> Change | None:
        """How a metric changed against the other model, as a share of the larger value: a scale that all metrics share.

        A metric of 0.6 (greater is better) that was 0.5 with the other model changed by 0.1 / 0.6. Positive is better; if
        neither direction is better, positive is larger. The 95 % interval is scaled alike.

        None without a comparison, or if both values are 0 or one is infinite.
        """
        if difference is None:
            return None
        other_value = difference["value"]
        larger_value = max(abs(metric["value"]), abs(other_value))
        lower_is_better = metric["greater_is_better"] is False  # None: neither direction is better
        sign = -1 if lower_is_better else 1
        numbers = [sign * difference["low"], sign * difference["difference"], sign * difference["high"]]
        if larger_value == 0 or not all(math.isfinite(number) for number in (larger_value, *numbers)):
            return None
        low, value, high = (number / larger_value for number in numbers)
        return cls(min(low, high), value, max(low, high))


@dataclass(frozen=True, slots=True)
class ChangeScale:
    """The scale that all bars of a table share: from `-reach` to `reach`, with no change in the middle."""

    reach: float

    @classmethod
    def over(cls, changes: Iterable[Change | None]) -> ChangeScale:
        """The smallest scale that shows these changes whole, if one of `SCALE_REACHES` does."""
        farthest = 0.0
        for change in changes:
            if change is not None:
                farthest = max(farthest, abs(change.low), abs(change.high))
        return cls(next((reach for reach in SCALE_REACHES if reach >= farthest), SCALE_REACHES[-1]))

    @property
    def labels(self) -> tuple[str, str, str]:
        """What stands at its left end, in its middle and at its right end."""
        return f"-{self.reach:.0%}", "0", f"+{self.reach:.0%}"

    def bar(self, change: Change | None, tone: Tone) -> IntervalBar | None:
        """The picture of a change with its interval; None without one. What is beyond the scale ends at its edge."""
        if change is None:
            return None
        direction = "better" if change.value > 0 else "worse"
        label = (
            f"{format_percent(abs(change.value))} {direction}, between {_signed(change.low)} and {_signed(change.high)}"
        )
        return IntervalBar(change.low, change.value, change.high, -self.reach, self.reach, tone=tone, label=label)


def _signed(share: float) -> str:
    return f"{'-' if share < 0 else '+'}{format_percent(abs(share))}"
