"""`shardtune compare --follow`: rewrites the pages while runs train."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

from strategies.errors import ShardtuneError
from trainer.reporting.status import RunState

PAGE_INTERVAL_S = 5.0
"""Seconds between two versions of the page; a browser reloads it as often."""
MAX_QUIET_S = 120.0
"""Seconds without any active run after which runs that have not begun are no longer waited for."""
WritePage = Callable[[float | None], None]
"""Writes the page. Takes the seconds after which a browser reloads it; None for the last page."""


def rewrite_page_while_runs_train(run_dirs: list[Path], write_page: WritePage) -> None:
    """Keep the page of runs up to date while they train: write it every few seconds, and return when all runs have ended.

    `write_page`: takes the seconds after which a browser reloads the page, None for a last page. The caller writes the last
    version.

    Runs that have not begun are waited for while another run is active, and `MAX_QUIET_S` seconds longer. On Ctrl-C a last
    page is written and KeyboardInterrupt raised.
    """
    last_active_at = monotonic()
    try:
        while True:
            any_active, any_not_begun = _are_any_active_or_not_begun(run_dirs)
            if any_active:
                last_active_at = monotonic()
            is_quiet = monotonic() - last_active_at > MAX_QUIET_S
            if not any_active and (is_quiet or not any_not_begun):
                return
            # A file may just be being written. Whatever is wrong for good, the comparison at the end reports.
            with suppress(ShardtuneError):
                write_page(PAGE_INTERVAL_S)
            sleep(PAGE_INTERVAL_S)
    except KeyboardInterrupt:
        with suppress(ShardtuneError):
            write_page(None)  # the browser must stop reloading a page that nobody writes any more
        raise


def _are_any_active_or_not_begun(run_dirs: list[Path]) -> tuple[bool, bool]:
    """How the runs stand: (whether any trains or waits in SLURM's queue, whether any has not begun)."""
    from launch.runs.queue import read_queue
    from launch.runs.status import NOT_STARTED, QUEUED, read_run_view

    queue = read_queue()
    states = {read_run_view(run_dir, queue).state for run_dir in run_dirs}
    return bool(states & {RunState.running, QUEUED}), NOT_STARTED in states


class PeriodicPage:
    """The page of points that this process runs, rewritten every few seconds: `write_if_due` is called much more often."""

    def __init__(self, write_page: WritePage) -> None:
        self._write_page = write_page
        self._next_write_at = monotonic() + PAGE_INTERVAL_S

    def write_if_due(self) -> None:
        """Write the page if `PAGE_INTERVAL_S` have passed. Errors are ignored: the comparison at the end reports them."""
        if monotonic() < self._next_write_at:
            return
        with suppress(ShardtuneError):
            self._write_page(PAGE_INTERVAL_S)
        self._next_write_at = monotonic() + PAGE_INTERVAL_S
