"""Ranks agree on stopping every few steps, in the same ones, and soon enough for what SLURM gives them."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from strategies.runtime import Runtime
from trainer.stopping import preempt
from trainer.stopping.preempt import RankStopAgreement


class Job:
    """Ranks in one process: a reduction is done when all have joined it; a rank that waits for less would wait for ever."""

    def __init__(self, world, monkeypatch):
        self.now, self.rounds, self.joined = 0.0, 0, []
        self.lock, self.barrier = threading.Lock(), threading.Barrier(world)
        self.requests = [SimpleNamespace(signal_name=None) for _ in range(world)]
        monkeypatch.setattr(preempt.dist, "all_reduce", self.all_reduce)
        monkeypatch.setattr(preempt.time, "monotonic", lambda: self.now)
        runtimes = [Runtime(n, world, n, world, torch.device("cpu"), None) for n in range(world)]
        self.agreements = [RankStopAgreement(*pair) for pair in zip(self.requests, runtimes, strict=True)]

    def all_reduce(self, tensor, *, async_op=False, **_):
        with self.lock:
            self.joined.append(tensor)
        if not async_op and self.barrier.wait(30) == 0:  # a rank that does not ask breaks it for the others
            self.reduce()
        return SimpleNamespace(wait=lambda: None) if async_op else self.barrier.wait(30)

    def reduce(self):
        assert len(self.joined) in (0, len(self.agreements)), "not all ranks ask in this step"
        if self.joined:
            largest = torch.stack(self.joined).amax(0)
            for tensor in self.joined:
                tensor.copy_(largest)
            self.joined, self.rounds = [], self.rounds + 1

    def step(self, seconds, signalled=None):
        """One step, of which rank i has taken `seconds[i]` when it asks; what each rank then knows.

        `signalled`: the rank that gets a signal while the step computes.
        """
        began = self.now
        for agreement, took in zip(self.agreements, seconds, strict=True):
            self.now = began + took
            agreement.ask()
        self.reduce()
        self.now = began + max(seconds)
        if signalled is not None:
            self.requests[signalled].signal_name = "SIGTERM"
        with ThreadPoolExecutor(len(self.agreements)) as ranks:
            return set(ranks.map(RankStopAgreement.stop_now, self.agreements))


def test_stop_agreement_is_asked_in_few_steps_the_same_on_every_rank(monkeypatch):
    job = Job(3, monkeypatch)
    for _ in range(60):
        assert job.step([0.1, 0.4, 0.2]) == {False}
    assert 60 / preempt.MAX_STEPS_BETWEEN_QUESTIONS <= job.rounds <= 60 / 4
    job.requests[2].signal_name = "SIGUSR2"
    steps = next(n for n in range(1, 20) if job.step([0.1, 0.4, 0.2]) == {True})
    assert steps <= preempt.MAX_STEPS_BETWEEN_QUESTIONS


@pytest.mark.parametrize(("seconds", "steps"), [(0.001, 8), (0.3, 8), (3.0, 1), (90.0, 1)])
def test_stop_request_reaches_all_ranks_in_time(seconds, steps, monkeypatch):
    """Of the three minutes that SLURM gives by default, next to nothing is lost."""
    job = Job(2, monkeypatch)
    for _ in range(40):
        assert job.step([seconds, seconds]) == {False}
    job.requests[0].signal_name = "SIGTERM"
    heard = next(n for n in range(1, 20) if job.step([seconds, seconds]) == {True})
    assert heard <= steps and (heard - 1) * seconds <= 2 * preempt.MAX_SECONDS_BETWEEN_QUESTIONS


def test_stop_agreement_is_asked_in_each_slow_step_after_fast_ones(monkeypatch):
    job = Job(2, monkeypatch)
    for _ in range(40):
        job.step([0.01, 0.01])
    for _ in range(preempt.MAX_STEPS_BETWEEN_QUESTIONS):
        job.step([20.0, 20.0])
    before = job.rounds
    for _ in range(5):
        job.step([20.0, 20.0])
    assert job.rounds == before + 10, "at the beginning of a step, and at its end"


def test_signal_during_a_slow_step_ends_the_run_after_that_step(monkeypatch):
    job = Job(3, monkeypatch)
    for _ in range(3):
        assert job.step([20.0, 21.0, 20.0]) == {False}
    assert job.step([20.0, 21.0, 20.0], signalled=1) == {True}
    job = Job(1, monkeypatch)
    assert job.step([0.1]) == {False}
    assert job.step([0.1], signalled=0) == {True}


def test_stop_agreement_of_one_process_is_immediate():
    request = SimpleNamespace(signal_name=None)
    agreement = RankStopAgreement(request, Runtime(0, 1, 0, 1, torch.device("cpu"), None))
    assert not agreement.ask_and_wait()
    request.signal_name = "SIGTERM"
    assert agreement.ask_and_wait() and agreement.for_loop().ask_and_wait()
