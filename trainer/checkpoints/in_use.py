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
TOUCH_EVERY_S = 60.0
FRESH_S = 900.0
"""A mark that is older keeps nothing. Clocks of hosts differ, and a network file system may show a time that is minutes old."""


@contextmanager
def kept_from_pruning(checkpoint: Path) -> Iterator[None]:
    """Inside the context the run does not delete `checkpoint`, which another process reads, for example an export.

    A file beside it, touched every few seconds, tells the run. If the directory cannot be written, nothing keeps it.
    """
    mark = checkpoint.with_name(MARK.format(checkpoint=checkpoint.name, host=socket.gethostname(), pid=os.getpid()))
    ended = threading.Event()

    def keep_fresh() -> None:
        while not ended.wait(TOUCH_EVERY_S):
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

    Readers keep a file beside it, the mark, and touch it now and then (`kept_from_pruning`). Marks that nobody has touched for
    long are left over from killed readers, and are removed.
    """
    in_use = False
    for mark in checkpoint.parent.glob(MARK.format(checkpoint=checkpoint.name, host="*", pid="*")):
        with suppress(OSError):
            if time.time() - mark.stat().st_mtime < FRESH_S:
                in_use = True
            else:
                mark.unlink()
    return in_use
