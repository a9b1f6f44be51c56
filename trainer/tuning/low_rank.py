"""Experts with frozen weights and optional low-rank adapters: products grouped by expert, weights never added up.

peft adds the update to the weights first. That makes one more copy of all experts of a layer in every forward pass,
and keeps it for the backward pass, including experts that no token chose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.tuning.compat.transformers import gated, grouped_product, has_grouped_kernel, is_expert_parallel

ALIGNMENT_BYTES = 16
"""Rows of the matrices in a grouped product must be a multiple of this long."""


class DequantisesExperts(Protocol):
    """Expert weights that are stored in few bits (`trainer/model/quantised_experts.py`)."""

    def dequantise(self, name: str, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight `name` of the layer in `dtype`, from its quantised bytes."""


@dataclass(slots=True)
class LoraUpdate:
    """The update `scaling * up @ down` of each expert's weight `[out, in]`."""

    down: Tensor
    """`[E, r, in]`."""
    up: Tensor
    """`[E, out, r]`."""
    scaling: float

    def slice_of_experts(self, first: int, end: int) -> LoraUpdate:
        """The update of experts `first` to `end`, without `end`."""
        return LoraUpdate(self.down[first:end], self.up[first:end], self.scaling)

    def with_aligned_rank(self, dtype: torch.dtype) -> LoraUpdate:
        """The same update in `dtype`, with the rank rounded up (filled with zeros) to one that grouped products take."""
        rank = self.down.shape[1]
        rank_multiple = ALIGNMENT_BYTES // dtype.itemsize
        missing_ranks = -rank % rank_multiple
        down = torch.nn.functional.pad(self.down.to(dtype), (0, 0, 0, missing_ranks))
        up = torch.nn.functional.pad(self.up.to(dtype), (0, missing_ranks))
        return LoraUpdate(down.contiguous(), up.contiguous(), self.scaling)


