"""bitsandbytes' numbers without its compiler: on a CPU without AVX-512 it compiles C++ for each shape of weight.

That takes seconds for each, and is what the library does with its own functions; `make test-all` lets it.
"""

import sys
from importlib.util import find_spec
from typing import Any

import pytest

from tests.helpers.covering import EVERYTHING
from trainer.tuning.compat.peft import load_peft


def bitsandbytes() -> Any:
    """The package, imported without torch's compiler, which it asks for at once; skips the file where it is not installed."""
    load_peft()
    return pytest.importorskip("bitsandbytes")


def as_written(*, load: bool = False) -> None:
    """Have bitsandbytes, where it is loaded (or with `load` installed), call its functions as they are written."""
    if EVERYTHING or not ("bitsandbytes" in sys.modules or (load and find_spec("bitsandbytes"))):
        return
    load_peft()
    from bitsandbytes.backends.default import ops

    for name, function in vars(ops).copy().items():
        if name.endswith("_compute") and hasattr(function, "__wrapped__"):
            setattr(ops, name, function.__wrapped__)
