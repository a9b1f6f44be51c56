"""Imports of large libraries, without a search for garbage after each few hundred objects."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing(module: str) -> Iterator[None]:
    """Within it Python does not look for garbage, if `module` is still to be imported; what is there afterwards is kept.

    The 3,600 modules of a start make objects that nearly all stay. Python would look through them 1,200 times, which takes a
    fifth of the start. Later searches leave out what is there at the end (`gc.freeze`). Garbage that was there before, of a
    notebook for example, is taken away first.
    """
    if module in sys.modules or not gc.isenabled():
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
