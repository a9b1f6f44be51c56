"""Extends the ranks' timeout while one of them waits for its disk.

An fsync returns when the disk has the bytes, and a parallel file system that fails over may take ten minutes for that.
The other ranks, which wait in a collective meanwhile, must not end the run by their timeout (`run.timeout_s`). A disk that
hangs for good must not go unnoticed either. So the wait has a limit, which grows with the bytes, and is reported each
minute.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from strategies.runtime import Runtime, longer_timeout

DISK_TIMEOUT_S = 900.0
"""Seconds in addition to `run.timeout_s` for a disk that does not answer at all."""
SLOWEST_DISK_BYTES_PER_S = 10e6
"""Bytes a second that the slowest supported disk takes."""
REPORT_INTERVAL_S = 60.0


@contextmanager
def waiting_for_disk(
    what_waits: str, size_bytes: float, runtime: Runtime, print_line: Callable[[str], None]
) -> Iterator[None]:
    """Give collectives a longer timeout inside the context, so that ranks do not give up one that waits for a slow disk.

    `what_waits`: such as `checkpoint step-000040`, for the line that is printed each minute. `size_bytes`: what all ranks write
    together, by which the timeout grows: 15 minutes, and 100 s for each GB. It makes no collective, but all ranks must enter it.
    """
    extra_s = DISK_TIMEOUT_S + size_bytes / SLOWEST_DISK_BYTES_PER_S
    finished = threading.Event()

    def report() -> None:
        """Say each minute that the ranks wait; the body of a thread."""
        waited_s = REPORT_INTERVAL_S
        limit = "as long as it takes"
        if runtime.world_size > 1:  # a single rank waits for nobody, and nobody for it
            limit = f"the ranks wait for each other up to {runtime.timeout_s + extra_s:.0f} s"
        while not finished.wait(REPORT_INTERVAL_S):
            print_line(f"{what_waits}: waiting for the disk for {waited_s:.0f} s; {limit}")
            waited_s += REPORT_INTERVAL_S

    threading.Thread(target=report, name="disk wait", daemon=True).start()
    try:
        with longer_timeout(runtime, extra_s):
            yield
    finally:
        finished.set()
