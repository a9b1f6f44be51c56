"""Collectives through the host's memory against gloo's own, on three ranks: `python -m tests.strategies.exchange_job <dir>`."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from strategies import host_memory
from strategies import runtime as processes
from strategies.deepspeed_library import SharedMemoryBackend, gradient_norm_over_ranks
from strategies.host_memory import HostMemory, open_host_memory

SIZES = (1, 5, 300, 4099)
"""From less than a slot of a rank to several, and no multiples of it or of the number of ranks."""


def differences(memory: HostMemory, group, ranks: int) -> dict[str, float]:
    """{collective and type: largest relative difference from gloo's result}."""
    found: dict[str, float] = {}
    for size in SIZES:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            whole = torch.randn(size * ranks, generator=torch.Generator().manual_seed(dist.get_rank())).to(dtype)
            part = whole[:size].clone()
            pairs = {}
            for average in (False, True):
                exact = whole.to(torch.float64, copy=True)
                dist.all_reduce(exact, group=group)
                exact /= ranks if average else 1
                ours = whole.clone()
                memory.all_reduce(ours, average=average)
                pairs[f"all_reduce {average}"] = ours, exact
                scattered = torch.empty_like(part)
                memory.reduce_scatter(scattered, whole, average=average)
                pairs[f"reduce_scatter {average}"] = scattered, exact.chunk(ranks)[memory.rank]
            gathered = [torch.empty_like(part) for _ in range(ranks)]
            dist.all_gather(gathered, part, group=group)
            for way in ("copied", "in place"):
                ours = torch.empty_like(whole)
                own = ours.view(ranks, -1)[memory.rank]
                memory.all_gather(ours, own.copy_(part) if way == "in place" else part)
                pairs[f"all_gather {way}"] = ours, torch.cat(gathered)
            for name, (ours, expected) in pairs.items():
                apart = float((ours.double() - expected).abs().max() / expected.abs().max())
                found[f"{name} {dtype}"] = max(found.get(f"{name} {dtype}", 0.0), apart)
    return found


def same_everywhere(memory: HostMemory) -> bool:
    """Whether every rank holds the same bits after an all-reduce."""
    values = torch.randn(5000, generator=torch.Generator().manual_seed(dist.get_rank()))
    memory.all_reduce(values, average=True)
    first = values.clone()
    dist.broadcast(first, src=0)
    return torch.equal(first, values)


def refusals(runtime: processes.Runtime) -> dict[str, bool]:
    """{reason: whether every rank goes without}, where one rank alone has the reason."""
    odd, found = runtime.rank == 1, {}
    reasons = {
        "no memory file": ("_create_region", lambda: None),
        "another host": ("_process_namespace", lambda: "elsewhere"),
        "cannot be mapped": ("_map_regions", lambda _offers: None),
    }
    for reason, (name, replacement) in reasons.items():
        before = getattr(host_memory, name)
        if odd:
            setattr(host_memory, name, replacement)
        found[reason] = open_host_memory(runtime) is None
        setattr(host_memory, name, before)
    found["forbidden"] = open_host_memory(replace(runtime, shared_memory=False)) is None
    return found


class Backend:
    """What DeepSpeed's backend would be asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getattr__(self, name: str):
        return lambda *_args, **_kwargs: self.asked.append(name)


def left_to_deepspeed(memory: HostMemory) -> list[str]:
    """The collectives that do not go through the memory."""
    backend = Backend()
    exchange, large, small = SharedMemoryBackend(backend, memory), torch.ones(3, 4096), torch.ones(3)
    exchange.all_reduce(large, dist.ReduceOp.SUM)
    exchange.all_gather_into_tensor(large, torch.ones(4096)).wait()
    exchange.reduce_scatter_tensor(torch.ones(4096), large, dist.ReduceOp.AVG).wait()
    assert not backend.asked
    exchange.all_reduce(small)
    exchange.all_reduce(large, dist.ReduceOp.MAX)
    exchange.all_gather_into_tensor(small, torch.ones(1))
    exchange.reduce_scatter_tensor(torch.ones(1), small)
    exchange.broadcast(large, src=0)
    return backend.asked


def compared(here: processes.Runtime, directory: Path) -> None:
    """Write what this rank found. Memory and groups go with it: a group that outlives `stop` is torn down with the interpreter,
    and now and then a thread of gloo ends the process then (pytorch/pytorch issue 190489)."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    standard = open_host_memory(here)
    assert standard is not None
    host_memory._SLOT_BYTES = 4096  # several portions of what is small
    small = open_host_memory(here)
    opened = len(list(Path("/proc/self/fd").iterdir())) - before
    pair = dist.new_group([0, 2])
    report = {
        "all": differences(small, None, here.world_size),
        "bits": same_everywhere(standard) and same_everywhere(small),
        "descriptors": opened,
        "refused": refusals(here),
        "left to DeepSpeed": left_to_deepspeed(standard),
    }
    host_memory._CPU_KEEPS_STORE_ORDER = False  # a processor whose cores may see stores in another order
    report["barrier"] = differences(small, None, here.world_size)
    host_memory._CPU_KEEPS_STORE_ORDER = True
    if here.rank != 1:
        report["pair"] = differences(open_host_memory(here, pair), pair, 2)
    norms = [
        float(gradient_norm_over_ranks(grads, []))
        for grads in ([torch.full((9,), 1.0 + here.rank)], [torch.tensor([1e30])])
    ]
    report["norms"] = norms
    (directory / f"rank{here.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    here = processes.join_job("cpu", timeout_s=60, threads=1)
    compared(here, directory)
    processes.barrier(here)
    processes.leave_job()
