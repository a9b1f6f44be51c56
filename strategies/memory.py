"""Estimates the bytes that one rank needs, by arithmetic on shapes: a run plans and warns with these numbers as it starts.

A simulation of the step is more exact (`trainer/planner`), but too slow here. It runs in a process that belongs to no job, so
each start would wait until another Python has imported everything and taken three steps: 5 to 30 seconds for a model of two
blocks. Some architectures cannot be simulated at all, and every run needs an answer. `run.must_fit` and `shardtune plan` do
simulate. Estimated here are the bytes of the model's state, and activations by a rule of thumb if nobody has counted them
(`strategies.activation_plan` does).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from strategies.base import ActivationCheckpointing, Fsdp2Config, Precision, StrategyConfig, ZeroConfig, plan_of
from strategies.parameters import COMPUTE_DTYPE, REWARD_MODELS_PREFIX, named_parameters

ALL_VALUES_PER_WIDTH = 18
"""Values that a block keeps for each token and hidden unit: norms, projections and residuals of a gated block."""
KEPT_VALUES_PER_WIDTH = {
    ActivationCheckpointing.full: 1,
    ActivationCheckpointing.selective: ALL_VALUES_PER_WIDTH // 2,
}
"""The same for a block that recomputes."""


def estimated_activation_bytes(
    num_tokens: int, width: int, num_blocks: int, checkpointing: ActivationCheckpointing, precision: Precision
) -> float:
    """Estimate by a rule of thumb what a forward pass keeps for the backward pass, in bytes, where nobody has counted it.

    `num_tokens`: of a micro-batch. `width`: the size of a hidden state. `checkpointing`: what blocks recompute; what is
    recomputed is not kept.
    """
    per_block = KEPT_VALUES_PER_WIDTH.get(checkpointing, ALL_VALUES_PER_WIDTH)
    # In addition, everything of one block: even if blocks recompute, the one that computes has all of it for a moment.
    kept_values = num_tokens * width * (num_blocks * per_block + ALL_VALUES_PER_WIDTH)
    return float(kept_values * _bytes_per_value(precision))


def estimated_state_bytes(
    step_module: nn.Module, config: StrategyConfig, precision: Precision, *, world_size: int, num_replicas: int
) -> float:
    """Estimate how much device memory a rank needs for parameters, gradients and optimizer state, in bytes; no activations.

    Copies in the compute type are included, and what is gathered from other ranks at one time. By strategy:

    - ZeRO: by its stage, see `_zero_state_bytes`.
    - FSDP2 with offloading to the CPU: only what is gathered at one time.
    - FSDP2: what is gathered at one time, and this rank's shard.
    - Others: everything in full, and in half precision the copies that autocast makes.

    `step_module`: not yet sharded. `num_replicas`: the number of full copies of the model among the ranks (hsdp).
    """
    sizes = _model_sizes(step_module, _bytes_per_value(precision))
    if isinstance(config, ZeroConfig):
        return _zero_state_bytes(sizes, config, precision, world_size)
    # A weight that trains, and its gradient, take four bytes each.
    bytes_per_trained_element = 4.0 + 4.0 + sizes.optimizer_bytes_per_element
    unsharded_bytes = sizes.frozen_bytes + sizes.num_trained_elements * bytes_per_trained_element
    if isinstance(config, Fsdp2Config):
        if config.cpu_offload:
            return sizes.gathered_bytes
        num_shards = world_size // num_replicas
        return sizes.gathered_bytes + unsharded_bytes / num_shards
    if precision is not Precision.fp32:
        unsharded_bytes += 2 * sizes.num_trained_elements  # autocast's copies; frozen weights are in that type already
    return unsharded_bytes


def expert_parallel_parameters(step_module: nn.Module) -> dict[int, nn.Parameter]:
    """The parameters of experts that are distributed over ranks (`parallel.experts`), by their `id()`; none without that.

    `step_module`: not yet sharded.
    """
    parameters: dict[int, nn.Parameter] = {}
    for name in plan_of(step_module).expert_parallel_modules:
        for parameter in step_module.get_submodule(name).parameters(recurse=False):
            parameters[id(parameter)] = parameter
    return parameters


@dataclass(frozen=True, slots=True)
class _ModelSizes:
    """Sizes of a model that is not sharded."""

    frozen_bytes: int
    """Bytes of the parameters that do not train, in the compute type; of packed weights as they are."""
    num_trained_elements: int
    """Number of parameter elements that train."""
    all_bytes: int
    """Bytes of all parameters in the compute type."""
    gathered_bytes: float
    """Bytes that a rank has gathered at one time: the block at work, the next one, and everything outside the blocks."""
    optimizer_bytes_per_element: int
    """Bytes of optimizer state for each trained element: AdamW's two moments, and the average if there is one."""


