"""What a run was expected to take, beside what it took: `receipt` in `run.json`.

What is expected costs a run nothing: it is arithmetic on what is known when it starts. Runs are simulated by `trainer/planner`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from strategies.runtime import peak_memory_gib
from trainer.checkpoints.async_writer import SavedCheckpoint
from trainer.planner.hardware import GIB
from trainer.planner.speed import PRODUCTS
from trainer.reporting.metrics import Meter
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


def predicted(built: Built, facts: Mapping[str, Any], optimizer: str, device_gib: float) -> dict[str, Any]:
    """What is expected of the run that `facts` (see `run_facts`) tells of; each estimate says what it is.

    `device_gib`: memory of this rank's device.
    """
    assert built.expected is not None
    state, activations = built.expected
    simulated: Mapping[str, Any] | None = facts.get("must_fit")
    by = BY_RULE if built.activations is None else COUNTED
    peak, step_s = facts["reference_tflops"], None
    if peak:
        flops = facts["flops_per_token"] * facts["tokens_per_step"] / facts["world_size"]
        step_s = flops / (PRODUCTS * peak * 1e12)
    return {
        "memory_gib": simulated["live_gib"] if simulated else (state + activations) / GIB,
        "memory_by": SIMULATED if simulated else by,
        "state_gib": state / GIB,
        "activations_gib": activations / GIB,
        "device_gib": device_gib,
        "step_s": step_s,
        "step_by": STEP_BY if peak else facts["reference_tflops_source"],
        "checkpoint_bytes": checkpoint_bytes(facts["sharding"]["trainable_parameters"], optimizer),
    }


def memory_text(facts: Mapping[str, Any]) -> list[str]:
    """The start screen's line about memory: what was simulated, or a warning where an estimate is more than there is."""
    if simulated := facts.get("must_fit"):
        needed, there = simulated["needed_gib"], simulated["device_gib"]
        return [f"memory: {needed:.2f} of {there:.2f} GiB, simulated (run.must_fit), most in {simulated['when']}"]
    expected = facts["receipt"]["predicted"]
    needed, there = expected["memory_gib"], expected["device_gib"]
    if needed <= there:
        return []
    return [
        f"warning: a rank is estimated to need {needed:.2f} GiB, and has {there:.2f}: lower batch.micro or data.max_length, "
        "recompute (strategy.activation_checkpointing=full) or shard more; run.must_fit=true simulates it on GPUs"
    ]


def measured(meter: Meter, device: torch.device, checkpoint: SavedCheckpoint | None) -> dict[str, Any]:
    """What this attempt took so far; null where it did not come to it. `checkpoint`: the last one."""
    where = "on the worst rank" if meter.peaks else "on rank 0, since no step was logged"
    return {
        **(meter.peaks or peak_memory_gib(device)),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "memory_of": f"{ON_GPU if device.type == 'cuda' else ON_CPU}, {where}",
        "step_s": meter.step_s(),
        "exchanged_bytes": None if meter.exchanged is None else dict(meter.exchanged.sizes),
        "exposed_s": None if meter.exchanged is None else meter.exchanged.waited_s,
        "start_s": meter.start_s,
        "evaluation_before_s": None if meter.start_s is None else meter.evaluation_s,
        "checkpoint_bytes": None if checkpoint is None else checkpoint.size,
        "checkpoint_s": None if checkpoint is None else checkpoint.took_s,
        "checkpoint_stall_s": None if checkpoint is None else checkpoint.stall_s,
    }
