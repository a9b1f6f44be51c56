"""Scores of each row's target by the output head: its log-probability, and whether it is the likeliest token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.losses.next_token import CHUNK_LOGITS, LossHead, computes_loss, head_logits


@dataclass(frozen=True, slots=True)
class _TargetScores:
    """Passed to a head's call to score targets in place of the loss; the head calls it while its weight is whole."""

    bias: Tensor | None
    """`[V]`: what the model adds to the head's output; None if nothing."""

    def __call__(self, head: LossHead, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Score the target of each row of `hidden [N, H]` in chunks: (log-probability `[N]`, whether it is the argmax `[N]`)."""
        weight = head.training_weight
        chunk_rows = max(1, CHUNK_LOGITS // weight.shape[0])
        log_probabilities = []
        is_argmax = []
        for chunk, chunk_targets in zip(hidden.split(chunk_rows), targets.split(chunk_rows), strict=True):
            logits = head_logits(chunk, weight, head.bias, head.softcap, head.logit_scale)
            chunk_log_probabilities, chunk_is_argmax = self.of_logits(logits, chunk_targets)
            log_probabilities.append(chunk_log_probabilities)
            is_argmax.append(chunk_is_argmax)
        return torch.cat(log_probabilities), torch.cat(is_argmax)

    def of_logits(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Score the targets for logits `[n, V]` of the head: (log-probability of each `[n]` float32, whether it is the argmax
        `[n]` bool).
        """
        logits = logits.float()
        if self.bias is not None:
            logits = logits + self.bias
        log_probability = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return log_probability, logits.argmax(-1) == targets


def target_scores(
    head: nn.Module, hidden: Tensor, targets: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Score each row's target by the model's head: (its log-probability `[N]` float32, whether it is the argmax `[N]` bool).

    For evaluations of given answers. `hidden [N, H]`. Calls the head as a module exactly once, as a sharded one must be. If it
    is a plain output layer, logits exist only a chunk at a time. `bias [V]`: what the model adds to the head's output. To be
    called without gradients, which would keep the logits of all chunks.
    """
    scores = _TargetScores(bias)
    if computes_loss(head):
        # The head calls `scores` while its weight is gathered, and returns what that returns.
        return head(hidden, targets=targets, comparison=scores)
    return scores.of_logits(head(hidden), targets)  # of a head with an adapter, which must make all logits
