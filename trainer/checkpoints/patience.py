"""How long ranks wait for a rank that waits for its disk.

An fsync returns when the disk has the bytes, and a parallel file system that fails over may take ten minutes for
that. Ranks that wait must not end the run by their timeout (`run.timeout_s`). A disk that hangs for good must not go
unnoticed either: the wait has a limit, which grows with the bytes, and is reported each minute.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from strategies.runtime import Runtime, longer_timeout

DISK_S = 900.0
"""Seconds beside `run.timeout_s` for a disk that does not answer at all."""
SLOWEST = 10e6
"""Bytes a second that the slowest disk takes."""
TOLD_EVERY_S = 60.0


@contextmanager
def waiting_for_disk(what: str, size: float, runtime: Runtime, say: Callable[[str], None]) -> Iterator[None]:
    """Meanwhile the ranks have patience with a disk that takes `size` bytes of all ranks; `what` is said each minute.

    No collective; all ranks are to enter.
    """
    more_s = DISK_S + size / SLOWEST
    over = threading.Event()

    def tell() -> None:
        waited_s = TOLD_EVERY_S
        limit = "as long as it takes"
        if runtime.world_size > 1:
            limit = f"the ranks wait for each other up to {runtime.timeout_s + more_s:.0f} s"
        while not over.wait(TOLD_EVERY_S):
            say(f"{what}: waiting for the disk for {waited_s:.0f} s; {limit}")
            waited_s += TOLD_EVERY_S

    threading.Thread(target=tell, name="patience", daemon=True).start()
    try:
        with longer_timeout(runtime, more_s):
            yield
    finally:
        over.set()
