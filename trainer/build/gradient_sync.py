"""Decides by memory whether sharded gradients are reduced in every micro-batch, or stay full until a step's last one."""

from __future__ import annotations

from strategies import runtime as processes
from strategies.base import Fsdp2Config, Precision, StrategyConfig
from strategies.memory import expert_parallel_parameters
from strategies.mesh import replica_count
from strategies.parameters import trainable_parameters
from trainer.build.recomputation import (
    USABLE_SHARE,
    LargestMicroBatch,
    activation_peak_bytes,
    device_memory_gib,
    expected_activation_bytes,
    model_state_bytes,
)
from trainer.step import BuiltModel, TrainStep

NEGLIGIBLE_SHARE = 0.01
"""Full gradients that take less than this share of the memory fit, whatever else is there."""


def plan_gradient_reduction(
    built: BuiltModel,
    largest_batch: LargestMicroBatch,
    strategy: StrategyConfig,
    precision: Precision,
    runtime: processes.Runtime,
    *,
    micro_batches: int,
) -> None:
    """Resolve `strategy.defer_sync=null`: reduce gradients only in a step's last micro-batch, if whole ones fit in memory.

    That saves communication. Writes the choice into the plan of the step module, which the engine reads, and its reason into
    `built.substitutions`. Does nothing if the choice is set, or makes no difference; only FSDP2 has one. `largest_batch`: the
    longest micro-batch. `micro_batches`: how many a rank computes in a step. All ranks must call; all decide by the memory of
    the smallest device.
    """
    is_open = isinstance(strategy, Fsdp2Config) and strategy.defer_sync is None
    if not is_open or micro_batches == 1:
        return
    num_shards = runtime.world_size // replica_count(strategy, runtime.world_size, runtime.num_hosts)
    num_trained = sum(p.numel() for _, p in trainable_parameters(built.step_module))
    if num_shards == 1 or not num_trained:
        return

    extra_bytes = _extra_bytes_of_full_gradients(built.step_module, num_trained, num_shards)
    usable_gib = strategy.memory_gib
    if not usable_gib:
        usable_gib = USABLE_SHARE * min(processes.gather_objects(device_memory_gib(runtime), runtime))
    budget_bytes = 2**30 * usable_gib

    # They fit if they are negligible, or else if the estimated peak with them is within the budget.
    defer_sync = extra_bytes < NEGLIGIBLE_SHARE * budget_bytes
    reason = f"whole gradients take {extra_bytes / 2**30:.2f} GiB more"
    if not defer_sync:
        peak_bytes = _peak_bytes_of_step(built, largest_batch, strategy, precision, runtime) + extra_bytes
        defer_sync = peak_bytes <= budget_bytes
        reason += f"; estimated peak with them {peak_bytes / 2**30:.2f} of {budget_bytes / 2**30:.2f} GiB"
    built.step_module.plan.defer_sync = defer_sync
    choice = "true" if defer_sync else "false, reduced in each micro-batch"
    built.substitutions["strategy.defer_sync"] = f"null -> {choice} ({reason})"


def _peak_bytes_of_step(
    built: BuiltModel,
    largest_batch: LargestMicroBatch,
    strategy: StrategyConfig,
    precision: Precision,
    runtime: processes.Runtime,
) -> float:
    """Estimate the peak memory of a rank in a step with sharded gradients: model state and activations, in bytes.

    Counts activations if that is not done, and keeps the count, if there can be one, in `built.activation_bytes`.
    """
    if built.activation_bytes is None:
        built.activation_bytes = activation_peak_bytes(
            built, largest_batch, strategy.activation_checkpointing, precision
        )
    state_bytes = model_state_bytes(built, strategy, precision, runtime)
    return state_bytes + expected_activation_bytes(built, largest_batch, strategy, precision)


def _extra_bytes_of_full_gradients(step_module: TrainStep, num_trained: int, num_shards: int) -> float:
    """How many bytes a rank's full gradients in fp32 take beyond its shard of them.

    `num_trained`: trained elements of the whole model. `num_shards`: ranks over which they are sharded.
    """
    # Of experts that are distributed over ranks, a rank has gradients of its own only.
    num_in_experts = sum(p.numel() for p in expert_parallel_parameters(step_module).values() if p.requires_grad)
    full_elements = num_trained - num_in_experts + num_in_experts / step_module.plan.expert_ranks
    return 4.0 * (full_elements - num_trained / num_shards)
