"""Processes that plans and preparations fork end with the one that forked them, however it ends."""

import os
import signal
import sys
import time

import pytest

from tests.helpers.covering import chosen, values
from tests.helpers.launching import clean_environment, ended
from tests.helpers.speed import seconds
from tests.helpers.warm import heard


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
@pytest.mark.parametrize(
    ("number", "module"),
    chosen(
        [(n, m) for n in (signal.SIGTERM, signal.SIGKILL) for m in ("trainer.planner.sweep", "trainer.data.worker")],
        values,
    ),
)
def test_forked_processes_end_with_a_parent_that_is_killed(module, number):
    more = ["apart"] if module == "trainer.planner.sweep" else []
    parent, lines = heard([sys.executable, "-m", "tests.strategies.forking_job", module, *more], clean_environment())
    with lines:
        children = [int(lines.readline()) for _ in range(2 if more else 1)]
        parent.send_signal(number)
        parent.wait(seconds(60))
    end = time.monotonic() + seconds(20)
    while left := [child for child in children if not ended(child)]:
        if time.monotonic() > end:
            for child in left:
                os.kill(child, signal.SIGKILL)
            pytest.fail(f"processes {left} live on")
        time.sleep(0.05)
