"""What is done to each transformer block before sharding: activation checkpointing and compilation."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from strategies.base import ActivationCheckpointing, StrategyConfig, plan_of
from strategies.compat.dispatch import (
    CUDNN_ATTENTION,
    EFFICIENT_ATTENTION,
    FLASH_ATTENTION,
    FLASH_ATTENTION_ON_CPU,
    TorchDispatchMode,
)
from strategies.compat.transformers import checkpoint_block
from strategies.errors import ConfigError

# Costly to recompute, cheap to keep: matrix products and attention. Everything else is recomputed.
KEPT_OPS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    FLASH_ATTENTION.default,
    FLASH_ATTENTION_ON_CPU.default,
    EFFICIENT_ATTENTION.default,
    CUDNN_ATTENTION.default,
)
KEPT_WHEN_REGISTERED = ("torch_attn::_varlen_attn", "flash_attn::_flash_attn_varlen_forward")
"""Variable-length attention on GPUs: torch's and FlashAttention's, which exist only once they are imported."""


def is_kept(op: Any) -> bool:
    """Whether selective checkpointing keeps what an operation computes."""
    return op in KEPT_OPS or op.name() in KEPT_WHEN_REGISTERED


def _selective_policy(_ctx: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_kept(op) else CheckpointPolicy.PREFER_RECOMPUTE


class _OnlyKept(TorchDispatchMode):
    """Shows torch's selective mode the kept operations alone.

    It counts every operation and wants each again when a block is recomputed. What ZeRO-3 does to gather weights stands
    among them, and differs: in the forward pass some were gathered ahead.
    """

    def __init__(self, mode: Any) -> None:
        super().__init__()
        self.mode = mode

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """As torch's own mode."""
        return True

    @property
    def ac_graph_id(self) -> Any:
        """Which checkpointed part of a compiled block this is: torch writes it here, and its own mode reads it."""
        return self.mode.ac_graph_id

    @ac_graph_id.setter
    def ac_graph_id(self, number: Any) -> None:
        self.mode.ac_graph_id = number

    def __enter__(self) -> Any:
        self.mode.func_counter.clear()
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_kept(func) or torch.compiler.is_compiling():
            return self.mode.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def _selective_contexts() -> Any:
    caching, cached = create_selective_checkpoint_contexts(_selective_policy)
    return _OnlyKept(caching), _OnlyKept(cached)


def _checkpoint_arguments(mode: ActivationCheckpointing) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"use_reentrant": False}
    if mode is ActivationCheckpointing.selective:
        kwargs["context_fn"] = _selective_contexts
    return kwargs


def _keep_outputs(module: nn.Module) -> None:
    """A product that is kept must not be overwritten by the layer that made it."""
    for layer in module.modules():
        if getattr(layer, "overwrites_output", False):
            layer.overwrites_output = False  # type: ignore[assignment]


def _checkpoint(step_module: nn.Module, mode: ActivationCheckpointing) -> None:
    """Every block alike, through the model's own interface; raises ConfigError where it has none."""
    if mode is ActivationCheckpointing.none:
        return
    model: Any = step_module.model
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"strategy.activation_checkpointing={mode}: {type(model).__name__} does not support it; set "
            "strategy.activation_checkpointing=none"
        )
    if mode is ActivationCheckpointing.selective:
        _keep_outputs(model)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=_checkpoint_arguments(mode))


def apply_to_blocks(step_module: nn.Module, config: StrategyConfig) -> None:
    """Switch on checkpointing through the model's own interface, and compile block by block, as configured.

    A plan by block (`StepPlan.recomputation`, made for `auto`) goes before the setting. Raises ConfigError where the
    architecture has no repeated blocks to work on.
    """
    blocks = step_module.shard_units()  # type: ignore[operator]
    modes = plan_of(step_module).recomputation
    if modes is None:
        mode = config.activation_checkpointing
        _checkpoint(step_module, ActivationCheckpointing.none if mode is ActivationCheckpointing.auto else mode)
    elif used := [mode for mode in modes if mode is not ActivationCheckpointing.none]:
        _checkpoint(step_module, used[0])
        for block, mode in zip(blocks, modes, strict=True):
            checkpoint = partial(torch.utils.checkpoint.checkpoint, **_checkpoint_arguments(mode))
            checkpoint_block(block, checkpoint, recomputes=mode is not ActivationCheckpointing.none)
            if mode is ActivationCheckpointing.selective:
                _keep_outputs(block)
    if config.compile:
        if not blocks:
            raise ConfigError(
                "strategy.compile=true: this architecture names no repeated blocks to compile; set it false"
            )
        for block in blocks:
            block.compile(dynamic=True)
