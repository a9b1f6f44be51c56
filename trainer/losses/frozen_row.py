"""Freezes one row of a weight: it gets no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _FreezeRow(torch.autograd.Function):
    """The identity for a weight; in the backward pass the gradient of one of its rows is set to 0."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, row: int) -> Tensor:
        ctx.row = row
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        grad = grad.clone()
        grad[ctx.row] = 0
        return grad, None


def freeze_row(weight: Tensor, row: int) -> Tensor:
    """`weight [V, H]` unchanged; its row `row` gets no gradient."""
    return _FreezeRow.apply(weight, row)  # type: ignore[no-any-return]
