"""When a checkpoint is due: by steps, by time, or by what a save costs against what a failure would cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median

from strategies.runtime import Runtime, broadcast_object
from trainer.checkpoints.config import CheckpointConfig

UNMEASURED_S = 30 * 60.0
"""Seconds between checkpoints until a save was measured."""
LEAST_S = 60.0
LOOKS = 30
"""How often the ranks hear from rank 0 between two checkpoints, about."""


def best_interval(price_s: float, mtbf_s: float) -> float:
    """Seconds between checkpoints that cost the least time: that of saving, and of steps that a failure takes with it.

    Young 1974 and Daly 2006, in the first order; at least a minute, and at least the price itself.
    """
    return max(LEAST_S, price_s, math.sqrt(2 * price_s * mtbf_s) - price_s)


class Schedule:
    """The same answer on all ranks, of rank 0's clock: they hear it at a few steps on the way, not at each."""

    def __init__(self, config: CheckpointConfig, runtime: Runtime, clock: Callable[[], float] = time.monotonic) -> None:
        self.config, self.runtime, self.clock = config, runtime, clock
        self._prices: list[float] = []
        self._write_s = 0.0
        self._since = self._looked_at = clock()
        self._looked_step: int | None = None
        self._next_look = 0

    @property
    def interval_s(self) -> float | None:
        """Seconds between checkpoints; None where time does not decide."""
        if self.config.every_steps > 0 or self.config.every_minutes == 0:
            return None
        if self.config.every_minutes is not None:
            return self.config.every_minutes * 60
        if not self._prices:
            return UNMEASURED_S
        return max(best_interval(median(self._prices), self.config.mtbf_h * 3600), self._write_s)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step. All ranks must call, after the same steps."""
        if self.config.every_steps > 0:
            return step % self.config.every_steps == 0
        if self.interval_s is None or step < self._next_look:
            return False
        due, self._next_look = broadcast_object(self._look(step), self.runtime)
        return due

    def _look(self, step: int) -> tuple[bool, int]:
        """(whether it is time, the step after which to look again): soon enough that steps which became slow are noticed."""
        interval = self.interval_s
        assert interval is not None
        now = self.clock()
        pace = (now - self._looked_at) / max(1, step - (step - 1 if self._looked_step is None else self._looked_step))
        self._looked_at, self._looked_step = now, step
        left = interval - (now - self._since)
        if left <= pace / 2:
            return True, step + 1
        return False, step + max(1, int(min(left / 2, interval / LOOKS) / max(pace, 1e-6)))

    def priced(self, stall_s: float, write_s: float) -> None:
        """A checkpoint held training up for `stall_s` seconds, and was written `write_s` seconds after it was begun."""
        self._prices, self._write_s = [*self._prices[-4:], stall_s], write_s

    def tried(self, step: int, took_s: float | None) -> None:
        """A checkpoint was written in `took_s` seconds, or could not be (None). All ranks must call."""
        if took_s is not None:
            self.priced(took_s, took_s)
        self._since = self._looked_at = self.clock()
        self._looked_step, self._next_look = step, step + 1
