"""Keeps a checkpoint from being pruned while another process reads it: an export of a run that still trains takes hours.

The process that reads puts a mark (an empty file) beside the checkpoint, and touches it every minute. The run that prunes leaves
a checkpoint with a fresh mark alone. A mark that nobody touches any more, because its process was killed, keeps nothing.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARK_FILE_FORMAT = ".{checkpoint}.in-use-{host}-{pid}"
"""Such as `.step-000040.in-use-node7-4711`."""
TOUCH_INTERVAL_S = 60.0
MAX_MARK_AGE_S = 900.0
"""A mark that is older keeps nothing. Clocks of hosts differ, and a network file system may show a time that is minutes old."""


@contextmanager
def marked_as_in_use(checkpoint: Path) -> Iterator[None]:
    """Keep a training run from deleting `checkpoint` inside the context, in which this process reads it, say to export it.

    An empty file beside the checkpoint, the mark, tells the run; a thread touches it every minute to say that this process still
    lives. If the directory cannot be written there is no mark, and the run may delete the checkpoint.
    """
    mark = checkpoint.with_name(
        MARK_FILE_FORMAT.format(checkpoint=checkpoint.name, host=socket.gethostname(), pid=os.getpid())
    )
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


def is_read_by_another_process(checkpoint: Path) -> bool:
    """Whether some process reads a checkpoint, so that it must not be deleted now.

    A process that reads it, on any host, has a mark file beside it (`marked_as_in_use`), which it touches every minute. A mark
    older than `MAX_MARK_AGE_S` belongs to a process that was killed, and does not count.
    """
    for mark in _reader_marks_of(checkpoint):
        with suppress(OSError):  # the reader has finished meanwhile, and removed its mark
            if _was_touched_recently(mark):
                return True
    return False


def remove_stale_reader_marks(checkpoint: Path) -> None:
    """Remove the marks of processes that were killed while they read a checkpoint. An error leaves the mark where it is."""
    for mark in _reader_marks_of(checkpoint):
        with suppress(OSError):
            if not _was_touched_recently(mark):
                mark.unlink()


def _reader_marks_of(checkpoint: Path) -> list[Path]:
    """The mark files beside a checkpoint, of readers on any host."""
    return list(checkpoint.parent.glob(MARK_FILE_FORMAT.format(checkpoint=checkpoint.name, host="*", pid="*")))


def _was_touched_recently(mark: Path) -> bool:
    """Whether a mark was touched within the last `MAX_MARK_AGE_S`. Raises OSError if its age cannot be read."""
    return time.time() - mark.stat().st_mtime < MAX_MARK_AGE_S
