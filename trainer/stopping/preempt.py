"""Turns a signal on any rank into one decision of all ranks to stop at the same step."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from strategies.runtime import Runtime
from trainer.stopping.signals import StopRequest

MAX_SECONDS_BETWEEN_QUESTIONS = 2.0
"""About how many seconds pass between two questions: little of the time that SLURM gives (`launcher.signal_lead_s`)."""
MAX_STEPS_BETWEEN_QUESTIONS = 8
"""Most steps between two questions, so that little time is lost even if steps suddenly become slow."""


class RankStopAgreement:
    """Asks all ranks, every few steps, whether any of them was asked to stop. The answer arrives while a step runs.

    A signal that comes after the question of a step waits for the next question. If steps are slow, this would cost much of the
    time that a scheduler gives, so slow steps end with a second question, for whose answer the ranks wait.

    The ranks also agree on the number of steps until the next question, by the slowest rank's pace, so that all ask in the
    same steps. A loop of another length (an evaluation's batches) needs an agreement of its own: see `for_loop`.
    """

    def __init__(self, request: StopRequest, runtime: Runtime) -> None:
        """`request`: whether this rank was asked to stop."""
        self._request = request
        self._runtime = runtime
        self._answer = torch.zeros(2, dtype=torch.float64)
        """[1.0 if a rank was asked to stop, seconds that a step took since the last question]: maxima over the ranks."""
        self._work: dist.Work | None = None
        self._steps_since_asked = 0
        self._steps_between_questions = 1
        self._has_slow_steps = False
        """Whether the slowest rank takes `MAX_SECONDS_BETWEEN_QUESTIONS` or more for a step. The same on all ranks."""
        self._asked_at = time.monotonic()

    def is_asked_on_this_rank(self) -> bool:
        """Whether this process was asked to stop. No collective: the other ranks may not know yet."""
        return self._request.signal_name is not None

    def for_loop(self) -> RankStopAgreement:
        """An agreement for another loop, such as that over an evaluation's batches: it counts its own steps between questions."""
        return RankStopAgreement(self._request, self._runtime)

    def new_stop_check(self) -> Callable[[], bool]:
        """A function for another loop, which asks and waits whether any rank was asked to stop. All ranks must call it alike."""
        return self.for_loop().ask_and_wait

    def ask(self) -> None:
        """Begin to ask all ranks whether any of them was asked to stop, if a question is due.

        All ranks must call, then `stop_now`. The question is an all-reduce that runs while the step computes. One is due every
        `_steps_between_questions` calls, which `stop_now` sets by the seconds that the slowest rank takes for a step.
        """
        is_asked = self.is_asked_on_this_rank()
        if self._runtime.world_size == 1:
            self._answer[0] = float(is_asked)
            return
        self._steps_since_asked += 1
        if self._steps_since_asked < self._steps_between_questions:
            return
        now = time.monotonic()
        mean_step_s = (now - self._asked_at) / self._steps_since_asked
        self._answer[0] = float(is_asked)
        self._answer[1] = mean_step_s
        self._steps_since_asked = 0
        self._asked_at = now
        self._work = dist.all_reduce(
            self._answer, op=dist.ReduceOp.MAX, group=self._runtime.control_group, async_op=True
        )

    def ask_and_wait(self) -> bool:
        """Ask and wait for the answer. All ranks must call."""
        self.ask()
        return self._wait_for_answer()

    def stop_now(self) -> bool:
        """Whether to stop after this step: equal on all ranks, which must all call. Waits for a question that is under way.

        Asks a second time if steps are slow. In a run of one process a signal counts at once.
        """
        if self._runtime.world_size == 1:
            return self.is_asked_on_this_rank()
        if self._wait_for_answer():
            return True
        if not self._has_slow_steps:
            return False
        answer = torch.tensor([float(self.is_asked_on_this_rank())])
        dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=self._runtime.control_group)
        return bool(answer[0])

    def _wait_for_answer(self) -> bool:
        """The answer of the last question, equal on all ranks. Sets how many steps pass until the next one."""
        if self._work is not None:
            self._work.wait()
            self._work = None
            slowest_step_s = max(1e-9, float(self._answer[1]))
            max_steps = min(MAX_STEPS_BETWEEN_QUESTIONS, int(MAX_SECONDS_BETWEEN_QUESTIONS / slowest_step_s))
            self._steps_between_questions = max(1, max_steps)
            self._has_slow_steps = slowest_step_s >= MAX_SECONDS_BETWEEN_QUESTIONS
        return bool(self._answer[0])
