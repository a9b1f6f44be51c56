"""Applies activation checkpointing and compilation to each transformer block, before the model is sharded."""

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
from strategies.compat.transformers import checkpoint_block, wrap_checkpoints
from strategies.errors import ConfigError
from strategies.host_inputs import HostInputs

# Matrix products and attention are costly to recompute and cheap to keep. Everything else is recomputed.
KEPT_OPS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    FLASH_ATTENTION.default,
    FLASH_ATTENTION_ON_CPU.default,
    EFFICIENT_ATTENTION.default,
    CUDNN_ATTENTION.default,
)
KEPT_OP_NAMES = ("torch_attn::_varlen_attn", "flash_attn::_flash_attn_varlen_forward")
"""Variable-length attention on GPUs, torch's and FlashAttention's: by name, since they exist only once they are imported."""


def is_kept_op(op: Any) -> bool:
    """Whether selective checkpointing keeps the result of an operation."""
    return op in KEPT_OPS or op.name() in KEPT_OP_NAMES


def _selective_policy(_ctx: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """What torch's selective checkpointing does with the result of the operation `op`: keep it, or recompute it."""
    return CheckpointPolicy.MUST_SAVE if is_kept_op(op) else CheckpointPolicy.PREFER_RECOMPUTE


class _KeptOpsOnly(TorchDispatchMode):
    """Lets torch's selective mode see only the operations that are kept.

    torch's mode counts every operation, and expects each of them again when a block is recomputed. Under ZeRO-3 the operations
    that gather weights would be among them, but they differ: in the forward pass some weights were gathered ahead.
    """

    def __init__(self, mode: Any) -> None:
        super().__init__()
        self.mode = mode

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Like torch's own mode."""
        return True

    @property
    def ac_graph_id(self) -> Any:
        """The number of a checkpointed part of a compiled block. torch writes it here, and its own mode reads it."""
        return self.mode.ac_graph_id

    @ac_graph_id.setter
    def ac_graph_id(self, number: Any) -> None:
        self.mode.ac_graph_id = number

    def __enter__(self) -> Any:
        self.mode.func_counter.clear()
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_kept_op(func) or torch.compiler.is_compiling():
            return self.mode.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def _selective_contexts() -> Any:
    """The contexts of a block's forward pass and of its recomputation, in which torch keeps the results of costly operations."""
    forward_context, recompute_context = create_selective_checkpoint_contexts(_selective_policy)
    return _KeptOpsOnly(forward_context), _KeptOpsOnly(recompute_context)


def _checkpoint_kwargs(mode: ActivationCheckpointing) -> dict[str, Any]:
    """The arguments of `torch.utils.checkpoint.checkpoint` for a mode that recomputes, `full` or `selective`."""
    kwargs: dict[str, Any] = {"use_reentrant": False}
    if mode is ActivationCheckpointing.selective:
        kwargs["context_fn"] = _selective_contexts
    return kwargs


def _forbid_output_overwriting(module: nn.Module) -> None:
    """Set `overwrites_output` of all layers in `module` to False: a product that is overwritten in place cannot be kept."""
    for layer in module.modules():
        if getattr(layer, "overwrites_output", False):
            layer.overwrites_output = False  # type: ignore[assignment]


def _enable_checkpointing(step_module: nn.Module, mode: ActivationCheckpointing) -> None:
    """Let all blocks of the model recompute their activations in the backward pass, in the same `mode`.

    This is done by transformers' own method of the model. Nothing happens for the mode `none`. Raises ConfigError if the model
    does not support it.
    """
    if mode is ActivationCheckpointing.none:
        return
    model: Any = step_module.model
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"strategy.activation_checkpointing={mode}: {type(model).__name__} does not support it; set "
            "strategy.activation_checkpointing=none"
        )
    # Selective checkpointing keeps the results of products, so that no layer may change one in place.
    if mode is ActivationCheckpointing.selective:
        _forbid_output_overwriting(model)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=_checkpoint_kwargs(mode))


def apply_checkpointing_and_compile(step_module: nn.Module, config: StrategyConfig) -> None:
    """Prepare the blocks of a model before it is sharded: let them recompute activations, and compile them, as `config` says.

    Changes the blocks in place.

    - The plan of the step has a mode for each block (`StepPlan.recomputation`, made for `auto`): each block gets its own.
    - Otherwise all blocks get the mode of `config`. `auto` without a plan means that nothing is recomputed.
    - With `offload_activations`, the inputs of blocks that recompute are kept on the host.
    - With `compile`, each block is compiled. Raises ConfigError if the architecture has no repeated blocks.
    """
    blocks = step_module.shard_units()  # type: ignore[operator]
    planned_modes = plan_of(step_module).recomputation
    if planned_modes is not None:
        _enable_planned_checkpointing(step_module, blocks, planned_modes)
    elif config.activation_checkpointing is not ActivationCheckpointing.auto:
        _enable_checkpointing(step_module, config.activation_checkpointing)
    modes = set(planned_modes or [config.activation_checkpointing])
    recomputing_modes = modes - {ActivationCheckpointing.none, ActivationCheckpointing.auto}
    if config.offload_activations and recomputing_modes:
        _offload_block_inputs(step_module)
    if not config.compile:
        return
    if not blocks:
        raise ConfigError("strategy.compile=true: this architecture names no repeated blocks to compile; set it false")
    for block in blocks:
        block.compile(dynamic=True)


def _offload_block_inputs(step_module: nn.Module) -> None:
    """Let blocks that recompute keep their inputs in host memory until the backward pass needs them.

    Sets `host_inputs` of the plan of the step, by which the memory is counted. Raises ConfigError if the model recomputes in a
    way that cannot be wrapped for it.
    """
    plan = plan_of(step_module)
    host_inputs = HostInputs()
    if not wrap_checkpoints(step_module.model, host_inputs.wrap_checkpoint_function):  # type: ignore[arg-type]
        raise ConfigError(
            f"strategy.offload_activations=true: {type(step_module.model).__name__} recomputes in a way of its own, which "
            "keeps inputs on the device; set strategy.offload_activations=false"
        )
    plan.host_inputs = host_inputs


def _enable_planned_checkpointing(
    step_module: nn.Module, blocks: list[nn.Module], modes: list[ActivationCheckpointing]
) -> None:
    """Let each block recompute its activations in a mode of its own, as a plan by memory has chosen.

    `blocks`: in forward order; `modes`: the mode of each.
    """
    used_modes = [mode for mode in modes if mode is not ActivationCheckpointing.none]
    if not used_modes:
        return
    # First for all blocks alike, since the model's interface also prepares the model itself; then block by block.
    _enable_checkpointing(step_module, used_modes[0])
    for block, mode in zip(blocks, modes, strict=True):
        checkpoint = partial(torch.utils.checkpoint.checkpoint, **_checkpoint_kwargs(mode))
        checkpoint_block(block, checkpoint, recomputes=mode is not ActivationCheckpointing.none)
        # As in `_enable_checkpointing`: the results of products are kept, and must not be changed in place.
        if mode is ActivationCheckpointing.selective:
            _forbid_output_overwriting(block)
