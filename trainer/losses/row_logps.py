"""Log-probability of each supervised token at a temperature, with its gradient, and the entropy of each distribution.

Both come out of the output head's own call, like the next-token loss: logits exist only at supervised rows, a chunk at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.losses.next_token import HeadSettings, LossHead, _RowCrossEntropy, computes_loss


@dataclass(frozen=True, slots=True)
class _RowLogps:
    """Passed to a head's call to compute log-probabilities by row in place of the plain loss."""

    temperature: float
    """Logits are divided by it."""

    def __call__(self, head: LossHead, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Compute inside a head's call what `row_logps` returns, for rows `hidden [N, H]` with `targets [N]`."""
        # A soft cap c and a factor s give c tanh(s x / c). Divided by the temperature that is the same function with both
        # c and s divided by it, so values and gradients need no code of their own.
        softcap = None if head.softcap is None else head.softcap / self.temperature
        settings = HeadSettings(softcap, head.logit_scale / self.temperature, torch.is_grad_enabled())
        # True: with the entropies.
        results: Any = _RowCrossEntropy.apply(hidden, head.training_weight, head.bias, targets, settings, True)
        nll, entropy = results
        return -nll, entropy


def row_logps(head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's target and entropy in nats of its distribution, `[N]` float32, for reinforcement learning.

    `hidden [N, H]`: the rows' states. Logits are divided by `temperature` first. Gradients flow through the log-probabilities
    alone. Calls `head` exactly once, as a module, also for no rows: a sharded head is gathered on all ranks together.
    """
    if computes_loss(head):  # it computes `_RowLogps` in its own call, in place of the loss
        return head(hidden, targets=targets, comparison=_RowLogps(temperature))
    # An adapter on the head adds to its logits, so these must be made.
    log_probabilities = (head(hidden).float() / temperature).log_softmax(-1)
    with torch.no_grad():
        # -p log p of each token: 0, not nan, for an impossible one (log-probability -inf).
        entropy = torch.special.entr(log_probabilities.exp()).sum(-1)
    return log_probabilities.gather(1, targets[:, None])[:, 0], entropy
