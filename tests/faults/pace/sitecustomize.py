"""Lets a run rest after each step, in every process of it whose PYTHONPATH has this directory.

Training is the same, but a test that looks at a run at work, or waits for another one, does not pay for thousands of steps.
Where PACE_GATE names a file, no step follows the first one before that file is there.
"""

import os
import time
from pathlib import Path

from trainer.records.jsonl import JsonlTracker

PAUSE_S = 0.1
GATE = Path(os.environ.get("PACE_GATE") or "/")
_log = JsonlTracker.log


def log(self, metrics, *, step):
    _log(self, metrics, step=step)
    time.sleep(PAUSE_S)
    while not GATE.exists():
        time.sleep(PAUSE_S)


JsonlTracker.log = log
