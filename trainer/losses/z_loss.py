"""The z-loss of the output logits, fused with the head like the next-token loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.losses.next_token import HeadSettings, LossHead, _RowCrossEntropy, computes_loss, head_logits, weight_rows


@dataclass(frozen=True, slots=True)
class _SumOfSquaredLogsumexp:
    """Passed to a head's call to compute, in place of the plain loss, the sum over rows of the squared logsumexp."""

    row_weights: Tensor | None
    """`[N]`: 1 for rows that count, 0 for others; None: all count."""

    def __call__(self, head: LossHead, hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """The z-loss inside a head's call: the weighted sum over rows `hidden [N, H]` of their squared logsumexp.

        All `targets` must be 0. A tuple, as a head expects of every comparison.
        """
        weight = head.training_weight
        bias = head.bias
        settings = HeadSettings(head.softcap, head.logit_scale, torch.is_grad_enabled())
        nll: Any = _RowCrossEntropy.apply(hidden, weight, bias, targets, settings)
        # The negative log-likelihood of a token is the logsumexp minus the token's logit. Adding the logit back gives the
        # logsumexp. The targets are token 0 here, so only one row of the weight is needed for that.
        first_bias = None if bias is None else bias[:1]
        first_logit = head_logits(hidden, weight[:1], first_bias, head.softcap, head.logit_scale)[:, 0]
        return (weight_rows((nll + first_logit).square(), self.row_weights).sum(),)


def sum_of_squared_logsumexp(head: nn.Module, hidden: Tensor, counted_rows: Tensor | None) -> Tensor:
    """The sum over rows of the squared logsumexp of their logits, 0-d float32: the z-loss of the output before it is weighted.

    It keeps logits from growing. `hidden [N, H]`: the rows. `counted_rows [N]`: bool, the rows that count; None: all. Calls
    `head` once, as a module.
    """
    row_weights = None if counted_rows is None else counted_rows.float()
    if computes_loss(head):  # it computes this in its own call, in place of the loss
        comparison = _SumOfSquaredLogsumexp(row_weights)
        token_0 = hidden.new_zeros(len(hidden), dtype=torch.int64)  # any target does, if its logit is known
        (total,) = head(hidden, targets=token_0, comparison=comparison)
        return total
    return weight_rows(head(hidden).float().logsumexp(-1).square(), row_weights).sum()
