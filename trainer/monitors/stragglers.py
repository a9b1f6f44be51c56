"""Finds a rank that holds the others up: its blocks take longer than theirs in several intervals in a row.

All ranks judge by the same numbers, which came with the rows of the interval, and come to the same result.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from strategies.runtime import Runtime, gather_objects
from trainer.reporting.metrics import RankTime

INTERVALS = 5
"""Logging intervals in a row that make a rank slow, or one that is no longer."""
LEAST_SHARE = 1 / 30
"""Share of a step that the excess in its forward pass is at least; with the backward pass a tenth. Less is no matter."""


@dataclass(kw_only=True, slots=True)
class Slow:
    """A rank that is slow, or was."""

    rank: int
    host: str
    factor: float
    """How many times as long as the other ranks' median its blocks took, at the least, in the intervals that told it."""
    from_step: int
    until_step: int | None = None
    """Step at which it was as fast as the others again; None where it was not."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} computes {self.factor:.1f} times as long as the other ranks"

    def since(self) -> str:
        """The same, with from when and until when."""
        return f"{self}, from step {self.from_step}" + (f" to {self.until_step}" if self.until_step else " on")


Tell = Callable[[Slow, list[Slow], int], None]
"""Told of a rank that is slow, or no longer; with all that are now, and the step."""


class Stragglers:
    """Looks at each logging interval of a run of several ranks."""

    def __init__(self, factor: float, runtime: Runtime, tell: Tell = lambda *_: None) -> None:
        """A rank is slow from `factor` times the others' median on; 0 never looks. `tell` is called on rank 0."""
        self.factor, self.runtime, self.tell = factor, runtime, tell
        self.slow: list[Slow] = []
        """All that were found, in the order in which they were."""
        self._above: list[list[float]] = [[] for _ in range(runtime.world_size)]
        """Factors of the last intervals in a row in which a rank was slow (of one that is told: was not)."""

    def look(self, rows: list[dict[str, Any]], times: list[RankTime]) -> None:
        """Judge an interval, and add the median and the largest time to its first row. All ranks must call."""
        if not rows or len(times) < 2 or not all(each.seconds > 0 for each in times):
            return
        worst = max(times, key=lambda each: each.seconds)
        rows[0] |= {
            "blocks_s": median(each.seconds for each in times),
            "blocks_s/worst": worst.seconds,
            "blocks_s/rank": times.index(worst),
        }
        if self.factor:
            for rank, told in enumerate(self._above):
                self._judge(rank, told, factor_of(rank, times), rows[-1]["step"])

    def _judge(self, rank: int, told: list[float], factor: float, step: int) -> None:
        now = next((each for each in self.slow if each.rank == rank and each.until_step is None), None)
        if (factor > self.factor) == (now is not None):  # as it was
            told.clear()
            return
        told.append(factor)
        if len(told) < INTERVALS:
            return
        if now is not None:
            now.until_step = step
        else:
            host = gather_objects(socket.gethostname(), self.runtime)[rank]
            now = Slow(rank=rank, host=host, factor=min(told), from_step=step)
            self.slow.append(now)
        told.clear()
        if self.runtime.is_main:
            self.tell(now, [each for each in self.slow if each.until_step is None], step)

    def record(self) -> list[dict[str, Any]]:
        """All that were found, as JSON values."""
        return [asdict(each) for each in self.slow]


def factor_of(rank: int, times: list[RankTime]) -> float:
    """How many times the median of the others a rank takes, in all and for a token, the lesser of the two.

    A rank with more tokens is not slow, nor is one whose few tokens each bear more of what every pass costs. 1 where the
    excess is no matter to the step.
    """
    own, others = times[rank], [each for number, each in enumerate(times) if number != rank]
    usual, usual_each = median(each.seconds for each in others), median(each.each for each in others)
    if own.seconds - usual < LEAST_SHARE * times[0].step_s:
        return 1.0
    return min(own.seconds / usual, own.each / usual_each)
