"""Bounds on what a chat template may take: it is a program that came with somebody's model."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SECONDS = 30
"""Processor seconds for one call: thousands of times what a batch of conversations takes."""
BYTES = 4 * 2**30
"""Memory that one call may add to its process."""


class TooMuch(Exception):
    """A call went past a bound; says which."""


@contextmanager
def bounded() -> Iterator[None]:
    """Raise TooMuch where the body takes more. The time is bounded in a process's main thread only, memory anywhere."""
    watched = threading.current_thread() is threading.main_thread()
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    least = [limit for limit in (before, _size() + BYTES) if limit != resource.RLIM_INFINITY]
    if watched:
        handler = signal.signal(signal.SIGVTALRM, _late)
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (min(least), hard))
        yield
    except MemoryError as error:
        raise TooMuch(f"wanted more than {BYTES / 2**30:.3g} GiB of memory") from error
    except _Late as error:
        raise TooMuch(f"took more than {SECONDS:g} seconds") from error
    finally:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (before, hard))
        if watched:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, handler)


class _Late(Exception):
    pass


def _late(*_: Any) -> None:
    raise _Late


def _size() -> int:
    """Bytes of address space that this process has."""
    with Path("/proc/self/statm").open("rb", buffering=0) as file:
        return int(file.read(32).split()[0]) * os.sysconf("SC_PAGESIZE")
