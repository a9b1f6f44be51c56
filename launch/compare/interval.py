"""An interval within which a number lies, such as the speed of a point or the difference of two jobs."""

from __future__ import annotations

from typing import NamedTuple


class Interval(NamedTuple):
    """The numbers from `low` to `high`, both of them included."""

    low: float
    high: float

    def overlaps(self, other: Interval) -> bool:
        """Whether the two intervals have a number in common."""
        return self.low <= other.high and other.low <= self.high
