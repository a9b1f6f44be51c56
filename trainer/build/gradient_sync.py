"""Decides whether sharded gradients stay whole until a step's last micro-batch or are reduced in each, by memory."""

from __future__ import annotations

from strategies import runtime as processes
from strategies.base import Fsdp2Config, Precision, StrategyConfig
from strategies.mesh import replica_count
from strategies.parameters import trainable_parameters
from trainer.build.recomputation import (
    USABLE_SHARE,
    Workload,
    activations_of,
    counted_activations,
    device_gib,
    model_state,
)
from trainer.step import Built

NEGLIGIBLE_SHARE = 0.01
"""Share of the memory below which whole gradients fit without asking what else lies there."""


def plan_reduction(
    built: Built,
    work: Workload,
    strategy: StrategyConfig,
    precision: Precision,
    runtime: processes.Runtime,
    *,
    micro_batches: int,
) -> None:
    """Resolve `strategy.defer_sync=null`: note the choice in the step module, and why in the substitutions.

    `micro_batches`: how many of them a rank computes in a step. All ranks must call. They decide from the same numbers: those of
    the rank with the least memory.
    """
    if not isinstance(strategy, Fsdp2Config) or strategy.defer_sync is not None or micro_batches == 1:
        return
    shards = runtime.world_size // replica_count(strategy, runtime.world_size, runtime.hosts)
    trained = sum(p.numel() for _, p in trainable_parameters(built.step_module))
    extra_bytes = 4.0 * trained * (1 - 1 / shards)  # in fp32, beside the shard that is there anyway
    if shards == 1 or not trained:
        return
    budget = 2**30 * (strategy.memory_gib or USABLE_SHARE * min(processes.gather_objects(device_gib(runtime), runtime)))
    built.step_module.plan.defer_sync = extra_bytes < NEGLIGIBLE_SHARE * budget
    why = f"whole gradients take {extra_bytes / 2**30:.2f} GiB more"
    if not built.step_module.plan.defer_sync:
        if built.activations is None:
            built.activations = counted_activations(built, work, strategy.activation_checkpointing, precision)
        other_bytes = model_state(built, strategy, precision, runtime) + activations_of(
            built, work, strategy, precision
        )
        built.step_module.plan.defer_sync = other_bytes + extra_bytes <= budget
        why += f"; estimated peak with them {(other_bytes + extra_bytes) / 2**30:.2f} of {budget / 2**30:.2f} GiB"
    choice = "true" if built.step_module.plan.defer_sync else "false, reduced in each micro-batch"
    built.substitutions["strategy.defer_sync"] = f"null -> {choice} ({why})"
