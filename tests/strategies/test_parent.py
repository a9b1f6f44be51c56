"""Processes that plans and preparations fork end with the one that forked them, however it ends."""

import os
import signal
import sys
import time

import pytest

from tests.helpers.launching import clean_environment, ended
from tests.helpers.speed import seconds
from tests.helpers.warm import heard


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
@pytest.mark.parametrize("module", ["trainer.forecast.sweep", "trainer.data.maker"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_forked_ends_with_a_parent_that_is_killed(module, number):
    parent, said = heard([sys.executable, "-m", "tests.strategies.forking_job", module], clean_environment())
    child = int(said.readline())
    parent.send_signal(number)
    parent.wait()
    end = time.monotonic() + seconds(20)
    while time.monotonic() < end:
        if ended(child):
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail(f"process {child} lives on")
