"""Estimated memory of one rank, from shapes alone: what a run chooses recomputation and waiting gradients by, as it starts.

Model state follows from the strategy by arithmetic. Activations are counted on the meta device where the caller has done so
(`strategies.activation_plan`), else a rule of thumb (stated below). What people are told is simulated (`trainer/forecast`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from strategies.base import ActivationCheckpointing, Fsdp2Config, Precision, StrategyConfig, ZeroConfig, plan_of
from strategies.parameters import COMPUTE_DTYPE, named_parameters

ACTIVATIONS_PER_WIDTH = 18
"""Values kept a token, block and hidden unit: norms, projections and residuals of a gated block."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one rank, by kind."""

    parameters: float
    gradients: float
    optimizer: float
    gathered: float
    """Parameters of the block at work, gathered from the other ranks."""
    activations: float

    @property
    def total(self) -> float:
        """Sum of all kinds, in bytes."""
        return self.parameters + self.gradients + self.optimizer + self.gathered + self.activations


@dataclass(frozen=True, slots=True)
class Pass:
    """A forward pass of `micro_tokens` tokens through a model `width` wide with `blocks` blocks."""

    micro_tokens: int = 0
    width: int = 0
    blocks: int = 0
    activations: float | None = None
    """Bytes that were counted; without them the rule of thumb is taken."""


def estimate(
    step_module: nn.Module,
    config: StrategyConfig,
    precision: Precision,
    *,
    world_size: int,
    replicate: int,
    load: Pass,
) -> MemoryEstimate:
    """Memory of one rank with that load."""
    compute = torch.finfo(COMPUTE_DTYPE[precision]).bits // 8

    def computed(p: nn.Parameter) -> int:
        """Bytes in the compute type; packed weights stay as they are."""
        return p.numel() * (compute if p.is_floating_point() else p.element_size())

    frozen = sum(computed(p) for _, p in named_parameters(step_module, teacher=True) if not p.requires_grad)
    trained = sum(p.numel() for _, p in named_parameters(step_module) if p.requires_grad)
    moments = 8 + 4 * bool(plan_of(step_module).ema_decay)  # AdamW's, and the average
    units = step_module.shard_units()  # type: ignore[operator]
    whole = frozen + trained * compute
    block = max((sum(map(computed, unit.parameters())) for unit in units), default=whole)
    rest = whole - sum(computed(p) for unit in units for p in unit.parameters())
    kept = ACTIVATIONS_PER_WIDTH
    if config.activation_checkpointing is ActivationCheckpointing.full:
        kept = 1
    elif config.activation_checkpointing is ActivationCheckpointing.selective:
        kept = ACTIVATIONS_PER_WIDTH // 2
    activations = load.activations
    if activations is None:
        activations = float(load.micro_tokens * load.width * compute * (load.blocks * kept + ACTIVATIONS_PER_WIDTH))
    if isinstance(config, ZeroConfig):
        shards = world_size
        masters = 0 if precision is Precision.fp32 and config.stage == 3 else 4
        parameters = whole / (shards if config.stage == 3 else 1)
        optimizer = trained * (moments + masters) / shards
        gradients = trained * 4 / shards
        if config.stage == 1:  # whole on every rank, summed in fp32 (in fp16 as they come)
            gradients = trained * (compute if precision is Precision.fp16 else 4.0)
        if config.offload_optimizer != "none":
            optimizer = 0.0
        if config.offload_parameters != "none":
            parameters = 0.0
        gathered = float(2 * block + rest) if config.stage == 3 else 0.0
    elif isinstance(config, Fsdp2Config):
        shards = world_size // replicate
        parameters = (frozen + trained * 4) / shards
        gradients, optimizer = trained * 4 / shards, trained * moments / shards
        gathered = float(2 * block + rest)
        if config.cpu_offload:
            parameters = gradients = optimizer = 0.0
    else:
        parameters, gradients, optimizer, gathered = (
            frozen + trained * 4.0,
            trained * 4.0,
            float(trained * moments),
            0.0,
        )
    return MemoryEstimate(float(parameters), float(gradients), float(optimizer), float(gathered), activations)
