"""Bounds the processor time and memory of a call of a chat template, which is a program that came with somebody's model."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MAX_CPU_SECONDS = 30
"""Processor seconds for one call of a template: thousands of times what a batch of conversations takes."""
MAX_EXTRA_BYTES = 4 * 2**30
"""Memory that one call may add to its process."""


class TemplateLimitExceeded(BaseException):
    """A call of a template, which is a program that came with somebody's model, went past a bound; says which.

    No Exception: a template that refuses one rendering is tried with another, and one that went past a bound must not be.
    """


@contextmanager
def template_resource_limits() -> Iterator[None]:
    """Bound what the body, a call of a chat template, may use: memory everywhere, and processor time in the main thread.

    A template is a program that came with somebody's model, and may loop or multiply. Raises TemplateLimitExceeded if it takes
    too much. Signals reach the main thread of a process only, so time is not bounded in other threads. Sets the limit of the
    address space and a timer, and restores both.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
    # The first number of statm is the process's address space, to which the limit applies.
    used_pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    max_bytes = used_pages * resource.getpagesize() + MAX_EXTRA_BYTES
    if soft_limit != resource.RLIM_INFINITY:
        max_bytes = min(max_bytes, soft_limit)
    if is_main_thread:
        handler = signal.signal(signal.SIGVTALRM, _on_time_limit)
        # It counts the processor time of this process in user mode, and then sends SIGVTALRM.
        signal.setitimer(signal.ITIMER_VIRTUAL, MAX_CPU_SECONDS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, hard_limit))
        yield
    except MemoryError as error:
        raise TemplateLimitExceeded(f"wanted more than {MAX_EXTRA_BYTES / 2**30:.3g} GiB of memory") from error
    finally:
        # An error here would hide that of the body.
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (soft_limit, hard_limit))
        if is_main_thread:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, handler)


def _on_time_limit(*_: Any) -> None:
    """The handler of SIGVTALRM, which comes when the processor time is used up."""
    raise TemplateLimitExceeded(f"took more than {MAX_CPU_SECONDS:g} seconds")
