"""What is done to each transformer block before sharding: activation checkpointing and compilation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from strategies.base import ActivationCheckpointing, StrategyConfig
from strategies.errors import ConfigError

# Costly to recompute, cheap to keep: matrix products and attention. Everything else is recomputed.
_KEPT_OPS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
)


def _selective_policy(_ctx: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_selective_policy)


def apply_to_blocks(step_module: nn.Module, config: StrategyConfig) -> None:
    """Switch on checkpointing through the model's own interface, and compile block by block, as configured.

    Raises ConfigError where the architecture has no repeated blocks to work on.
    """
    if config.activation_checkpointing is not ActivationCheckpointing.none:
        model: Any = step_module.model
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise ConfigError(
                f"strategy.activation_checkpointing={config.activation_checkpointing}: {type(model).__name__} does not "
                "support it; set strategy.activation_checkpointing=none"
            )
        kwargs: dict[str, Any] = {"use_reentrant": False}
        if config.activation_checkpointing is ActivationCheckpointing.selective:
            kwargs["context_fn"] = _selective_contexts
            for module in model.modules():  # an output that is kept must not be overwritten
                if getattr(module, "overwrites_output", False):
                    module.overwrites_output = False
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    if config.compile:
        blocks = step_module.shard_units()  # type: ignore[operator]
        if not blocks:
            raise ConfigError(
                "strategy.compile=true: this architecture names no repeated blocks to compile; set it false"
            )
        for block in blocks:
            block.compile(dynamic=True)
