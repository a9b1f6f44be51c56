"""The `receipt` in `run.json`: the predicted costs of a run beside the measured ones.

The prediction is arithmetic on what is known when a run starts, and costs it nothing. `trainer/planner` simulates
runs.
"""

from __future__ import annotations

import torch

from strategies.runtime import peak_memory_gib_by_metric
from trainer.checkpoints.async_writer import SavedCheckpoint
from trainer.planner.hardware import GIB
from trainer.planner.speed import PRODUCT_EFFICIENCY
from trainer.reporting.metrics import Meter
from trainer.reporting.run_record import MeasuredCost, PredictedCost, RunRecord
from trainer.step import BuiltModel

STATE_BYTES_BY_OPTIMIZER = {
    "adamw": 8,
    "adamw_8bit": 2,
    "lion": 4,
    "sgd": 4,
    "muon": 4,
    "schedule_free": 8,
    "adafactor": 0,
}
"""Bytes of optimizer state that a checkpoint keeps for each trained parameter, beside its weight in fp32."""
MEMORY_BY_SHAPES = "estimate: state by arithmetic, activations counted on shapes; no logits, libraries or allocator"
MEMORY_BY_RULE_OF_THUMB = (
    "estimate: state by arithmetic, activations by a rule of thumb; no logits, libraries or allocator"
)
MEMORY_BY_SIMULATION = "simulation of the longest micro-batch's step (run.must_fit); no libraries or allocator"
STEP_TIME_BY_FLOPS = (
    f"matrix products and attention alone, at {PRODUCT_EFFICIENCY} of the device's peak; nothing recomputed"
)
MEMORY_ON_GPU = "tensors (memory_gib) and what the allocator reserved for them, since the process began"
MEMORY_ON_CPU = "resident set of the process, libraries included, since it began"


def checkpoint_bytes(num_trained_parameters: int, optimizer: str) -> int:
    """Bytes of a checkpoint: the trained weights in fp32, and their optimizer state. `optimizer`: such as `adamw`."""
    return num_trained_parameters * (4 + STATE_BYTES_BY_OPTIMIZER[optimizer])


def predicted_cost(built: BuiltModel, record: RunRecord, optimizer: str, device_gib: float) -> PredictedCost:
    """Predict what a run will take, for its record: memory, seconds of a step, bytes of a checkpoint.

    Memory and seconds come with a text on their method:

    - Memory: from the simulated step of `run.must_fit` if there was one, else by arithmetic.
    - Seconds of a step, without communication: None for a device whose peak is not known, with the reason instead of a method.

    `record`: the run's record at the start. `optimizer`: such as `adamw`. `device_gib`: memory of this rank's device.
    """
    assert built.expected_bytes is not None
    # By arithmetic: of model state (parameters, gradients, optimizer) and of activations.
    estimated_bytes = built.expected_bytes
    simulated_step = record.must_fit
    if simulated_step is not None:  # more precise than the arithmetic
        memory_gib = simulated_step.live_gib
        memory_by = MEMORY_BY_SIMULATION
    else:
        memory_gib = (estimated_bytes.model_state + estimated_bytes.activations) / GIB
        memory_by = MEMORY_BY_RULE_OF_THUMB if built.activation_bytes is None else MEMORY_BY_SHAPES
    step_s = None
    step_by = record.reference_tflops_source  # without a peak, this text says why none is known
    if record.reference_tflops:
        flops_per_rank = record.flops_per_token * record.tokens_per_step / record.world_size
        step_s = flops_per_rank / (PRODUCT_EFFICIENCY * record.reference_tflops * 1e12)
        step_by = STEP_TIME_BY_FLOPS
    return PredictedCost(
        memory_gib=memory_gib,
        memory_by=memory_by,
        state_gib=estimated_bytes.model_state / GIB,
        activations_gib=estimated_bytes.activations / GIB,
        device_gib=device_gib,
        step_s=step_s,
        step_by=step_by,
        checkpoint_bytes=checkpoint_bytes(record.sharding.trainable_parameters, optimizer),
    )


def memory_screen_lines(record: RunRecord) -> list[str]:
    """The lines on memory that a run shows as it starts: what was simulated, or a warning if the estimate exceeds the device.

    `memory: 61.20 of 79.10 GiB, simulated (run.must_fit), most in backward 0: head`. Empty if nothing was simulated and the
    estimate fits. `record`: of the run.
    """
    simulated_step = record.must_fit  # None if `run.must_fit` did not ask for a simulation
    if simulated_step:
        gib = f"{simulated_step.needed_gib:.2f} of {simulated_step.device_gib:.2f} GiB"
        return [f"memory: {gib}, simulated (run.must_fit), most in {simulated_step.when}"]
    prediction = record.receipt.predicted if record.receipt else None
    if prediction is None or prediction.memory_gib is None or prediction.device_gib is None:
        return []
    if prediction.memory_gib <= prediction.device_gib:
        return []
    return [
        f"warning: a rank is estimated to need {prediction.memory_gib:.2f} GiB, and has {prediction.device_gib:.2f}: lower "
        "batch.micro or data.max_length, recompute (strategy.activation_checkpointing=full) or shard more; "
        "run.must_fit=true simulates it on GPUs"
    ]


def measured_cost(meter: Meter, device: torch.device, checkpoint: SavedCheckpoint | None) -> MeasuredCost:
    """Collect what the run has taken since its last start, to stand in its record beside what was predicted.

    Memory, seconds of a step, bytes of collectives, seconds of the start, cost of a checkpoint. `meter`: measurements of the
    steps that were logged. `checkpoint`: the last one that was written; None before the first. Values that were not measured
    stay None: those of collectives with a single rank, the start before the first step.
    """
    if meter.peaks:
        peaks_gib = meter.peaks
        ranks_text = "on the worst rank"
    else:
        peaks_gib = peak_memory_gib_by_metric(device)
        ranks_text = "on rank 0, since no step was logged"
    is_gpu = device.type == "cuda"
    cost = MeasuredCost(
        memory_gib=peaks_gib.get("memory_gib"),
        memory_reserved_gib=peaks_gib.get("memory_reserved_gib"),
        device_name=torch.cuda.get_device_name(device) if is_gpu else None,
        memory_of=f"{MEMORY_ON_GPU if is_gpu else MEMORY_ON_CPU}, {ranks_text}",
        step_s=meter.median_step_s(),
    )
    if meter.communication_totals is not None:
        cost.exchanged_bytes = dict(meter.communication_totals.bytes_by_collective)
        cost.exposed_s = meter.communication_totals.waited_s
    if meter.seconds_until_first_step is not None:
        cost.start_s = meter.seconds_until_first_step
        # That of the evaluation before the first step, which `start_s` includes.
        cost.evaluation_before_s = meter.evaluation_s
    if checkpoint is not None:
        cost.checkpoint_bytes = checkpoint.size_bytes
        cost.checkpoint_s = checkpoint.took_s
        cost.checkpoint_stall_s = checkpoint.stall_s
    return cost
