"""Makes processes end when the process that started them ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from strategies.compat.python import end_process


def die_with_parent(parent: int | None = None) -> None:
    """Ask Linux to kill this process when the one that started it dies, however it dies; `parent` is that one, if it is known."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:  # it died before the call above
        end_process(1)
