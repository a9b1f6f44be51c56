"""How slow this machine is at what tests do: limits in seconds are scaled by it, so that none is met for being slow."""

import os
import time
from functools import lru_cache

REFERENCE_S = 0.2
"""Seconds of `work` on one idle core of an AMD EPYC of the Zen 4 generation."""
SPARE = 2.0
"""For what else runs here: limits are for runs that hang, not a measure of speed."""


def work() -> None:
    """Interpreted code, small tensors and file reads in the shares that a test has them."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(8)))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(120):
        model(torch.ones(64, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    sum(hash(f"{number}") % 7 for number in range(600_000))


@lru_cache
def slowness() -> float:
    """Seconds that this machine takes for one of the reference's, at least 1; measured once a session, by wall clock."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    work()  # the first pass loads code
    start = time.perf_counter()
    work()
    taken = time.perf_counter() - start
    torch.set_num_threads(threads)
    return max(1.0, taken / REFERENCE_S) * float(os.environ.get("SHARDTUNE_TEST_PATIENCE", "1"))


def seconds(limit: float) -> float:
    """A limit for a machine like the reference's, scaled to this one, with something to spare."""
    return limit * SPARE * slowness()
