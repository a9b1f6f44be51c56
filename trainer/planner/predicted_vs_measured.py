"""The `receipt` in `run.json`: what a run was predicted to take, beside what it took.

The prediction is arithmetic on what is known when a run starts, and costs it nothing. `trainer/planner` simulates
runs.
"""

from __future__ import annotations

import torch

from strategies.runtime import peak_memory_gib
from trainer.checkpoints.async_writer import SavedCheckpoint
from trainer.planner.hardware import GIB
from trainer.planner.speed import PRODUCTS
from trainer.reporting.metrics import Meter
from trainer.reporting.run_record import MeasuredCost, PredictedCost, RunRecord
from trainer.step import Built

STATE_BYTES = {"adamw": 8, "adamw_8bit": 2, "lion": 4, "sgd": 4, "muon": 4, "schedule_free": 8, "adafactor": 0}
"""Bytes of optimizer state that a checkpoint keeps for each trained parameter, beside its weight in fp32."""
COUNTED = "estimate: state by arithmetic, activations counted on shapes; no logits, libraries or allocator"
BY_RULE = "estimate: state by arithmetic, activations by a rule of thumb; no logits, libraries or allocator"
SIMULATED = "simulation of the longest micro-batch's step (run.must_fit); no libraries or allocator"
STEP_BY = f"matrix products and attention alone, at {PRODUCTS} of the device's peak; nothing recomputed"
ON_GPU = "tensors (memory_gib) and what the allocator reserved for them, since the process began"
ON_CPU = "resident set of the process, libraries included, since it began"


def checkpoint_bytes(trained: int, optimizer: str) -> int:
    """Of a checkpoint: of what trains, its weights in fp32 and the optimizer's state."""
    return trained * (4 + STATE_BYTES[optimizer])


def predicted(built: Built, record: RunRecord, optimizer: str, device_gib: float) -> PredictedCost:
    """What is expected of the run that `record` tells of; each estimate says what it is. The exchange is left out.

    `device_gib`: memory of this rank's device.
    """
    assert built.expected is not None
    state, activations = built.expected
    simulated = record.must_fit
    peak = record.reference_tflops
    step_s = None
    if peak:
        flops = record.flops_per_token * record.tokens_per_step / record.world_size
        step_s = flops / (PRODUCTS * peak * 1e12)
    estimated_by = BY_RULE if built.activations is None else COUNTED
    return PredictedCost(
        memory_gib=simulated.live_gib if simulated else (state + activations) / GIB,
        memory_by=SIMULATED if simulated else estimated_by,
        state_gib=state / GIB,
        activations_gib=activations / GIB,
        device_gib=device_gib,
        step_s=step_s,
        step_by=STEP_BY if peak else record.reference_tflops_source,
        checkpoint_bytes=checkpoint_bytes(record.sharding.trainable_parameters, optimizer),
    )


def memory_text(record: RunRecord) -> list[str]:
    """The start screen's line about memory: what was simulated, or a warning if the estimate is more than the device has."""
    if simulated := record.must_fit:
        needed, available = simulated.needed_gib, simulated.device_gib
        return [f"memory: {needed:.2f} of {available:.2f} GiB, simulated (run.must_fit), most in {simulated.when}"]
    expected = record.receipt.predicted if record.receipt else None
    if expected is None or expected.memory_gib is None or expected.device_gib is None:
        return []
    needed, available = expected.memory_gib, expected.device_gib
    if needed <= available:
        return []
    return [
        f"warning: a rank is estimated to need {needed:.2f} GiB, and has {available:.2f}: lower batch.micro or "
        "data.max_length, recompute (strategy.activation_checkpointing=full) or shard more; run.must_fit=true simulates it on "
        "GPUs"
    ]


def measured(meter: Meter, device: torch.device, checkpoint: SavedCheckpoint | None) -> MeasuredCost:
    """What this attempt took so far. `checkpoint`: the last one."""
    where = "on the worst rank" if meter.peaks else "on rank 0, since no step was logged"
    peaks = meter.peaks or peak_memory_gib(device)
    return MeasuredCost(
        memory_gib=peaks.get("memory_gib"),
        memory_reserved_gib=peaks.get("memory_reserved_gib"),
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        memory_of=f"{ON_GPU if device.type == 'cuda' else ON_CPU}, {where}",
        step_s=meter.step_s(),
        exchanged_bytes=None if meter.exchanged is None else dict(meter.exchanged.sizes),
        exposed_s=None if meter.exchanged is None else meter.exchanged.waited_s,
        start_s=meter.start_s,
        evaluation_before_s=None if meter.start_s is None else meter.evaluation_s,
        checkpoint_bytes=None if checkpoint is None else checkpoint.size,
        checkpoint_s=None if checkpoint is None else checkpoint.took_s,
        checkpoint_stall_s=None if checkpoint is None else checkpoint.stall_s,
    )
