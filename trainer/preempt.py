"""Stopping in good order: a signal on any rank becomes one decision of all ranks at the same step.

Signals are blocked before anything forks and taken by one waiting thread, so that data workers and helpers do not die
of a signal that was meant for the trainer, and so that no code runs inside a signal handler.
"""

from __future__ import annotations

import signal
import threading

import torch
import torch.distributed as dist

from strategies.runtime import Runtime

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Whether this process was asked to save and stop. Enter it in the main thread, before threads and forks."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._over = threading.Event()

    def __enter__(self) -> StopRequest:
        """Block the signals in this process and everything it starts; a daemon thread waits for them."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=self._wait, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _wait(self) -> None:
        while not self._over.is_set():
            if (taken := signal.sigtimedwait(SIGNALS, 0.5)) is not None:
                self.signal_name = signal.Signals(taken.si_signo).name


class Agreement:
    """Asks all ranks, once a step, whether any of them was told to stop; the answer arrives while the step runs."""

    def __init__(self, request: StopRequest, runtime: Runtime) -> None:
        self._request, self._runtime = request, runtime
        self._flag = torch.zeros(1)
        self._work: dist.Work | None = None

    def ask(self) -> None:
        """Start asking. All ranks must call, and then `stop_now`."""
        self._flag.fill_(0.0 if self._request.signal_name is None else 1.0)
        if self._runtime.world_size > 1:
            self._work = dist.all_reduce(
                self._flag, op=dist.ReduceOp.MAX, group=self._runtime.control_group, async_op=True
            )

    def asked(self) -> bool:
        """Ask and wait for the answer. All ranks must call."""
        self.ask()
        return self.stop_now()

    def stop_now(self) -> bool:
        """The agreed answer, equal on all ranks."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return bool(self._flag.item())
