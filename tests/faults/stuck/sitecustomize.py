"""Lets a process stand still in native code before it trains, in every process of a run whose PYTHONPATH has this directory.

STUCK_IN names the function of `trainer.run` that never returns, STUCK_MARK a file that gets a line when a process stands still.
With STUCK_ALONE the call keeps the interpreter's lock, as the tokenizers library does when it encodes a text: no other thread
of the process runs any more.
"""

import ctypes
import os
from pathlib import Path

import trainer.run

FOREVER_S = 600


def stand_still(*_, **__):
    with Path(os.environ["STUCK_MARK"]).open("a") as mark:
        mark.write(f"{os.getpid()}\n")
    library = ctypes.PyDLL(None) if os.environ.get("STUCK_ALONE") else ctypes.CDLL(None)
    library.sleep(FOREVER_S)


setattr(trainer.run, os.environ["STUCK_IN"], stand_still)
