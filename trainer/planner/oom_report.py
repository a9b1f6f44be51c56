"""Reports a run or an evaluation that ran out of memory: what it held, what was expected, and which settings help."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from strategies.base import ActivationCheckpointing
from strategies.errors import DoesNotFit, OutOfMemory
from strategies.runtime import Runtime, free_host_memory_bytes, peak_memory_gib_by_metric
from trainer.config.run import RunConfig
from trainer.data.batches.loader import StepBatch
from trainer.loop import Trainer
from trainer.model.config import ModelKind
from trainer.objectives.registry import objective_family
from trainer.planner.hardware import GIB
from trainer.planner.lengths import micro_batch_divisors
from trainer.reporting.run_record import PredictedCost, RunRecord

OOM_MESSAGES = ("DefaultCPUAllocator: ", "error: out of memory", "'out of memory'", "BLAS_STATUS_ALLOC_FAILED")
"""Texts of RuntimeErrors that mean out of memory, beside the error class of torch's GPU allocator: from the host's allocator, the
driver (also for pinned memory), NCCL, and BLAS for its workspace."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that there was no memory to allocate."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OOM_MESSAGES)


@contextmanager
def reporting_out_of_memory(trainer: Trainer, config: RunConfig, record: RunRecord, runtime: Runtime) -> Iterator[None]:
    """Turn an out-of-memory error inside the context, around training, into one whose message says what was held and what helps.

    It becomes OutOfMemory, after which a launcher may start again, if a smaller `batch.micro` may help: in a training step with a
    `batch.micro` above 1. Otherwise DoesNotFit. `record`: the run's, whose prediction of memory is told as well. Only the rank
    that ran out raises; the others lose their connection to it.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        batch = trainer.current_batch  # None outside training steps
        if batch:
            current_work = f"step {trainer.progress.step + 1}"
        else:
            current_work = f"the evaluation at step {trainer.progress.step}"
        prediction = record.receipt.predicted if record.receipt else None  # a receipt: predicted and measured costs
        lines = [
            f"{current_work}: {_out_of_memory_summary(error, runtime)}",
            f"  {_memory_line(runtime)}{_prediction_clause(prediction)}",
        ]
        if batch:
            lines.append(f"  {_micro_batch_line(batch)}")
        lines.append(f"  {_remedies_line(config, runtime, training=batch is not None)}")
        # OutOfMemory lets the launcher start again with less; DoesNotFit ends the job.
        may_retry_smaller = batch is not None and config.batch["micro"] > 1
        error_class = OutOfMemory if may_retry_smaller else DoesNotFit
        raise error_class("\n".join(lines)) from error


@contextmanager
def reporting_evaluation_out_of_memory(
    current_work_name: Callable[[], str], config: RunConfig, runtime: Runtime
) -> Iterator[None]:
    """Turn an out-of-memory error of `shardtune evaluate` inside the context into DoesNotFit, whose message says what helps.

    `current_work_name`: returns the name of what is being computed at the moment, such as a task, to begin the message with.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        remedies = [
            f"evaluation.batch below {config.evaluation.batch}, or a task's write.batch_tokens: the result depends on neither",
            "a smaller write.max_new_tokens",
            "more ranks (launcher.processes)" if _is_fully_sharded(config) else "strategy=fsdp2 or zero3 on more ranks",
        ]
        lines = [
            f"{current_work_name()}: {_out_of_memory_summary(error, runtime)}",
            f"  {_memory_line(runtime)}",
            f"  what helps: {'; '.join(remedies)}",
        ]
        raise DoesNotFit("\n".join(lines)) from error


def _is_fully_sharded(config: RunConfig) -> bool:
    """Whether weights, gradients and optimizer state are sharded over all ranks, so that each further rank saves memory."""
    return str(config.strategy.name) in ("fsdp2", "zero3")


