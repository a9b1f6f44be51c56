"""The z-loss of the output logits, fused with the head like the next-token loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.losses.next_token import LossHead, _logits, _RowCrossEntropy, _weighted, computes_loss


@dataclass(frozen=True, slots=True)
class _SquaredLogsumexp:
    """Part of a head's call, in place of the plain loss: the sum over rows of the squared logsumexp of their logits."""

    kept: Tensor | None
    """`[N]`: 1 at rows that count, 0 at others; None where all count."""

    def __call__(self, head: LossHead, hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        weight, bias = head.training_weight, head.bias
        settings = head.softcap, head.logit_scale, torch.is_grad_enabled()
        nll: Any = _RowCrossEntropy.apply(hidden, weight, bias, targets, settings)
        # A row's negative log-likelihood of a token is its logsumexp without the logit of this token: here the first.
        first = _logits(hidden, weight[:1], None if bias is None else bias[:1], head.softcap, head.logit_scale)[:, 0]
        return (_weighted((nll + first).square(), self.kept).sum(),)


def squared_logsumexp(head: nn.Module, hidden: Tensor, kept: Tensor | None) -> Tensor:
    """The sum, 0-d float32, over the rows of `hidden [N, H]` where `kept [N]` is true; `head` is called once, as a module."""
    row_weight = None if kept is None else kept.float()
    if computes_loss(head):
        against = _SquaredLogsumexp(row_weight)
        (total,) = head(hidden, targets=hidden.new_zeros(len(hidden), dtype=torch.int64), against=against)
        return total
    return _weighted(head(hidden).float().logsumexp(-1).square(), row_weight).sum()
