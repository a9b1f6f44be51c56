"""Keeps a checkpoint from being pruned while another process reads it: an export of a run that still trains takes hours.

A mark lies beside the checkpoint, and is touched now and then. The run that prunes leaves a checkpoint with a fresh mark
alone. A mark that nobody touches any more, because its process was killed, keeps nothing.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARK = ".{checkpoint}.in-use-{host}-{pid}"
TOUCH_INTERVAL_S = 60.0
MAX_MARK_AGE_S = 900.0
"""A mark that is older keeps nothing. Clocks of hosts differ, and a network file system may show a time that is minutes old."""


@contextmanager
def kept_from_pruning(checkpoint: Path) -> Iterator[None]:
    """Inside the context the run does not delete `checkpoint`, which another process reads, for example an export.

    A file beside the checkpoint, touched every `TOUCH_INTERVAL_S`, tells the run. If the directory cannot be written, nothing
    tells the run, which may then delete the checkpoint.
    """
    mark = checkpoint.with_name(MARK.format(checkpoint=checkpoint.name, host=socket.gethostname(), pid=os.getpid()))
    ended = threading.Event()

    def keep_fresh() -> None:
        while not ended.wait(TOUCH_INTERVAL_S):
            with suppress(OSError):
                mark.touch()

    try:
        mark.touch()
    except OSError:
        yield
        return
    thread = threading.Thread(target=keep_fresh, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):
            mark.unlink()


def is_in_use(checkpoint: Path) -> bool:
    """Whether some process reads a checkpoint, so that it must not be deleted now.

    A process that reads it keeps a mark beside it (`kept_from_pruning`), which is at most `MAX_MARK_AGE_S` old.
    """
    for mark in _marks_of(checkpoint):
        with suppress(OSError):  # removed meanwhile
            if _is_fresh(mark):
                return True
    return False


def remove_stale_marks(checkpoint: Path) -> None:
    """Remove the marks of processes that were killed while they read a checkpoint. An error leaves the mark where it is."""
    for mark in _marks_of(checkpoint):
        with suppress(OSError):
            if not _is_fresh(mark):
                mark.unlink()


def _marks_of(checkpoint: Path) -> list[Path]:
    return list(checkpoint.parent.glob(MARK.format(checkpoint=checkpoint.name, host="*", pid="*")))


def _is_fresh(mark: Path) -> bool:
    """Whether a mark was touched within the last `MAX_MARK_AGE_S`. Raises OSError if its age cannot be read."""
    return time.time() - mark.stat().st_mtime < MAX_MARK_AGE_S
