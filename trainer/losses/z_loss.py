"""The z-loss of the output logits, fused with the head like the next-token loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.losses.next_token import HeadSettings, LossHead, _logits, _RowCrossEntropy, _weighted, computes_loss


@dataclass(frozen=True, slots=True)
class _SquaredLogsumexp:
    """Passed to a head's call to compute, in place of the plain loss, the sum over rows of the squared logsumexp."""

    row_weight: Tensor | None
    """`[N]`: 1 for rows that count, 0 for others; None: all count."""

    def __call__(self, head: LossHead, hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """(the weighted sum over rows of their squared logsumexp,), for rows `hidden [N, H]`; all `targets` must be 0."""
        weight = head.training_weight
        bias = head.bias
        settings = HeadSettings(head.softcap, head.logit_scale, torch.is_grad_enabled())
        nll: Any = _RowCrossEntropy.apply(hidden, weight, bias, targets, settings)
        # The negative log-likelihood of a token is the logsumexp minus the token's logit. Adding the logit back gives the
        # logsumexp. The targets are token 0 here, so only one row of the weight is needed for that.
        first_bias = None if bias is None else bias[:1]
        first_logit = _logits(hidden, weight[:1], first_bias, head.softcap, head.logit_scale)[:, 0]
        return (_weighted((nll + first_logit).square(), self.row_weight).sum(),)


def squared_logsumexp(head: nn.Module, hidden: Tensor, counted_rows: Tensor | None) -> Tensor:
    """The sum, 0-d float32, over the rows of `hidden [N, H]` that `counted_rows [N]` marks; None marks all.

    Calls `head` once, as a module.
    """
    row_weight = None if counted_rows is None else counted_rows.float()
    if computes_loss(head):
        comparison = _SquaredLogsumexp(row_weight)
        (total,) = head(hidden, targets=hidden.new_zeros(len(hidden), dtype=torch.int64), comparison=comparison)
        return total
    return _weighted(head(hidden).float().logsumexp(-1).square(), row_weight).sum()
