"""A process that forks another as plans and preparations do: `python -m tests.strategies.forking_job <module>`."""

import importlib
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor

if __name__ == "__main__":
    begin = importlib.import_module(sys.argv[1])._begin
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(1, mp_context=context, initializer=begin, initargs=(os.getpid(),))
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(600)
