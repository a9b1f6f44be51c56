"""`shardtune compare --follow`: rewrites the pages while runs train."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

from strategies.errors import ShardtuneError
from trainer.reporting.status import State

PAGE_INTERVAL_S = 5.0
"""Seconds between two pages; a browser reads the page anew as often."""
QUIET_S = 120.0
"""Seconds after the last sign of life of any run in which those that have not begun may still."""
WritePage = Callable[[float | None], None]
"""Writes the page. Takes the seconds after which a browser reloads it; None for the last page."""


def follow(directories: list[Path], write: WritePage) -> None:
    """Write the page every few seconds until all runs have ended; the caller writes the last one. Errors: KeyboardInterrupt."""
    last_active = monotonic()
    try:
        while True:
            any_active, any_pending = _any_active_or_pending(directories)
            if any_active:
                last_active = monotonic()
            is_quiet = monotonic() - last_active > QUIET_S
            if not any_active and (is_quiet or not any_pending):
                return
            with suppress(ShardtuneError):  # of a file that is just being written; the answer would say it
                write(PAGE_INTERVAL_S)
            sleep(PAGE_INTERVAL_S)
    except KeyboardInterrupt:
        with suppress(ShardtuneError):
            write(None)  # nobody writes it any more
        raise


def _any_active_or_pending(directories: list[Path]) -> tuple[bool, bool]:
    """Whether any run works or waits in the queue, and whether any has not begun."""
    from launch.runs.queue import read_queue
    from launch.runs.status import NOT_STARTED, QUEUED, read_run_view

    queue = read_queue()
    states = {read_run_view(directory, queue).state for directory in directories}
    return bool(states & {State.running, QUEUED}), NOT_STARTED in states


class PeriodicPage:
    """The page of points that this process runs, rewritten every few seconds: `write_if_due` is called much more often."""

    def __init__(self, write: WritePage) -> None:
        self._write = write
        self._next_write = monotonic() + PAGE_INTERVAL_S

    def write_if_due(self) -> None:
        """Write the page if it is time to. An error is ignored: the last page, or the answer, will report it."""
        if monotonic() < self._next_write:
            return
        with suppress(ShardtuneError):
            self._write(PAGE_INTERVAL_S)
        self._next_write = monotonic() + PAGE_INTERVAL_S
