"""Decides when a checkpoint is due: by steps, by time, or by what a save costs compared with what a failure would cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

from strategies.runtime import Runtime, broadcast_object
from trainer.checkpoints.config import CheckpointConfig

INTERVAL_BEFORE_MEASUREMENT_S = 30 * 60.0
"""Seconds between checkpoints until a save was measured."""
MIN_INTERVAL_S = 60.0
UNRATIONED_STALL_S = 60.0
"""Seconds that checkpoints may hold training up in all before improvements are saved only as often as the interval says."""
QUERIES_PER_CHECKPOINT_INTERVAL = 30
"""About how often the ranks hear from rank 0 between two checkpoints."""


def optimal_interval_s(stall_s: float, mtbf_s: float) -> float:
    """The seconds between checkpoints that lose least time, to saving and to steps that a failure undoes (Young 1974, Daly 2006).

    By their first-order formula, but at least a minute, and at least `stall_s`. `stall_s`: seconds that a save holds training up.
    `mtbf_s`: mean seconds between failures of the job.
    """
    return max(MIN_INTERVAL_S, stall_s, math.sqrt(2 * stall_s * mtbf_s) - stall_s)


class _DueAnswer(NamedTuple):
    """What rank 0 tells all ranks when they ask for a checkpoint."""

    is_due: bool
    next_query_step: int
    """The step after which the ranks ask again."""


class Schedule:
    """Decides when a checkpoint is due, the same on all ranks, by rank 0's clock.

    The ranks do not ask at every step, since each answer is a collective: rank 0 also says after which step they ask again.
    """

    def __init__(self, config: CheckpointConfig, runtime: Runtime, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin the interval to the first checkpoint. `config`: the settings `checkpoint.*`. `clock`: returns seconds."""
        self.config = config
        self.runtime = runtime
        self.clock = clock
        self._recent_stalls_s: list[float] = []
        """Seconds that the last five checkpoints held training up, each."""
        self._last_write_s = 0.0
        """Seconds from the beginning of the last checkpoint until it was published."""
        self._total_stall_s = 0.0
        """Seconds that all checkpoints of this process held training up."""
        self._last_save_at = clock()
        """When the interval to the next checkpoint began."""
        self._last_query_at = self._last_save_at
        """When the ranks last asked rank 0 whether a checkpoint is due."""
        self._last_query_step: int | None = None
        self._next_query_step = 0

    @property
    def checkpoint_interval_s(self) -> float | None:
        """Seconds that should pass between checkpoints; None if time does not decide. The first of these cases that applies:

        - `every_steps` is set, or `every_minutes` is 0: None.
        - `every_minutes` is set: these minutes.
        - No checkpoint was measured yet: `INTERVAL_BEFORE_MEASUREMENT_S`.
        - Else: what loses the least time (`optimal_interval_s`), by the median of the last stalls and `mtbf_h`; at least the
          seconds of a write.
        """
        if self.config.every_steps > 0 or self.config.every_minutes == 0:
            return None
        if self.config.every_minutes is not None:
            return self.config.every_minutes * 60
        if not self._recent_stalls_s:
            return INTERVAL_BEFORE_MEASUREMENT_S
        best_s = optimal_interval_s(median(self._recent_stalls_s), self.config.mtbf_h * 3600)
        return max(best_s, self._last_write_s)  # a checkpoint must be written before the next one begins

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step, by `checkpoint.every_steps`, else by rank 0's clock.

        All ranks must call, after the same steps: some of the calls are collectives.
        """
        if self.config.every_steps > 0:
            return step % self.config.every_steps == 0
        if self.checkpoint_interval_s is None or step < self._next_query_step:
            return False
        answer: _DueAnswer = broadcast_object(self._ask_clock(step), self.runtime)
        self._next_query_step = answer.next_query_step
        return answer.is_due

    def is_improvement_due(self) -> bool:
        """Whether a checkpoint may be written now because an evaluation was the best so far, the same on all ranks.

        At most as often as `checkpoint.every_minutes` says. If it says nothing, as often as the cost of a save makes best; but
        while all saves together have cost less than a minute, at once. All ranks must call.
        """
        return broadcast_object(self._may_save_improvement(), self.runtime)

    def _may_save_improvement(self) -> bool:
        """Whether a checkpoint may be written now for a best evaluation, by the clock of this rank (rank 0 decides for all).

        The first of these cases that applies:

        - `every_minutes` is 0, so that time asks for no checkpoint: no.
        - `every_minutes` is set: if these minutes have passed since the last checkpoint.
        - Checkpoints have held training up for less than `UNRATIONED_STALL_S` in all: yes.
        - Else: if the interval that loses the least time has passed (`optimal_interval_s`).
        """
        minutes = self.config.every_minutes
        since_save_s = self.clock() - self._last_save_at
        if minutes is not None:
            return minutes > 0 and since_save_s >= minutes * 60
        if self._total_stall_s < UNRATIONED_STALL_S:
            return True
        best_s = optimal_interval_s(median(self._recent_stalls_s), self.config.mtbf_h * 3600)
        return since_save_s >= max(best_s, self._last_write_s)

    def _ask_clock(self, step: int) -> _DueAnswer:
        """Decide by this rank's clock whether a checkpoint is due after this step, and after which step to ask again.

        Rank 0 decides for all. Each question is a collective, so the ranks do not ask after each step. They ask again after half
        of the remaining time at most, so that steps which became slow are noticed. Sets `_last_query_at` and `_last_query_step`,
        from which the next question finds how long a step takes.
        """
        interval_s = self.checkpoint_interval_s
        assert interval_s is not None
        now = self.clock()
        steps_since = 1
        if self._last_query_step is not None:
            steps_since = max(1, step - self._last_query_step)
        step_s = (now - self._last_query_at) / steps_since
        self._last_query_at = now
        self._last_query_step = step
        left_s = interval_s - (now - self._last_save_at)
        if left_s <= step_s / 2:  # nearer to this step's end than to the next one's
            return _DueAnswer(is_due=True, next_query_step=step + 1)
        wait_s = min(left_s / 2, interval_s / QUERIES_PER_CHECKPOINT_INTERVAL)
        wait_steps = max(1, int(wait_s / max(step_s, 1e-6)))
        return _DueAnswer(is_due=False, next_query_step=step + wait_steps)

    def record_cost(self, stall_s: float, write_s: float) -> None:
        """Record what a checkpoint cost, by which the next interval is chosen.

        `stall_s`: seconds that it held training up. `write_s`: seconds from its beginning until it was published.
        """
        self._recent_stalls_s = [*self._recent_stalls_s[-4:], stall_s]
        self._total_stall_s += stall_s
        self._last_write_s = write_s

    def restart_interval(self, step: int) -> None:
        """Begin the interval to the next checkpoint anew, after one was written, begun, or failed at `step`, or a rollback to it.

        All ranks must call.
        """
        self._last_save_at = self.clock()
        self._last_query_at = self._last_save_at
        self._last_query_step = step
        self._next_query_step = step + 1
