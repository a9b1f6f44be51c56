"""Turns a signal on any rank into one decision of all ranks to stop at the same step."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from strategies.runtime import Runtime
from trainer.stopping.signals import StopRequest

ASK_EVERY_S, AT_MOST = 2.0, 8
"""Ranks ask each other about every two seconds, and never leave out more than seven steps, so that of the time that SLURM
gives (`launcher.signal_lead_s`) little is lost, also where steps become slow at once."""


class Agreement:
    """Asks all ranks, every few steps, whether any of them was told to stop; the answer arrives while a step runs.

    How many steps go by is agreed with the answer, by the slowest rank: all go on asking in the same steps. What is called
    anew in loops of other lengths (an evaluation's batches) is to have an agreement of its own.
    """

    def __init__(self, request: StopRequest, runtime: Runtime) -> None:
        self._request, self._runtime = request, runtime
        self._told = torch.zeros(2, dtype=torch.float64)
        """Whether a rank was told to stop, and the seconds that a step took since it was last asked."""
        self._work: dist.Work | None = None
        self._left_out, self._interval = 0, 1
        self._asked_at = time.monotonic()

    def another(self) -> Agreement:
        """The same for a loop of its own."""
        return Agreement(self._request, self._runtime)

    def ask(self) -> None:
        """Start asking, where it is time to. All ranks must call, and then `stop_now`."""
        told = self._request.signal_name is not None
        if self._runtime.world_size == 1:
            self._told[0] = float(told)
            return
        self._left_out += 1
        if self._left_out < self._interval:
            return
        now = time.monotonic()
        self._told[0], self._told[1] = float(told), (now - self._asked_at) / self._left_out
        self._left_out, self._asked_at = 0, now
        self._work = dist.all_reduce(self._told, op=dist.ReduceOp.MAX, group=self._runtime.control_group, async_op=True)

    def asked(self) -> bool:
        """Ask and wait for the answer. All ranks must call."""
        self.ask()
        return self.stop_now()

    def stop_now(self) -> bool:
        """The agreed answer, equal on all ranks; where none was asked for, the last one."""
        if self._work is not None:
            self._work.wait()
            self._work = None
            self._interval = max(1, min(AT_MOST, int(ASK_EVERY_S / max(1e-9, float(self._told[1])))))
        return bool(self._told[0])
