"""Reports a run or an evaluation that ran out of memory: what it held, what was expected, and which settings help."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from strategies.base import ActivationCheckpointing
from strategies.errors import DoesNotFit, OutOfMemory
from strategies.runtime import Runtime, free_host_memory, peak_memory_gib
from trainer.config.run import RunConfig
from trainer.data.batches.loader import StepBatch
from trainer.loop import Trainer
from trainer.planner.hardware import GIB
from trainer.planner.lengths import divisors
from trainer.reporting.run_record import PredictedCost, RunRecord

REFUSED = ("DefaultCPUAllocator: ", "error: out of memory", "'out of memory'", "BLAS_STATUS_ALLOC_FAILED")
"""What those say of it who are refused memory beside torch's allocator of a GPU, and have no class for that: the host's, the
driver (also for pinned memory), NCCL, and a library of products for its workspace."""


def of_memory(error: BaseException) -> bool:
    """Whether memory was asked for in vain."""
    said = str(error) if isinstance(error, RuntimeError) else ""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in said for text in REFUSED)


@contextmanager
def telling_of_memory(trainer: Trainer, config: RunConfig, record: RunRecord, runtime: Runtime) -> Iterator[None]:
    """Raise DoesNotFit in the place of an error of memory, on the rank that has it; the others lose their peer.

    It is OutOfMemory amid a step that may be taken with a smaller `batch.micro`.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not of_memory(error):
            raise
        where = (
            f"step {trainer.progress.step + 1}"
            if trainer.current_batch
            else f"the evaluation at step {trainer.progress.step}"
        )
        expected = record.receipt.predicted if record.receipt else None
        said = [
            f"{where}: {_exceeded(error, runtime)}",
            f"  {_held(runtime)}{_expected(expected)}",
            *([f"  {_batch(trainer.current_batch)}"] if trainer.current_batch else []),
            f"  {_knobs(config, runtime, training=trainer.current_batch is not None)}",
        ]
        smaller = trainer.current_batch is not None and config.batch["micro"] > 1
        raise (OutOfMemory if smaller else DoesNotFit)("\n".join(said)) from error


@contextmanager
def telling_of_evaluation(doing: Callable[[], str], config: RunConfig, runtime: Runtime) -> Iterator[None]:
    """The same for `shardtune evaluate`, which has no trainer; `doing` says what was under way."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not of_memory(error):
            raise
        sharded = str(config.strategy.name) in ("fsdp2", "zero3")
        ways = [
            f"evaluation.batch below {config.evaluation.batch}, or a task's write.batch_tokens: the result depends on neither",
            "a smaller write.max_new_tokens",
            "more ranks (launcher.processes)" if sharded else "strategy=fsdp2 or zero3 on more ranks",
        ]
        said = [f"{doing()}: {_exceeded(error, runtime)}", f"  {_held(runtime)}", f"  what helps: {'; '.join(ways)}"]
        raise DoesNotFit("\n".join(said)) from error


def _expected(cost: PredictedCost | None) -> str:
    return "" if cost is None else f"; expected {cost.memory_gib:.2f} ({cost.memory_by})"


def _exceeded(error: BaseException, runtime: Runtime) -> str:
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return f"rank {runtime.rank} on {socket.gethostname()} ran out of memory ({lines[0][:200]})"


def _held(runtime: Runtime) -> str:
    peaks = peak_memory_gib(runtime.device)
    if runtime.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(runtime.device)
        there = f"{peaks['memory_reserved_gib']:.2f} reserved, {free / GIB:.2f} of {total / GIB:.2f} free"
    else:
        left = free_host_memory()
        there = "with libraries" + ("" if left is None else f", {left / GIB:.2f} free on the host")
    return f"memory in GiB: {peaks['memory_gib']:.2f} at most so far ({there})"


def _batch(batch: StepBatch) -> str:
    """The largest micro-batch of this rank's step."""
    sizes = [each["input_ids"].shape for each in batch.micro_batches if "input_ids" in each]
    rows, width = max(sizes, key=lambda shape: shape.numel()) if sizes else (0, 0)
    shape = f"{rows} x {width:,} tokens" if rows > 1 else f"{width:,} tokens"
    return f"its micro-batches: {len(batch.micro_batches)}, the largest {shape} with what was padded"


def _knobs(config: RunConfig, runtime: Runtime, *, training: bool) -> str:
    if not training:
        return f"lower evaluation.batch (it is {config.evaluation.batch}); the result does not depend on it"
    micro, strategy = config.batch["micro"], config.strategy
    smaller = [each for each in divisors(config.batch["global"] // runtime.world_size) if each < micro]
    ways = (
        [f"batch.micro={smaller[-1]} (or auto), which keeps batch.global={config.batch['global']}"] if smaller else []
    )
    if strategy.activation_checkpointing is not ActivationCheckpointing.full:
        ways.append("strategy.activation_checkpointing=full")
    ways += [f"data.max_length below {config.data.max_length}"] if config.data.max_length else []
    ways += ["tuning=lora"] if str(config.tuning.name) == "full" else []
    ways += (
        ["strategy=fsdp2 or zero3 on more ranks"] if str(strategy.name) not in ("fsdp2", "zero3") else ["more ranks"]
    )
    return f"what helps: {'; '.join(ways)}. `shardtune plan` compares them; the run continues from its last checkpoint"
