"""Forks workers as plans and preparations do, prints their numbers, and waits to be killed.

`python -m tests.strategies.forking_job <module> [apart]`: the module whose workers it forks; with `apart`, also a process that
simulates apart from a run.
"""

import importlib
import multiprocessing
import os
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor

from trainer.stopping.signals import unblock_signals


def say_and_wait() -> None:
    print(os.getpid(), flush=True)
    time.sleep(600)


def main(module: str, *more: str) -> None:
    unblock_signals()  # what forked this process may have held the signals that are to end it
    forked = multiprocessing.get_context("fork")
    start_worker = importlib.import_module(module)._start_worker
    pool = ProcessPoolExecutor(1, mp_context=forked, initializer=start_worker, initargs=(os.getpid(),))
    print(pool.submit(os.getpid).result(), flush=True)
    if more == ("apart",):
        from trainer.planner import fit_check

        fit_check.multiprocessing.get_context = lambda kind: forked  # in place of one that would import all that again
        threading.Thread(target=fit_check.call_in_process, args=(say_and_wait, (), 600), daemon=True).start()
    time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])