def _model_sizes(step_module: nn.Module, bytes_per_value: int) -> _ModelSizes:
    """Add up the sizes of a model that is not sharded yet, to estimate what a rank will hold of it.

    `step_module`: the model with all that its step computes beside it. `bytes_per_value`: bytes of a value in the type that the
    model computes in.
    """
    # Frozen models (a teacher, reward models) take memory as well.
    frozen_bytes = sum(
        _full_bytes(p, bytes_per_value)
        for _, p in named_parameters(step_module, include_frozen_models=True)
        if not p.requires_grad
    )
    num_trained_elements = sum(p.numel() for _, p in named_parameters(step_module) if p.requires_grad)
    all_bytes = frozen_bytes + num_trained_elements * bytes_per_value
    has_weight_average = plan_of(step_module).ema_decay > 0
    return _ModelSizes(
        frozen_bytes=frozen_bytes,
        num_trained_elements=num_trained_elements,
        all_bytes=all_bytes,
        gathered_bytes=_bytes_gathered_at_one_time(step_module, bytes_per_value, all_bytes),
        # AdamW's two moments, and the average, of four bytes each.
        optimizer_bytes_per_element=12 if has_weight_average else 8,
    )


def _bytes_gathered_at_one_time(step_module: nn.Module, bytes_per_value: int, all_bytes: int) -> float:
    """Bytes of full parameters that a rank has at one time where they are sharded: two blocks, and everything outside the blocks.

    While one block runs, the next one is gathered already. `bytes_per_value`: in the compute type. `all_bytes`: of the whole
    model, which counts as one block if the architecture names none.
    """
    expert_parallel = expert_parallel_parameters(step_module)
    expert_ranks = plan_of(step_module).expert_ranks

    def bytes_when_gathered(parameter: nn.Parameter) -> float:
        """With expert parallelism, a rank gathers its own experts only."""
        return _full_bytes(parameter, bytes_per_value) / (expert_ranks if id(parameter) in expert_parallel else 1)

    block_bytes = [sum(map(bytes_when_gathered, block.parameters())) for block in step_module.shard_units()]  # type: ignore[operator]
    gathered_in_step = 0.0
    for name, parameter in named_parameters(step_module, include_frozen_models=True):
        if not name.startswith(REWARD_MODELS_PREFIX):  # those are gathered between steps
            gathered_in_step += bytes_when_gathered(parameter)
    bytes_outside_blocks = gathered_in_step - sum(block_bytes)
    return float(2 * max(block_bytes, default=all_bytes) + bytes_outside_blocks)


def _full_bytes(parameter: nn.Parameter, bytes_per_value: int) -> int:
    """Bytes of a full parameter in the type that the model computes in; of packed weights, which are integers, as they are."""
    itemsize = bytes_per_value if parameter.is_floating_point() else parameter.element_size()
    return parameter.numel() * itemsize


def _zero_state_bytes(sizes: _ModelSizes, config: ZeroConfig, precision: Precision, num_ranks: int) -> float:
    """Bytes of parameters, gradients and optimizer state on one of `num_ranks` ranks' devices, under DeepSpeed's ZeRO.

    Stage 1 shards optimizer state, 2 also gradients, 3 also parameters. What is offloaded does not count.
    """
    # Under stage 3 in fp32, the parameters themselves are the fp32 masters.
    master_bytes_per_element = 0 if precision is Precision.fp32 and config.stage == 3 else 4
    parameter_bytes = sizes.all_bytes / (num_ranks if config.stage == 3 else 1)
    optimizer_bytes = (
        sizes.num_trained_elements * (sizes.optimizer_bytes_per_element + master_bytes_per_element) / num_ranks
    )
    gradient_bytes = sizes.num_trained_elements * 4 / num_ranks  # stages 2 and 3 shard them, summed up in fp32
    if config.stage == 1:
        # Every rank has full gradients: in fp16 as the backward pass makes them, otherwise summed up in fp32.
        gradient_bytes = sizes.num_trained_elements * (2.0 if precision is Precision.fp16 else 4.0)
    if config.offload_optimizer != "none":
        optimizer_bytes = 0.0
    if config.offload_parameters != "none":
        parameter_bytes = 0.0
    gathered_bytes = sizes.gathered_bytes if config.stage == 3 else 0.0
    return parameter_bytes + optimizer_bytes + gradient_bytes + gathered_bytes


def _bytes_per_value(precision: Precision) -> int:
    """Bytes of one value in the type that the model computes in."""
    return torch.finfo(COMPUTE_DTYPE[precision]).bits // 8