def frozen_experts(
    module: Any, hidden: Tensor, expert_ids: Tensor, weights: Tensor, lora_updates: dict[str, LoraUpdate] | None
) -> Tensor:
    """The output of a layer's experts with frozen weights, plus LoRA updates of these weights.

    `lora_updates`: by parameter name. `module`: transformers' experts. `hidden` is `[T, H]`; `expert_ids` and their `weights`
    are `[T, k]`: the experts that each token chose. Returns `[T, H]` in the type of `hidden`. Weights may be stored quantised
    (`module.packed_experts`): they are then dequantised to the type of `hidden` for each product.
    """
    assert not is_expert_parallel(module), "experts are not split over ranks here"
    experts_per_token = expert_ids.shape[-1]
    # One row for each pair of token and expert; rows of one expert stand together, and end at its offset.
    row_experts, order = torch.sort(expert_ids.reshape(-1))
    rows = hidden[order // experts_per_token]
    all_experts = torch.arange(module.num_experts, device=row_experts.device)
    offsets = torch.searchsorted(row_experts, all_experts, right=True).to(torch.int32)

    expert_product = partial(
        _expert_product, module, row_experts=row_experts, offsets=offsets, lora_updates=lora_updates, dtype=hidden.dtype
    )
    if module.has_gate:
        inner = gated(module, expert_product("gate_up_proj", rows))
    else:
        inner = module.act_fn(expert_product("up_proj", rows))
    row_outputs = expert_product("down_proj", inner)
    if getattr(module, "has_post_expert_norm", False):
        row_outputs = module.post_expert_norm(row_outputs)
    row_outputs = row_outputs * weights.reshape(-1)[order, None]

    # Back to the order of tokens, where the k experts of a token are added up.
    inverse_order = torch.empty_like(order)
    inverse_order[order] = torch.arange(order.numel(), device=order.device)
    return row_outputs[inverse_order].view(*expert_ids.shape, -1).sum(dim=1).to(hidden.dtype)


def _expert_product(
    module: Any,
    name: str,
    rows: Tensor,
    *,
    row_experts: Tensor,
    offsets: Tensor,
    lora_updates: dict[str, LoraUpdate] | None,
    dtype: torch.dtype,
) -> Tensor:
    """One product of a layer's experts: `rows @ W.T`, each row with its expert's weight `name`, its update and its bias.

    `rows [S, in]` are sorted by expert. `row_experts [S]`: the expert of each row. `offsets [E]`: where each expert's rows end.
    `lora_updates`: updates by name of the weight. `dtype`: in which quantised weights are dequantised; others are computed with
    in their own type.
    """
    weight = getattr(module, name)
    quantised: DequantisesExperts | None = getattr(module, "packed_experts", None)
    if quantised is None:
        dtype = weight.dtype
    # Quantised weights are dequantised inside the product, and again in its backward pass: they are never kept.
    read_weights = _as_stored if quantised is None else partial(quantised.dequantise, name, dtype=dtype)
    frozen = FrozenWeights(read_weights, offsets, module.is_transposed)
    if lora_updates is None:
        output = _GroupedFrozenProduct.apply(rows.to(dtype), weight, frozen)
    else:
        # The kernel takes matrices whose rows are a multiple of 16 bytes long.
        update = lora_updates[name].with_aligned_rank(dtype)
        output = _GroupedLoraProduct.apply(rows.to(dtype), weight, update.down, update.up, update.scaling, frozen)
    if module.has_bias:
        output = output + getattr(module, f"{name}_bias")[row_experts].to(dtype)
    return output


def _as_stored(weight: Tensor) -> Tensor:
    return weight


@dataclass(frozen=True, slots=True)
class FrozenWeights:
    """How to read frozen weights, and which rows belong to which expert."""

    read_weights: Callable[[Tensor], Tensor]
    """Gives the weights `[E, ., .]` from the parameter that holds them, which may be quantised."""
    offsets: Tensor
    """`[E]` int32: where each expert's rows end."""
    is_transposed: bool
    """Whether weights are `[E, in, out]`, not `[E, out, in]`."""

    def product(self, x: Tensor, parameter: Tensor) -> Tensor:
        """`x @ W.T`, each row with its expert's W."""
        weight = self.read_weights(parameter)
        return grouped_product(x, weight if self.is_transposed else weight.mT, self.offsets)

    def gradient(self, grad: Tensor, parameter: Tensor) -> Tensor:
        """`grad @ W`."""
        weight = self.read_weights(parameter)
        return grouped_product(grad, weight.mT if self.is_transposed else weight, self.offsets)


class _GroupedFrozenProduct(torch.autograd.Function):
    """The product without an update. Saves the parameter, which may be quantised: the backward pass dequantises it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen_weight: Tensor, frozen: FrozenWeights) -> Tensor:
        ctx.save_for_backward(frozen_weight)
        ctx.frozen = frozen
        return frozen.product(x, frozen_weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (frozen_weight,) = ctx.saved_tensors
        return ctx.frozen.gradient(grad.contiguous(), frozen_weight), None, None


class _GroupedLoraProduct(torch.autograd.Function):
    """`x @ W.T + scaling * (x @ A.T) @ B.T`, each row with its expert's frozen W and its A and B; all of one data type.

    x `[S, in]` in groups of experts, A `[E, r, in]`, B `[E, out, r]`. What holds W is kept as the parameter it is: an engine
    that frees it after the forward pass gathers it again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, frozen_weight: Tensor, down: Tensor, up: Tensor, scaling: float, frozen: FrozenWeights
    ) -> Tensor:
        projected = grouped_product(x, down.mT, frozen.offsets)
        frozen_output = frozen.product(x, frozen_weight)
        ctx.save_for_backward(x, frozen_weight, down, up, projected)
        ctx.scaling = scaling
        ctx.frozen = frozen
        return torch.add(frozen_output, grouped_product(projected, up.mT, frozen.offsets), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        """The gradients of x, A (`down`) and B (`up`) of all experts; the frozen weight has none.

        `grad [S, out]`: of the output.
        """
        x, frozen_weight, down, up, projected = ctx.saved_tensors
        offsets = ctx.frozen.offsets
        grad = grad.contiguous()
        # Of `x @ A.T`, whose product with B was multiplied by `scaling`.
        grad_projected = grouped_product(grad, up, offsets) * ctx.scaling
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.frozen.gradient(grad, frozen_weight)
            grad_x = torch.add(grad_x, grouped_product(grad_projected, down, offsets))
        grad_down = _grouped_outer(grad_projected, x, offsets)
        grad_up = _grouped_outer(grad, projected, offsets) * ctx.scaling
        return grad_x, None, grad_down, grad_up, None, None


def _grouped_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """The gradient of each expert's weight: for expert e the product `left[rows of e].T @ right[rows of e]`, `[E, a, b]`.

    `left [S, a]` and `right [S, b]` have their rows sorted by expert. `offsets [E]`: where each expert's rows end. An expert
    without rows gets zeros.
    """
    if has_grouped_kernel(left, right, offsets):
        return torch.nn.functional.grouped_mm(left.mT, right, offs=offsets)
    products = left.new_zeros(offsets.numel(), left.shape[1], right.shape[1])
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(left[start:end].T, right[start:end], out=products[expert])
        start = end
    return products
