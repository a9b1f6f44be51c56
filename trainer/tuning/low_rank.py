"""Experts with frozen weights and optional low-rank adapters: products grouped by expert, weights never added up.

peft adds the update to the weights first. That makes one more copy of all experts of a layer in every forward pass,
and keeps it for the backward pass, including experts that no token chose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.tuning.compat.transformers import gated, grouped_product, has_grouped_kernel, is_expert_parallel

ALIGNMENT = 16
"""Bytes of which the rows of grouped products must be a multiple."""


@dataclass(slots=True)
class LowRank:
    """The update `scaling * up @ down` of each expert's weight `[out, in]`."""

    down: Tensor
    """`[E, r, in]`."""
    up: Tensor
    """`[E, out, r]`."""
    scaling: float

    def aligned(self, dtype: torch.dtype) -> LowRank:
        """The same update in `dtype`, with a rank (filled with zeros) that grouped products take."""
        rank, step = self.down.shape[1], ALIGNMENT // dtype.itemsize
        missing = -rank % step
        down = torch.nn.functional.pad(self.down.to(dtype), (0, 0, 0, missing))
        up = torch.nn.functional.pad(self.up.to(dtype), (0, missing))
        return LowRank(down.contiguous(), up.contiguous(), self.scaling)


def frozen_experts(
    module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor, low_rank: dict[str, LowRank] | None
) -> Tensor:
    """As transformers' grouped experts, whose settings `module` has, with `low_rank` updates of its frozen weights.

    hidden `[T, H]`, chosen and weights `[T, k]`; returns `[T, H]` in the type of `hidden`. Weights may be stored packed
    (`module.packed_experts`); they are then numbers of the type of `hidden` for the moment of each product.
    """
    assert not is_expert_parallel(module), "experts are not split over ranks here"
    top = chosen.shape[-1]
    # One row for each pair of token and expert, those of one expert together.
    ids, order = torch.sort(chosen.reshape(-1))
    rows = hidden[order // top]
    offsets = torch.searchsorted(ids, torch.arange(module.num_experts, device=ids.device), right=True).to(torch.int32)

    packed = getattr(module, "packed_experts", None)

    def product(rows: Tensor, name: str) -> Tensor:
        weight = getattr(module, name)
        dtype = weight.dtype if packed is None else hidden.dtype
        read = _as_it_is if packed is None else partial(packed.whole, name, dtype=dtype)
        frozen = FrozenWeights(read, offsets, module.is_transposed)
        if low_rank is None:
            made = _GroupedFrozen.apply(rows.to(dtype), weight, frozen)
        else:
            part = low_rank[name].aligned(dtype)
            made = _GroupedLowRank.apply(rows.to(dtype), weight, part.down, part.up, part.scaling, frozen)
        return made + getattr(module, f"{name}_bias")[ids].to(dtype) if module.has_bias else made

    if module.has_gate:
        inner = gated(module, product(rows, "gate_up_proj"))
    else:
        inner = module.act_fn(product(rows, "up_proj"))
    out = product(inner, "down_proj")
    if getattr(module, "has_post_expert_norm", False):
        out = module.post_expert_norm(out)
    out = out * weights.reshape(-1)[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return out[back].view(*chosen.shape, -1).sum(dim=1).to(hidden.dtype)


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


@dataclass(frozen=True, slots=True)
class FrozenWeights:
    """What a product with frozen weights goes by."""

    read: Callable[[Tensor], Tensor]
    """The weights `[E, ., .]` out of the parameter that holds them."""
    offsets: Tensor
    """`[E]`: where each expert's rows end."""
    transposed: bool
    """Whether weights are `[E, in, out]`, not `[E, out, in]`."""

    def product(self, x: Tensor, parameter: Tensor) -> Tensor:
        """`x @ W.T`, each row with its expert's W."""
        weight = self.read(parameter)
        return grouped_product(x, weight if self.transposed else weight.mT, self.offsets)

    def gradient(self, grad: Tensor, parameter: Tensor) -> Tensor:
        """`grad @ W`."""
        weight = self.read(parameter)
        return grouped_product(grad, weight.mT if self.transposed else weight, self.offsets)


class _GroupedFrozen(torch.autograd.Function):
    """The product alone; the parameter is kept as it is, and read again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor, frozen: FrozenWeights) -> Tensor:
        ctx.save_for_backward(parameter)
        ctx.frozen = frozen
        return frozen.product(x, parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (parameter,) = ctx.saved_tensors
        return ctx.frozen.gradient(grad.contiguous(), parameter), None, None


class _GroupedLowRank(torch.autograd.Function):
    """`x @ W.T + scaling * (x @ A.T) @ B.T`, each row with its expert's frozen W and its A and B; all of one data type.

    x `[S, in]` in groups of experts, A `[E, r, in]`, B `[E, out, r]`. What holds W is kept as the parameter it is: an engine
    that frees it after the forward pass gathers it again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parameter: Tensor, down: Tensor, up: Tensor, scaling: float, frozen: FrozenWeights
    ) -> Tensor:
        low = grouped_product(x, down.mT, frozen.offsets)
        out = frozen.product(x, parameter)
        ctx.save_for_backward(x, parameter, down, up, low)
        ctx.scaling, ctx.frozen = scaling, frozen
        return torch.add(out, grouped_product(low, up.mT, frozen.offsets), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, parameter, down, up, low = ctx.saved_tensors
        offsets, grad = ctx.frozen.offsets, grad.contiguous()
        grad_low = grouped_product(grad, up, offsets) * ctx.scaling
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.frozen.gradient(grad, parameter)
            grad_x = torch.add(grad_x, grouped_product(grad_low, down, offsets))
        grad_down = _outer(grad_low, x, offsets)
        grad_up = _outer(grad, low, offsets) * ctx.scaling
        return grad_x, None, grad_down, grad_up, None, None


def _outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """`left[group].T @ right[group]` for each group of rows: `[E, a, b]` of `[S, a]` and `[S, b]`."""
    if has_grouped_kernel(left, right, offsets):
        return torch.nn.functional.grouped_mm(left.mT, right, offs=offsets)
    made = left.new_zeros(offsets.numel(), left.shape[1], right.shape[1])
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(left[start:end].T, right[start:end], out=made[expert])
        start = end
    return made
