"""Keeps one row of a weight from training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _RowStays(torch.autograd.Function):
    """The identity for a weight. One of its rows gets no gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, row: int) -> Tensor:
        ctx.row = row
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        grad = grad.clone()
        grad[ctx.row] = 0
        return grad, None


def without_row(weight: Tensor, row: int) -> Tensor:
    """`weight [V, H]` unchanged; its row `row` gets no gradient."""
    return _RowStays.apply(weight, row)  # type: ignore[no-any-return]
