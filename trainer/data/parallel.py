"""Many processes, one order: a function over items in forked workers, results in the order of the items."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from typing import Any, TypeVar

from strategies.errors import ShardtuneError

Item = TypeVar("Item")
Result = TypeVar("Result")

_function: Callable[[Any], Any] | None = None


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], *, workers: int) -> Iterator[Result]:
    """Results of `function` in the order of `items`, of which few more are taken than there are workers.

    `workers` processes are forked from this one, so that `function` may hold anything; with fewer than 2 it runs here.
    An exception of the function is raised here, and ends the workers; a worker that dies raises ShardtuneError.
    """
    if workers < 2:
        yield from map(function, items)
        return
    global _function
    _function = function
    others = set(active_children())
    pool = ProcessPoolExecutor(workers, mp_context=get_context("fork"), initializer=_begin, initargs=(os.getpid(),))
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_call, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        # The pool's own SIGTERM does nothing where a stop may be asked for: such processes hold it back.
        for worker in set(active_children()) - others:
            worker.kill()
        raise ShardtuneError(
            "a worker process of the data preparation was killed; SIGKILL often means that the host ran out of memory: "
            "set data.workers lower"
        ) from error
    finally:
        _function = None
        with _uninterrupted():
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C does nothing for these seconds: a pool interrupted while it ends waits for its workers for ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _begin(parent: int) -> None:
    """In a new worker: end with the parent, who alone is interrupted, and leave the cores to the other workers."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call above
            os._exit(1)


def _call(item: Any) -> Any:
    assert _function is not None, "set before the workers were forked"
    return _function(item)
