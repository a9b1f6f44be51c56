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

INTERVALS_TO_CONFIRM = 5
"""Logging intervals in a row that make a rank slow, or one that is no longer."""
MIN_EXCESS_SHARE_OF_STEP = 1 / 30
"""Share of a step that the excess in its forward pass is at least; with the backward pass a tenth. Less is no matter."""


@dataclass(kw_only=True, slots=True)
class SlowRank:
    """A rank that is slow, or was."""

    rank: int
    host: str
    factor: float
    """How many times as long as the other ranks' median its blocks took, at the least, in the intervals that showed it."""
    from_step: int
    until_step: int | None = None
    """Step at which it was as fast as the others again; None where it was not."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} computes {self.factor:.1f} times as long as the other ranks"

    def text_with_steps(self) -> str:
        """The rank and its factor, with the steps from which and until which it was slow."""
        end = f"to {self.until_step}" if self.until_step else "on"
        return f"{self}, from step {self.from_step} {end}"


ReportSlow = Callable[[SlowRank, list[SlowRank], int], None]
"""Called with a rank that became slow, or is slow no longer; with all that are slow now, and the step."""


class Stragglers:
    """Judges in each logging interval which ranks of a run compute slower than the others."""

    def __init__(self, slow_from_factor: float, runtime: Runtime, on_change: ReportSlow = lambda *_: None) -> None:
        """A rank is slow above `slow_from_factor` times the others' median; 0 never judges. `on_change` is called on rank 0."""
        self.slow_from_factor = slow_from_factor
        self.runtime = runtime
        self.on_change = on_change
        self.slow_ranks: list[SlowRank] = []
        """All that were found, in the order in which they were."""
        self._unconfirmed_factors_by_rank: list[list[float]] = [[] for _ in range(runtime.world_size)]
        """By rank: its factors in the last intervals in a row that speak for a change, from normal to slow or back."""

    def add_times_and_find_slow_ranks(self, rows: list[dict[str, Any]], times: list[RankTime]) -> None:
        """Judge after each logging interval which ranks hold the others up, and add the ranks' compute times to its first row.

        `rows`: metrics of the interval's steps. `times`: by rank, how long its forward pass took in the model's blocks
        (layers). The row gets their median, the largest, and which rank has it. Nothing is done for a single rank, or if any
        was not timed. All ranks must call, with the same arguments.
        """
        all_timed = all(time.seconds > 0 for time in times)
        if not rows or len(times) < 2 or not all_timed:
            return
        slowest = max(times, key=lambda time: time.seconds)
        rows[0] |= {
            "blocks_s": median(time.seconds for time in times),
            "blocks_s/worst": slowest.seconds,
            "blocks_s/rank": times.index(slowest),
        }
        if self.slow_from_factor:
            for rank in range(len(self._unconfirmed_factors_by_rank)):
                self._update_rank(rank, slowness_factor(rank, times), rows[-1]["step"])

    def _update_rank(self, rank: int, factor: float, step: int) -> None:
        """Take in how slow a rank was in an interval; after `INTERVALS_TO_CONFIRM` in a row it counts as slow, or normal again.

        Then calls `on_change` on rank 0. `factor`: how many times as long as the other ranks it took in this interval. All
        ranks must call with the same arguments: a rank that becomes slow is named with its host, which is asked in a collective.
        """
        slow_rank = next((slow for slow in self._slow_ranks_now() if slow.rank == rank), None)
        was_slow = slow_rank is not None
        is_slow = factor > self.slow_from_factor
        unconfirmed_factors = self._unconfirmed_factors_by_rank[rank]
        if is_slow == was_slow:  # no change, or one that did not last
            unconfirmed_factors.clear()
            return
        unconfirmed_factors.append(factor)
        if len(unconfirmed_factors) < INTERVALS_TO_CONFIRM:
            return

        if slow_rank is not None:
            slow_rank.until_step = step
        else:
            host_by_rank = gather_objects(socket.gethostname(), self.runtime)
            slow_rank = SlowRank(rank=rank, host=host_by_rank[rank], factor=min(unconfirmed_factors), from_step=step)
            self.slow_ranks.append(slow_rank)
        unconfirmed_factors.clear()
        if self.runtime.is_main:
            self.on_change(slow_rank, self._slow_ranks_now(), step)

    def _slow_ranks_now(self) -> list[SlowRank]:
        """The ranks that are slow at this moment."""
        return [slow for slow in self.slow_ranks if slow.until_step is None]

    def record(self) -> list[dict[str, Any]]:
        """All that were found, as JSON values."""
        return [asdict(slow) for slow in self.slow_ranks]


def slowness_factor(rank: int, times: list[RankTime]) -> float:
    """Compare a rank's computing time with that of the others: 1.5 if it takes half as long again as their median.

    `times`: of each rank, by rank. The lesser of two ratios, in all and for a token: a rank with more tokens is not slow, nor
    is one whose few tokens each bear more of the fixed cost of a pass. 1 if the rank takes so little longer that it does not
    matter to the step.
    """
    own_time = times[rank]
    other_times = [*times[:rank], *times[rank + 1 :]]
    usual_s = median(time.seconds for time in other_times)
    usual_s_per_token = median(time.seconds_per_token for time in other_times)
    if own_time.seconds - usual_s < MIN_EXCESS_SHARE_OF_STEP * times[0].step_s:
        return 1.0
    return min(own_time.seconds / usual_s, own_time.seconds_per_token / usual_s_per_token)
