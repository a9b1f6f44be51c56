"""What two ranks exchange in a step of each strategy, counted in two ways: `python -m tests.strategies.exchanged_job <dir>`."""

import json
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from strategies import runtime as processes
from strategies.build import build_strategy
from strategies.communication_counters import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, count_communication
from strategies.matmul import Matmul
from strategies.runtime import Runtime
from tests.simulated.cases import LENGTHS, Case, Zeros
from trainer.planner.minimal_step import build_step_batch, minimal_trainer
from trainer.planner.simulation import build_step_parts

CASES = {
    "ddp": Case("ddp", "full", "bf16", "none", False, 2),
    "fsdp2": Case("fsdp2", "full", "bf16", "selective", False, 2),
    "fsdp2 lora": Case("fsdp2", "lora", "fp32", "full"),
    "hsdp": Case("hsdp", "full", "bf16"),
    "zero1": Case("zero1", "full", "fp32", "full"),
    "zero2 lora": Case("zero2", "lora", "bf16", "none", False, 2),
    "zero3": Case("zero3", "full", "bf16", "none", False, 2),
    "zero3 lora": Case("zero3", "lora", "fp32", "full"),
}
METHODS = {
    **dict.fromkeys(("allgather", "allgather_coalesced", "_allgather_base"), ALL_GATHER),
    **dict.fromkeys(
        ("all_gather_single", "all_gather_single_coalesced", "allgather_into_tensor_coalesced"), ALL_GATHER
    ),
    **dict.fromkeys(("allreduce", "allreduce_coalesced"), ALL_REDUCE),
    **dict.fromkeys(("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced"), REDUCE_SCATTER),
    **dict.fromkeys(("reduce_scatter_single", "reduce_scatter_single_coalesced"), REDUCE_SCATTER),
    **{name: name for name in ("broadcast", "reduce", "gather", "scatter")},
}
"""Methods by which Python calls a process group."""


def num_bytes(argument) -> int:
    if isinstance(argument, Tensor):
        return argument.nbytes
    return sum(map(num_bytes, argument)) if isinstance(argument, list | tuple) else 0


@contextmanager
def methods_counted():
    """Bytes by collective, counted by other methods of process groups: what DDP's reducer calls from C++ is not seen."""
    sizes: Counter[str] = Counter()
    before = {name: call for name, call in vars(dist.ProcessGroup).items() if name in METHODS}

    def counted(name, call):
        @wraps(call)
        def method(*args, **kwargs):
            sizes[METHODS[name]] += max(map(num_bytes, (*args, *kwargs.values())), default=0)
            return call(*args, **kwargs)

        return method

    for name, call in before.items():
        setattr(dist.ProcessGroup, name, counted(name, call))
    try:
        yield sizes
    finally:
        for name, call in before.items():
            setattr(dist.ProcessGroup, name, call)


def counts(case: Case, directory: Path, runtime: Runtime) -> dict:
    """What this rank exchanges in the third step. All ranks must call."""
    config = case.config(case.model_in(directory), runtime.world_size)
    parts = build_step_parts(config, LENGTHS, runtime, source=Zeros())
    engine = build_strategy(parts.strategy, parts.precision, runtime).prepare(
        parts.built.step_module,
        source=parts.weight_source,
        make_optimizer=parts.make_optimizer,
        max_grad_norm=parts.max_grad_norm,
    )
    trainer = minimal_trainer(engine)
    for _ in range(2):
        trainer.train_step(build_step_batch(parts.micro_batches, runtime.device))
    with methods_counted() as by_methods, count_communication() as exchanged:
        trainer.train_step(build_step_batch(parts.micro_batches, runtime.device))
    gradients = sum(p.numel() * p.element_size() for p in engine.step_module.parameters() if p.requires_grad)
    engine.close()
    return {
        "methods": dict(by_methods),
        "exchanged": dict(exchanged.bytes_by_collective),
        "gradients": gradients,
        "waited": exchanged.waited_s is not None,
    }


def main(directory: Path) -> None:
    here = processes.join_job("cpu", timeout_s=600, threads=1, matmul=Matmul.blas)
    report = {}
    for shared_memory in (False, True):
        runtime = replace(here, shared_memory=shared_memory)
        for name, case in CASES.items():
            report[f"{name}{' shared' if shared_memory else ''}"] = counts(case, directory, runtime)
    (directory / f"rank{here.rank}.json").write_text(json.dumps(report))
    processes.barrier(here)
    processes.leave_job()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
