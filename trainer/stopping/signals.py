"""Signals that ask a run to save and stop: blocked from the first moment, then received by one waiting thread.

They are blocked before any import that starts a thread (libraries of matrix products start theirs when they are loaded, and a
thread that does not block a signal takes it, and the process dies of it). What the process starts inherits the mask: data
workers and helpers do not die of a signal that was meant for the trainer. Imports nothing heavy.

Before training there is nothing to save, and the main thread may sit in native code for long: a library loads weights or a
tokenizer, or opens a pipe that nobody writes. `StopRequest.leave_when_stuck` has the process end without the main thread then:
a thread ends it in good order, and where native code lets no thread run, the watchdog (`watchdog.py`) kills it.
"""

from __future__ import annotations

import _thread
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

from trainer.stopping.watchdog import Watchdog

SIGNALS: tuple[signal.Signals, ...] = (
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,  # a soft limit of processor time is reached
)
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under `nohup` a terminal that closes asks for nothing
    SIGNALS += (signal.SIGHUP,)
STUCK_S = 5.0
"""Seconds that the main thread has to look at a request to stop before training; then the process ends without it."""
POLL_S = 0.2
INTERRUPTED = (
    b"\nCtrl-C: saving, then stopping. Once more ends the run at once, and what follows the last save is lost.\n"
)


def hold() -> None:
    """Block the signals; they wait until `StopRequest` takes them. To be called before anything heavy is imported."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def release() -> None:
    """Let the signals end this process again: for what has nothing to save."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def pending() -> bool:
    """Whether one of the signals came and is still held."""
    return not signal.sigpending().isdisjoint(SIGNALS)


class StopRequest:
    """Whether this process was asked to save and stop. Enter it in the main thread, before threads and forks.

    With `interrupts` Ctrl-C asks for the same; the second raises KeyboardInterrupt. Where the signals were held before, they
    still are afterwards: the end of a run is written down before anything can end the process.
    """

    def __init__(self, *, interrupts: bool = False) -> None:
        self._name: str | None = None
        self._over = threading.Event()
        self._taken = {*SIGNALS, signal.SIGINT} if interrupts else set(SIGNALS)
        self._thread: threading.Thread | None = None
        self._leave: Callable[[str], None] | None = None
        self._watchdog: Watchdog | None = None
        self._saves = threading.Event()
        self._main_has_looked = False

    @property
    def signal_name(self) -> str | None:
        """The signal (or other reason) that asked; None as long as none did. Replaces the waiting thread, should it have died."""
        if self._thread is not None and not self._thread.is_alive():
            self._listen()
        if self._name is not None and threading.current_thread() is threading.main_thread():
            self._main_has_looked = True
        return self._name

    def ask(self, reason: str) -> None:
        """Ask the run to stop for another reason than a signal."""
        self._name = self._name or reason

    def leave_when_stuck(self, leave: Callable[[str], None]) -> None:
        """From here to `must_save`, end the process if the main thread does not look at a request within `STUCK_S`.

        Reading `signal_name` is looking. `leave` gets the name of the signal, runs in a thread of its own, and must end the
        process itself (`os._exit`). What has something to save, or to undo before it ends, must not call this.
        Where native code keeps the interpreter's lock, nothing of the process can run, and the watchdog kills it as late.
        """
        self._leave = leave
        self._watchdog = Watchdog(self._taken, STUCK_S)

    def must_save(self) -> None:
        """From here on only the main thread ends the process: there is something to save."""
        self._leave = None
        self._saves.set()
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None

    def __enter__(self) -> StopRequest:
        """Block the signals in this process and everything it starts; a daemon thread waits for them."""
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._taken)
        # A library that starts helpers may lift the mask (CPython's resource tracker does), or threads be older than it:
        # then it is a handler that takes the signal.
        self._handlers: dict[signal.Signals, Any] = {
            number: signal.signal(number, self._interrupt if number is signal.SIGINT else self._note)
            for number in self._taken
        }
        self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        self.must_save()
        self._over.set()
        if self._thread is not None and self._thread.is_alive() and self._thread.ident is not None:
            signal.pthread_kill(self._thread.ident, signal.SIGUSR1)
            self._thread.join()
        if self._name is None:  # else the process is about to end, and more of the same must not change how
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _listen(self) -> None:
        self._thread = threading.Thread(target=self._wait, name="signals", daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        while True:
            # What is waited for in the kernel is taken there, whether or not this thread can go on. What is polled stays pending
            # until it can, which tells the watchdog that no thread runs.
            if not self._saves.is_set() and signal.sigpending().isdisjoint(self._taken):
                self._saves.wait(POLL_S)
                continue
            # Not `sigtimedwait`: where the process was suspended past the deadline, CPython 3.11 hands out uninitialised memory.
            number = signal.sigwait(self._taken)
            if self._over.is_set():
                return
            if self._leave is not None:
                self._leave_later(signal.Signals(number).name)
            if number == signal.SIGINT:
                _thread.interrupt_main(signal.SIGINT)
            else:
                self._note(number, None)

    def _leave_later(self, name: str) -> None:
        timer = threading.Timer(STUCK_S, self._leave_if_stuck, args=(name,))
        timer.daemon = True
        timer.start()

    def _leave_if_stuck(self, name: str) -> None:
        if self._leave is not None and not self._main_has_looked and not self._over.is_set():
            self._leave(name)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._name = self._name or signal.Signals(number).name

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._name == signal.Signals(signal.SIGINT).name:
            raise KeyboardInterrupt
        self._note(number, frame)
        self._name = signal.Signals(signal.SIGINT).name
        with suppress(OSError):  # the same Ctrl-C has ended the `tee` that reads it
            os.write(2, INTERRUPTED)
