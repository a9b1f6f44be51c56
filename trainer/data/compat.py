"""What data preparation uses of Python's process pools beside their public interface. Read in Python 3.11 and 3.13."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor


def close_own_writer(pool: ProcessPoolExecutor) -> None:
    """Close this process's end of the pipe by which workers hand over results, so that reading ends when they are gone.

    Closes `ProcessPoolExecutor._result_queue._writer`. The pool keeps that end open, though it never writes. A worker that is
    killed amid a large result leaves half of it in the pipe, and the pool then reads for ever. `shutdown` waits for the same
    thread, and no argument gives it up.
    """
    pool._result_queue._writer.close()  # type: ignore[attr-defined]