def _prediction_clause(cost: PredictedCost | None) -> str:
    """A clause with the predicted memory, such as `; expected 5.20 (estimate: ...)`; empty without a prediction."""
    return "" if cost is None else f"; expected {cost.memory_gib:.2f} ({cost.memory_by})"


def _out_of_memory_summary(error: BaseException, runtime: Runtime) -> str:
    """Rank and host that ran out of memory, with the first line of the error."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return f"rank {runtime.rank} on {socket.gethostname()} ran out of memory ({lines[0][:200]})"


def _memory_line(runtime: Runtime) -> str:
    """The line of an out-of-memory message that says how much memory this rank has taken, and how much is free.

    `memory in GiB: 61.20 at most so far (66.00 reserved, 0.40 of 79.10 free)`, or on a CPU `... (with libraries, 1.20 free on the
    host)`.
    """
    peaks = peak_memory_gib_by_metric(runtime.device)
    if runtime.device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(runtime.device)
        free_text = f"{free_bytes / GIB:.2f} of {total_bytes / GIB:.2f} free"
        details = f"{peaks['memory_reserved_gib']:.2f} reserved, {free_text}"
    else:
        details = "with libraries"  # a CPU's peak is that of the whole process
        free_host_bytes = free_host_memory_bytes()
        if free_host_bytes is not None:
            details += f", {free_host_bytes / GIB:.2f} free on the host"
    return f"memory in GiB: {peaks['memory_gib']:.2f} at most so far ({details})"


def _micro_batch_line(batch: StepBatch) -> str:
    """The line of an out-of-memory message that says how large this rank's step is.

    `its micro-batches: 4, the largest 2 x 1,024 tokens with what was padded`.
    """
    shapes = [micro_batch["input_ids"].shape for micro_batch in batch.micro_batches if "input_ids" in micro_batch]
    rows, width = max(shapes, key=lambda shape: shape.numel()) if shapes else (0, 0)
    shape = f"{rows} x {width:,} tokens" if rows > 1 else f"{width:,} tokens"
    return f"its micro-batches: {len(batch.micro_batches)}, the largest {shape} with what was padded"


def _remedies_line(config: RunConfig, runtime: Runtime, *, training: bool) -> str:
    """The line of an out-of-memory message that names settings which take less memory, as far as this run has not set them.

    `what helps: batch.micro=4 (or auto), which keeps batch.global=64; strategy.activation_checkpointing=full; ...`.

    `training`: whether a training step ran out, not an evaluation, where only `evaluation.batch` helps.
    """
    if not training:
        return f"lower evaluation.batch (it is {config.evaluation.batch}); the result does not depend on it"
    global_batch, micro_batch = config.batch["global"], config.batch["micro"]
    remedies = []
    # `dp_size`: ranks that read different samples; those that share a row read the same.
    smaller_micro_batches = [
        divisor for divisor in micro_batch_divisors(global_batch // runtime.dp_size) if divisor < micro_batch
    ]
    if smaller_micro_batches:
        remedies.append(f"batch.micro={smaller_micro_batches[-1]} (or auto), which keeps batch.global={global_batch}")
    if config.strategy.activation_checkpointing is not ActivationCheckpointing.full:
        remedies.append("strategy.activation_checkpointing=full")
    if config.data.max_length:
        remedies.append(f"data.max_length below {config.data.max_length}")
    if str(config.tuning.name) == "full":
        remedies.append("tuning=lora")
    doubled_sequence = 2 * runtime.sequence_size
    # Encoder and decoder read two sequences, which cannot be sliced together.
    can_share_rows = objective_family(config.objective).kind is not ModelKind.encoder_decoder
    if can_share_rows and runtime.world_size % doubled_sequence == 0:
        remedies.append(
            f"parallel.sequence={doubled_sequence}, if single documents are too long (docs/long-context.md)"
        )
    remedies.append("more ranks" if _is_fully_sharded(config) else "strategy=fsdp2 or zero3 on more ranks")
    return (
        f"what helps: {'; '.join(remedies)}. `shardtune plan` compares them; the run continues from its last checkpoint"
    )
