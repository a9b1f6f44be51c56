"""Processes that plans and preparations fork end with the one that forked them, however it ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.covering import chosen, values
from tests.helpers.launching import ROOT, clean_environment, ended
from tests.helpers.speed import seconds

FORKS = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from {module} import _start_worker
pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork"), initializer=_start_worker, initargs=(os.getpid(),))
print(pool.submit(os.getpid).result(), flush=True)
{more}
time.sleep(600)
"""
APART = """
import threading
from trainer.planner import fit_check
forked = multiprocessing.get_context("fork")  # in place of one that would import all that again
fit_check.multiprocessing.get_context = lambda kind: forked
said = lambda: print(os.getpid(), flush=True) or time.sleep(600)
threading.Thread(target=fit_check.call_in_process, args=(said, (), 600), daemon=True).start()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
@pytest.mark.parametrize(
    ("number", "module"),
    chosen(
        [(n, m) for n in (signal.SIGTERM, signal.SIGKILL) for m in ("trainer.planner.sweep", "trainer.data.worker")],
        values,
    ),
)
def test_forked_processes_end_with_a_parent_that_is_killed(module, number):
    more = APART if module == "trainer.planner.sweep" else ""
    command = [sys.executable, "-c", FORKS.format(module=module, more=more)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=clean_environment()) as parent:
        assert parent.stdout is not None
        children = [int(parent.stdout.readline()) for _ in range(2 if more else 1)]
        os.kill(parent.pid, number)
        parent.wait()
    end = time.monotonic() + seconds(20)
    while left := [child for child in children if not ended(child)]:
        if time.monotonic() > end:
            for child in left:
                os.kill(child, signal.SIGKILL)
            pytest.fail(f"processes {left} live on")
        time.sleep(0.05)
