"""Whether gradients of sharded parameters wait whole for a step's last micro-batch, or are reduced in each: as memory allows."""

from __future__ import annotations

from strategies import runtime as processes
from strategies.base import Fsdp2Config, Precision, StrategyConfig
from strategies.memory import estimate
from strategies.mesh import replicas
from strategies.parameters import trainable_parameters
from trainer.build.recomputation import USABLE, Workload, by_rule, device_gib, expected, model_state
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
    shards = runtime.world_size // replicas(strategy, runtime.world_size, runtime.hosts)
    trained = sum(p.numel() for _, p in trainable_parameters(built.step_module))
    more = 4.0 * trained * (1 - 1 / shards)  # in fp32, beside the shard that is there anyway
    if shards == 1 or not trained:
        return
    budget = 2**30 * (strategy.memory_gib or USABLE * min(processes.gather_objects(device_gib(runtime), runtime)))
    built.step_module.plan.defer_sync = more < SMALL * budget
    why = f"whole gradients take {more / 2**30:.2f} GiB more"
    if not built.step_module.plan.defer_sync:
        rest = model_state(built, strategy, precision, runtime) + _activations(built, work, strategy, precision)
        built.step_module.plan.defer_sync = rest + more <= budget
        why += f"; estimated peak with them {(rest + more) / 2**30:.2f} of {budget / 2**30:.2f} GiB"
    said = "true" if built.step_module.plan.defer_sync else "false, reduced in each micro-batch"
    built.substitutions["strategy.defer_sync"] = f"null -> {said} ({why})"


def _activations(built: Built, work: Workload, strategy: StrategyConfig, precision: Precision) -> float:
    """Bytes of the longest micro-batch: counted, under the plan where there is one, else by the rule of thumb."""
    modes = built.step_module.plan.recomputation
    built.activations = expected(built, work, strategy.activation_checkpointing, precision, modes)
    if built.activations is not None:
        return built.activations
    load = by_rule(built, work)
    return estimate(built.step_module, strategy, precision, world_size=1, replicate=1, load=load).activations
