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
from {module} import _begin
pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork"), initializer=_begin, initargs=(os.getpid(),))
print(pool.submit(os.getpid).result(), flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
@pytest.mark.parametrize(
    ("number", "module"),
    chosen(
        [(n, m) for n in (signal.SIGTERM, signal.SIGKILL) for m in ("trainer.forecast.sweep", "trainer.data.maker")],
        values,
    ),
)
def test_what_was_forked_ends_with_a_parent_that_is_killed(module, number):
    command = [sys.executable, "-c", FORKS.format(module=module)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=clean_environment()) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(parent.pid, number)
        parent.wait()
    end = time.monotonic() + seconds(20)
    while time.monotonic() < end:
        if ended(child):
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail(f"process {child} lives on")
