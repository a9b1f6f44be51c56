"""Strategies against `single`, a case at a time, in ranks that stay up: `tests/helpers/ranks.py` starts `serve` in each.

A part is a module or a function; a case is a part's function and its arguments. The assertions stand in the tests.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

from strategies import runtime as processes
from tests.helpers.ranks import serve
from tests.parity.base import Job

PARTS = ("matrix", "methods", "features", "optimizers", "bases", "pairs", "two_sides", "teachers")


def main(directory: Path) -> None:
    """Answer `(part, function, *arguments)` until nobody asks any more."""
    runtime = processes.start("cpu", timeout_s=600, threads=1)
    job = Job(directory, runtime)

    def answer(part: str, function: str, *arguments: Any) -> Any:
        assert part in PARTS, part
        return getattr(importlib.import_module(f"tests.parity.{part}"), function)(job, *arguments)

    serve(answer)
    processes.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
