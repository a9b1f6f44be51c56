"""What activation checkpointing needs of transformers beside its public interface. Read in transformers 5.24.

tests/compat/test_transformers.py calls it. Other names of transformers stand in `trainer/model/compat.py` and
`trainer/tuning/compat/transformers.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def checkpoint_block(block: nn.Module, checkpoint: Callable[..., Any], *, recomputes: bool) -> None:
    """Let one block keep its activations, or recompute them with the function `checkpoint`.

    Sets `gradient_checkpointing` and `_gradient_checkpointing_func` of transformers' `GradientCheckpointingLayer`. The public
    `activation_checkpointing_enable` gives every block of a model the same function, and a plan has several kinds.
    """
    block.gradient_checkpointing = recomputes  # type: ignore[assignment]
    block._gradient_checkpointing_func = checkpoint  # type: ignore[assignment]


def wrap_checkpoints(model: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> int:
    """Wrap the function by which each block of `model` recomputes its activations; returns how many blocks do so.

    Replaces `_gradient_checkpointing_func`, which the public `activation_checkpointing_enable` has set. That method itself can
    keep inputs on the host (`offload=True`), but not block by block, and it does not count them.
    """
    num_wrapped = 0
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func"):
            recompute: Any = module._gradient_checkpointing_func
            module._gradient_checkpointing_func = wrap(recompute)  # type: ignore[assignment]
            num_wrapped += 1
    return num_wrapped
