"""Mixtures of experts: transformers' own computation of them, in the precision of the run.

transformers keeps a layer's experts as parameters of three dimensions and lets a function compute with them. Its grouped
products know nothing of autocast: where master weights are kept in float32 they would run in float32, at a fraction of the
speed, and round unlike strategies that store weights in bf16. The function here hands them the weights as autocast would.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NAME = "shardtune_experts"


def register() -> None:
    """Make the function known to transformers under `NAME`. Idempotent."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


class _Typed:
    """A module of experts whose floating-point parameters are seen in another type."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._module, self._dtype = module, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value.to(self._dtype) if isinstance(value, nn.Parameter) and value.is_floating_point() else value


def experts_forward(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What the `chosen [T, k]` experts make of `hidden [T, H]`, weighted by `weights [T, k]`: `[T, H]`."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    kind = hidden.device.type
    if not hidden.is_meta and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return grouped_mm_experts_forward(_Typed(module, dtype), hidden.to(dtype), chosen, weights)
    return grouped_mm_experts_forward(module, hidden, chosen, weights)


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that choose experts, by name: those that stand beside a module of experts and give its choice."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        children = dict(module.named_children())
        if "experts" not in children:
            continue
        for key in ("gate", "router"):
            if key in children:
                found[f"{name}.{key}"] = children[key]
    return found
