"""Signals that ask a run to save and stop: blocked from the first moment, then received by one waiting thread.

They are blocked before any import that starts a thread. Libraries of matrix products start threads when they are loaded, and
a thread that does not block a signal receives it, which ends the process. Child processes inherit the mask, so that data
workers do not die of a signal that was meant for the trainer. This module imports nothing heavy.

Before training there is nothing to save, and the main thread may be in native code for long: a library loads weights or a
tokenizer, or opens a pipe that nobody writes. With `StopRequest.arm_end_of_stuck_process`, the process then ends without the main
thread: another thread ends it in order, and if native code lets no thread run, the watchdog (`watchdog.py`) kills it.
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

STOP_SIGNALS: tuple[signal.Signals, ...] = (
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,  # a soft limit of processor time is reached
)
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under `nohup` a terminal that closes asks for nothing
    STOP_SIGNALS += (signal.SIGHUP,)
STUCK_MAIN_THREAD_S = 5.0
"""Seconds that the main thread has to look at a request to stop before training; then the process ends without it."""
PENDING_SIGNAL_POLL_S = 0.2
CTRL_C_MESSAGE = (
    b"\nCtrl-C: saving, then stopping. Press Ctrl-C again to quit now: work since the last checkpoint is lost.\n"
)


def block_signals() -> None:
    """Block the signals; they stay pending until `StopRequest` takes them. Call it before anything heavy is imported."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def unblock_signals() -> None:
    """Let the signals end this process again, for commands that have nothing to save."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def is_signal_pending() -> bool:
    """Whether one of the signals arrived and is still pending."""
    return not signal.sigpending().isdisjoint(STOP_SIGNALS)


class StopRequest:
    """Whether this process was asked to save and stop. Enter it in the main thread, before threads and forks.

    With `interrupts`, Ctrl-C asks for the same, and a second Ctrl-C raises KeyboardInterrupt. If the signals were blocked
    before, they still are afterwards, so that the end of a run is recorded before anything can end the process.
    """

    def __init__(self, *, interrupts: bool = False) -> None:
        self._stop_reason: str | None = None
        """The signal (or other reason) that asked to stop first; Ctrl-C replaces an earlier one."""
        self._closed = threading.Event()
        self._stop_signals = {*STOP_SIGNALS, signal.SIGINT} if interrupts else set(STOP_SIGNALS)
        self._receiving_thread: threading.Thread | None = None
        self._end_process: Callable[[str], None] | None = None
        """Ends a process whose main thread is stuck before training; None once there is something to save."""
        self._watchdog: Watchdog | None = None
        self._must_save = threading.Event()
        """Set once there is something to save, so that only the main thread may end the process."""
        self._main_thread_has_looked = False
        """Whether the main thread has read `signal_name` since it was asked to stop."""

    @property
    def signal_name(self) -> str | None:
        """The signal (or other reason) that asked to stop; None so far. Starts the waiting thread again if it has died."""
        if self._receiving_thread is not None and not self._receiving_thread.is_alive():
            self._start_receiving_thread()
        if self._stop_reason is not None and threading.current_thread() is threading.main_thread():
            self._main_thread_has_looked = True
        return self._stop_reason

    def ask(self, reason: str) -> None:
        """Ask the run to stop for another reason than a signal."""
        self._stop_reason = self._stop_reason or reason

    def arm_end_of_stuck_process(self, end_process: Callable[[str], None]) -> None:
        """From now on, end the process if its main thread does not read `signal_name` within 5 s of a request to stop.

        For the time before training, when it may be stuck in a library and has nothing to save. Two things can end it:

        - A thread of this process calls `end_process` with the name of the signal; it must end the process itself (`os._exit`).
        - If native code keeps the interpreter's lock, no thread can run. The watchdog, another process, then kills this one.

        `disarm_end_of_stuck_process` undoes it. Code that has something to save or to undo must not be running meanwhile.
        """
        self._end_process = end_process
        self._watchdog = Watchdog(self._stop_signals, STUCK_MAIN_THREAD_S)

    def disarm_end_of_stuck_process(self) -> None:
        """Undo `arm_end_of_stuck_process`: from here on there is something to save, so only the main thread ends the process."""
        self._end_process = None
        self._must_save.set()
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None

    def __enter__(self) -> StopRequest:
        """Block the signals in this process and everything it starts; from now on a daemon thread receives them."""
        # The mask of before, which `__exit__` restores: signals may have been blocked already.
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._stop_signals)
        # Handlers too: a library may lift the mask (CPython's resource tracker does), or a thread be older than the mask.
        self._handlers: dict[signal.Signals, Any] = {}
        for number in self._stop_signals:
            handler = self._handle_interrupt if number is signal.SIGINT else self._remember_first_signal
            self._handlers[number] = signal.signal(number, handler)
        self._start_receiving_thread()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening, and put handlers and mask back. After a request the handlers stay: the process is about to end."""
        self.disarm_end_of_stuck_process()
        self._closed.set()
        thread = self._receiving_thread
        if thread is not None and thread.is_alive() and thread.ident is not None:
            # The thread may wait for one of the signals. SIGUSR1, which is one of them, wakes it; it sees `_closed` and ends.
            signal.pthread_kill(thread.ident, signal.SIGUSR1)
            thread.join()
        if self._stop_reason is None:  # otherwise the process is about to end, and more signals must not change how
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _start_receiving_thread(self) -> None:
        """Start the thread that receives signals."""
        self._receiving_thread = threading.Thread(target=self._receive_signals, name="signals", daemon=True)
        self._receiving_thread.start()

    def _receive_signals(self) -> None:
        """Body of the waiting thread: receive signals, and remember the first one as the reason to stop.

        As long as there is nothing to save (`_end_process` is set), each signal also starts a timer that ends the process if its
        main thread is stuck. Ctrl-C is passed on to the main thread, where the second one can raise KeyboardInterrupt.
        """
        while True:
            # `sigwait` would take a signal in the kernel even if native code keeps this thread from running. So before training
            # the signals are polled: an unhandled one stays pending, which tells the watchdog that no thread runs.
            if not self._must_save.is_set() and signal.sigpending().isdisjoint(self._stop_signals):
                self._must_save.wait(PENDING_SIGNAL_POLL_S)
                continue
            # Not `sigtimedwait`: if the process was suspended past the deadline, CPython 3.11 returns uninitialised memory.
            number = signal.sigwait(self._stop_signals)
            if self._closed.is_set():
                return
            if self._end_process is not None:  # nothing to save yet
                self._end_process_later(signal.Signals(number).name)
            if number == signal.SIGINT:
                _thread.interrupt_main(signal.SIGINT)
            else:
                self._remember_first_signal(number, None)

    def _end_process_later(self, signal_name: str) -> None:
        """End the process in `STUCK_MAIN_THREAD_S`, unless the main thread looks at the request until then."""
        timer = threading.Timer(STUCK_MAIN_THREAD_S, self._end_process_if_stuck, args=(signal_name,))
        timer.daemon = True
        timer.start()

    def _end_process_if_stuck(self, signal_name: str) -> None:
        """End the process, if the main thread has not looked at the request, and there is nothing to save."""
        if self._end_process is not None and not self._main_thread_has_looked and not self._closed.is_set():
            self._end_process(signal_name)

    def _remember_first_signal(self, number: int, _: FrameType | None) -> None:
        """Remember the first signal that asked to stop. Also a signal handler."""
        self._stop_reason = self._stop_reason or signal.Signals(number).name

    def _handle_interrupt(self, number: int, frame: FrameType | None) -> None:
        """The handler of Ctrl-C: the first one asks to stop, the second raises KeyboardInterrupt."""
        if self._stop_reason == signal.Signals(signal.SIGINT).name:
            raise KeyboardInterrupt
        self._remember_first_signal(number, frame)
        self._stop_reason = signal.Signals(signal.SIGINT).name
        with suppress(OSError):  # the same Ctrl-C has ended the `tee` that reads it
            os.write(2, CTRL_C_MESSAGE)
