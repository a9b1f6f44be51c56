"""Decides whether sharded gradients stay whole until a step's last micro-batch or are reduced in each, by memory."""

from __future__ import annotations

from strategies import runtime as processes
from strategies.base import Fsdp2Config, Precision, StrategyConfig
from strategies.mesh import replica_count
from strategies.parameters import trainable_parameters
from trainer.build.recomputation import USABLE, Workload, activations_of, counted, device_gib, model_state
from trainer.step import Built

SMALL = 0.01
"""Share of the memory below which whole gradients fit without asking what else lies there."""


def plan_reduction(
    built: Built,
    work: Workload,
    strategy: StrategyConfig,
    precision: Precision,
    runtime: processes.Runtime,
    *,
    steps: int,
) -> None:
    """Resolve `strategy.defer_sync=null`: note the choice in the step module, and why in the substitutions.

    `steps` is the number of micro-batches a rank computes in a step. All ranks must call; they decide from the same numbers,
    by the rank with the least memory.
    """
    if not isinstance(strategy, Fsdp2Config) or strategy.defer_sync is not None or steps == 1:
        return
    shards = runtime.world_size // replica_count(strategy, runtime.world_size, runtime.hosts)
    trained = sum(p.numel() for _, p in trainable_parameters(built.step_module))
    more = 4.0 * trained * (1 - 1 / shards)  # in fp32, beside the shard that is there anyway
    if shards == 1 or not trained:
        return
    budget = 2**30 * (strategy.memory_gib or USABLE * min(processes.gather_objects(device_gib(runtime), runtime)))
    built.step_module.plan.defer_sync = more < SMALL * budget
    why = f"whole gradients take {more / 2**30:.2f} GiB more"
    if not built.step_module.plan.defer_sync:
        if built.activations is None:
            built.activations = counted(built, work, strategy.activation_checkpointing, precision)
        rest = model_state(built, strategy, precision, runtime) + activations_of(built, work, strategy, precision)
        built.step_module.plan.defer_sync = rest + more <= budget
        why += f"; estimated peak with them {(rest + more) / 2**30:.2f} of {budget / 2**30:.2f} GiB"
    said = "true" if built.step_module.plan.defer_sync else "false, reduced in each micro-batch"
    built.substitutions["strategy.defer_sync"] = f"null -> {said} ({why})"
