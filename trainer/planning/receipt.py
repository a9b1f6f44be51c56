"""What a run was expected to take, beside what it took: `receipt` in `run.json`.

What is expected costs a run nothing: it is arithmetic on what is known when it starts. Runs are simulated by `trainer/forecast`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from strategies.base import Precision, StrategyConfig
from strategies.memory import estimate
from strategies.mesh import replicas
from strategies.runtime import Runtime
from trainer.planning.activations import Workload, by_rule, model_state
from trainer.planning.hardware import GIB
from trainer.planning.speed import PRODUCTS
from trainer.records.metrics import Meter
from trainer.step import Built

STATE_BYTES = {"adamw": 8, "adamw_8bit": 2, "lion": 4, "sgd": 4, "muon": 4, "schedule_free": 8, "adafactor": 0}
"""Bytes of optimizer state that a checkpoint keeps for each trained parameter, beside its weight in fp32."""
COUNTED = "estimate: state by arithmetic, activations counted on shapes; no logits, libraries or allocator"
BY_RULE = "estimate: state by arithmetic, activations by a rule of thumb; no logits, libraries or allocator"
STEP_BY = f"matrix products and attention alone, at {PRODUCTS} of the device's peak; nothing recomputed"
ON_GPU = "tensors (memory_gib) and what the allocator reserved for them, since the process began, on the worst rank"
ON_CPU = "resident set of the process, libraries included, since it began, on the worst rank"


def checkpoint_bytes(trained: int, optimizer: str) -> int:
    """Of a checkpoint: of what trains, its weights in fp32 and the optimizer's state."""
    return trained * (4 + STATE_BYTES[optimizer])


def expect_memory(
    built: Built, work: Workload, strategy: StrategyConfig, precision: Precision, runtime: Runtime
) -> None:
    """Note in `built` what memory a rank is expected to take. Needs the model before it is sharded; no collective."""
    activations = built.activations
    if activations is None:
        world, replicate = runtime.world_size, replicas(strategy, runtime)
        load = by_rule(built, work)
        activations = estimate(
            built.step_module, strategy, precision, world_size=world, replicate=replicate, load=load
        ).activations
    built.expected = model_state(built, strategy, precision, runtime), activations


def predicted(built: Built, facts: Mapping[str, Any], optimizer: str) -> dict[str, Any]:
    """What is expected of the run that `facts` (see `run_facts`) tells of; each estimate says what it is."""
    assert built.expected is not None
    state, activations = built.expected
    peak, step_s = facts["reference_tflops"], None
    if peak:
        flops = facts["flops_per_token"] * facts["tokens_per_step"] / facts["world_size"]
        step_s = flops / (PRODUCTS * peak * 1e12)
    return {
        "memory_gib": (state + activations) / GIB,
        "memory_by": BY_RULE if built.activations is None else COUNTED,
        "state_gib": state / GIB,
        "activations_gib": activations / GIB,
        "step_s": step_s,
        "step_by": STEP_BY if peak else facts["reference_tflops_source"],
        "checkpoint_bytes": checkpoint_bytes(facts["sharding"]["trainable_parameters"], optimizer),
    }


def measured(meter: Meter, device: str, checkpoint: tuple[int, float] | None) -> dict[str, Any]:
    """What this attempt took so far; null where it did not come to it. `checkpoint`: (bytes, seconds) of the last one."""
    size, seconds = checkpoint or (None, None)
    return {
        **(meter.peaks or {"memory_gib": None}),
        "memory_of": ON_GPU if device == "cuda" else ON_CPU,
        "step_s": meter.step_s(),
        "start_s": meter.start_s,
        "evaluation_before_s": None if meter.start_s is None else meter.evaluation_s,
        "checkpoint_bytes": size,
        "checkpoint_s": seconds,
    }
