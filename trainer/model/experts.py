"""Mixtures of experts: transformers' own computation of them, in the precision of the run.

transformers keeps a layer's experts as parameters of three dimensions and lets a function compute with them. Its grouped
products know nothing of autocast: where master weights are kept in float32 they would run in float32, at a fraction of the
speed, and round unlike strategies that store weights in bf16. The function here hands them the weights as autocast would.
What low-rank adapters add to the experts is computed in `trainer.tuning.low_rank`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.model.compat import grouped_experts, register_experts
from trainer.model.expert_exchange import expert_parallel_forward
from trainer.model.routing import count_expert_load
from trainer.tuning.low_rank import LoraUpdate, frozen_experts

EXPERTS_FUNCTION = "shardtune_experts"


def register() -> None:
    """Make the function known to transformers under `EXPERTS_FUNCTION`. Idempotent."""
    register_experts(EXPERTS_FUNCTION, experts_forward)


class _CastExperts:
    """Stands in for a module of experts, with its floating-point parameters cast to another type, as autocast would."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._module = module
        self._dtype = dtype

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._module, name)
        if isinstance(attribute, nn.Parameter) and attribute.is_floating_point():
            return attribute.to(self._dtype)
        return attribute


def experts_forward(
    module: Any,
    hidden: Tensor,
    expert_indices: Tensor,
    weights: Tensor,
    lora_updates: dict[str, LoraUpdate] | None = None,
) -> Tensor:
    """The output `[T, H]` of a layer's experts for `hidden [T, H]`: each token's k experts, weighted and added up.

    transformers calls it in each layer of experts. `expert_indices`, `weights`: the k experts of each token and their weights,
    `[T, k]`. `lora_updates`: the LoRA updates of the module's weights, by the weight's name: of all its weights, or None. Also
    counts the tokens of each expert for the metrics of expert load, if the pass is recorded. The first case that holds:

    - the module holds one rank's share of the experts (`expert_share`, expert parallelism): tokens are sent to their experts.
    - adapters, or weights that are stored packed (`packed_experts`, a quantised base): our grouped products on frozen weights.
    - else: transformers' own function.
    """
    count_expert_load(module, expert_indices)  # of all experts of the layer, before tokens are sent away
    device_type = hidden.device.type
    if not hidden.is_meta and torch.is_autocast_enabled(device_type):  # the grouped products below ignore autocast
        dtype = torch.get_autocast_dtype(device_type)
        module, hidden = _CastExperts(module, dtype), hidden.to(dtype)
    share = getattr(module, "expert_share", None)
    if share is not None:
        return expert_parallel_forward(module, share, hidden, expert_indices, weights, lora_updates)
    if lora_updates is not None or hasattr(module, "packed_experts"):
        return frozen_experts(module, hidden, expert_indices, weights, lora_updates)
    return grouped_experts(module, hidden, expert_indices, weights)
