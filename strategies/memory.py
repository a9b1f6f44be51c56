"""Bytes that one rank needs, by arithmetic on shapes: what a run plans and warns by as it starts.

A simulation of the step knows better (`trainer/planner`), but cannot stand here. It runs in a process that belongs to no job,
so that each start would wait for another Python to import everything and take three steps: 5 to 30 seconds for a model of two
blocks. Some architectures cannot be simulated at all, and every run needs an answer. `run.must_fit` and `shardtune plan`
simulate. Only what they cannot answer in time is estimated here: the bytes of the model's state, and a rule of thumb for
activations that nobody has counted (`strategies.activation_plan` counts them).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from strategies.base import ActivationCheckpointing, Fsdp2Config, Precision, StrategyConfig, ZeroConfig, plan_of
from strategies.parameters import COMPUTE_DTYPE, named_parameters

ACTIVATIONS_PER_WIDTH = 18
"""Values kept a token, block and hidden unit: norms, projections and residuals of a gated block."""
KEPT_PER_WIDTH = {
    ActivationCheckpointing.full: 1,
    ActivationCheckpointing.selective: ACTIVATIONS_PER_WIDTH // 2,
}
"""The same for a block that recomputes."""


def activations_by_rule(
    tokens: int, width: int, blocks: int, checkpointing: ActivationCheckpointing, precision: Precision
) -> float:
    """Bytes that a forward pass of `tokens` tokens keeps, by a rule of thumb, in a model `width` wide with `blocks` blocks."""
    per_block = KEPT_PER_WIDTH.get(checkpointing, ACTIVATIONS_PER_WIDTH)
    # The block at work is there with everything it keeps, also if it recomputes.
    kept_values = tokens * width * (blocks * per_block + ACTIVATIONS_PER_WIDTH)
    return float(kept_values * _compute_bytes(precision))


def state_bytes(
    step_module: nn.Module, config: StrategyConfig, precision: Precision, *, world_size: int, replicate: int
) -> float:
    """Bytes of parameters, gradients and optimizer state on one rank's device, copies in the compute type included.

    `step_module` is not sharded yet; `replicate` is the number of whole copies of the model among the ranks (hsdp).
    """
    sizes = _sizes(step_module, _compute_bytes(precision))
    if isinstance(config, ZeroConfig):
        return _zero_bytes(sizes, config, precision, world_size)
    if isinstance(config, Fsdp2Config):
        shard = (sizes.frozen + sizes.trained * (4 + 4 + sizes.optimizer)) / (world_size // replicate)
        return sizes.gathered + (0.0 if config.cpu_offload else shard)
    total = sizes.frozen + sizes.trained * (4.0 + 4.0 + sizes.optimizer)
    if precision is not Precision.fp32:
        total += 2 * sizes.trained  # autocast's copies
    return total


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What the state of a whole model is made of."""

    frozen: int
    """Bytes of what does not train, in the compute type; packed weights stay as they are."""
    trained: int
    """Elements that train."""
    compute: int
    """Bytes of all parameters in the compute type."""
    gathered: float
    """Bytes that a rank gathers from the others at once: the block at work and the next one, and what is outside blocks."""
    optimizer: int
    """Bytes of optimizer state a trained element: AdamW's two moments, and the average if there is one."""


def _sizes(step_module: nn.Module, compute_bytes: int) -> _Sizes:
    def size_of(parameter: nn.Parameter) -> int:
        return parameter.numel() * (compute_bytes if parameter.is_floating_point() else parameter.element_size())

    frozen = sum(size_of(p) for _, p in named_parameters(step_module, teacher=True) if not p.requires_grad)
    trained = sum(p.numel() for _, p in named_parameters(step_module) if p.requires_grad)
    compute = frozen + trained * compute_bytes
    blocks = [sum(map(size_of, unit.parameters())) for unit in step_module.shard_units()]  # type: ignore[operator]
    return _Sizes(
        frozen=frozen,
        trained=trained,
        compute=compute,
        gathered=float(2 * max(blocks, default=compute) + compute - sum(blocks)),
        optimizer=8 + 4 * bool(plan_of(step_module).ema_decay),
    )


def _zero_bytes(sizes: _Sizes, config: ZeroConfig, precision: Precision, ranks: int) -> float:
    masters = 0 if precision is Precision.fp32 and config.stage == 3 else 4
    parameters = sizes.compute / (ranks if config.stage == 3 else 1)
    optimizer = sizes.trained * (sizes.optimizer + masters) / ranks
    gradients = sizes.trained * 4 / ranks
    if config.stage == 1:  # whole on every rank, summed in fp32 (in fp16 as they come)
        gradients = sizes.trained * (2.0 if precision is Precision.fp16 else 4.0)
    if config.offload_optimizer != "none":
        optimizer = 0.0
    if config.offload_parameters != "none":
        parameters = 0.0
    gathered = sizes.gathered if config.stage == 3 else 0.0
    return parameters + optimizer + gradients + gathered


def _compute_bytes(precision: Precision) -> int:
    """Bytes of one value in the type that the model computes in."""
    return torch.finfo(COMPUTE_DTYPE[precision]).bits // 8
