"""Strategies against `single`, a case at a time, in ranks that stay up: `tests/helpers/ranks.py` starts `serve` in each.

A part is a module or a function; a case is a part's function and its arguments. The assertions stand in the tests.
"""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from deepspeed.utils import nvtx

from strategies import runtime as processes
from strategies.matmul import Matmul
from tests.helpers import uncompiled
from tests.helpers.ranks import serve
from tests.parity.base import Job

PARTS = (
    *("matrix", "methods", "features", "optimizers", "bases", "pairs", "two_sides", "teachers", "experts"),
    *(
        "guards",
        "remedies",
        "resuming",
        "sequences",
        "verifying",
        "pooled",
        "rounds",
        "reward_models",
        "dealt",
        "expert_layers",
    ),
)


def main(directory: Path) -> None:
    """Answer `(part, function, *arguments)` until nobody asks any more."""
    # Not the faster one: which that is, is a matter of the processor and of what else runs.
    products = Matmul.blas if os.environ["WORLD_SIZE"] == "2" else Matmul.onednn
    runtime = processes.join_job("cpu", timeout_s=600, threads=1, matmul=products)
    uncompiled.as_written(load=True)
    nvtx.enable_nvtx = False  # marks around each call of DeepSpeed, for a profiler
    job = Job(directory, runtime)

    def answer(part: str, function: str, *arguments: Any) -> Any:
        assert part in PARTS, part
        return getattr(importlib.import_module(f"tests.parity.{part}"), function)(job, *arguments)

    serve(answer)
    processes.leave_job()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
