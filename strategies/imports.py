"""Imports of large libraries, without a search for garbage after each few hundred objects."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing_without_gc(module: str, *, freeze: bool = True) -> Iterator[None]:
    """A context around the import of `module`, in which Python does not look for garbage; nothing if it is imported already.

    The 3,600 modules of a start make objects that nearly all stay. Python would look through them 1,200 times, which takes a
    fifth of the start. `freeze`: later searches leave out all objects that there are at the end (`gc.freeze`); garbage that was
    there before is taken away first. False where a model may be among them: it is part of cycles, and would never be freed.
    """
    if module in sys.modules or not gc.isenabled():
        yield
        return
    if freeze:
        gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        if freeze:
            gc.freeze()
