"""`shardtune compare --follow`: rewrites the pages while runs train."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

from strategies.errors import ShardtuneError
from trainer.reporting.status import State

EVERY_S = 5.0
"""Seconds between two pages; a browser reads the page anew as often."""
QUIET_S = 120.0
"""Seconds after the last sign of life of any run in which those that have not begun may still."""
Write = Callable[[float | None], None]
"""Writes the answer; takes how often a browser is to read it anew, None for the last time."""


def follow(directories: list[Path], write: Write) -> None:
    """Write again and again until all runs have ended; the answer that follows is the last page. Errors: KeyboardInterrupt."""
    heard = monotonic()
    try:
        while True:
            works, may_begin = _standing(directories)
            heard = monotonic() if works else heard
            if not works and (not may_begin or monotonic() - heard > QUIET_S):
                return
            with suppress(ShardtuneError):  # of a file that is just being written; the answer would say it
                write(EVERY_S)
            sleep(EVERY_S)
    except KeyboardInterrupt:
        with suppress(ShardtuneError):
            write(None)  # nobody writes it any more
        raise


def _standing(directories: list[Path]) -> tuple[bool, bool]:
    """Whether any run works or waits in the queue, and whether any has not begun."""
    from launch.runs.queue import ask
    from launch.runs.status import NOT_STARTED, QUEUED, look

    queue = ask()
    states = {look(directory, queue).state for directory in directories}
    return bool(states & {State.running, QUEUED}), NOT_STARTED in states


class Meanwhile:
    """Pages of points that this process runs: `look` is called often, and writes when it is time."""

    def __init__(self, write: Write) -> None:
        self._write, self._next = write, monotonic() + EVERY_S

    def look(self) -> None:
        """Write, if it is time; what goes wrong meanwhile is left to the last page."""
        if monotonic() < self._next:
            return
        with suppress(ShardtuneError):
            self._write(EVERY_S)
        self._next = monotonic() + EVERY_S
