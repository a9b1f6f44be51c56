"""Scores of each row's target by the output head: its log-probability, and whether it is the likeliest token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.losses.next_token import CHUNK_LOGITS, LossHead, computes_loss, head_logits


def target_scores(
    head: nn.Module, hidden: Tensor, targets: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(log-probability of each target `[N]` float32, whether it is the argmax `[N]` bool) for `hidden [N, H]`.

    Calls the head as a module exactly once, as a sharded one must be. If it is a plain output layer, logits exist only a chunk at
    a time. `bias [V]`: what the model adds to the head's output. No gradients.
    """

    def score_logits(logits: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probability of each target `[n]`, whether it is the argmax `[n]`) for rows whose logits are `[n, V]`."""
        logits = logits.float()
        if bias is not None:
            logits = logits + bias
        log_probability = logits.log_softmax(-1).gather(1, target_ids[:, None])[:, 0]
        return log_probability, logits.argmax(-1) == target_ids

    def score_by_chunks(loss_head: LossHead, rows: Tensor, target_ids: Tensor) -> tuple[Tensor, ...]:
        """The same for a head's rows `[N, H]`, inside the head's own call; logits exist a chunk at a time."""
        weight = loss_head.training_weight
        chunk_rows = max(1, CHUNK_LOGITS // loss_head.weight.shape[0])
        log_probabilities = []
        is_argmax = []
        for chunk, chunk_ids in zip(rows.split(chunk_rows), target_ids.split(chunk_rows), strict=True):
            logits = head_logits(chunk, weight, loss_head.bias, loss_head.softcap, loss_head.logit_scale)
            chunk_log_probabilities, chunk_is_argmax = score_logits(logits, chunk_ids)
            log_probabilities.append(chunk_log_probabilities)
            is_argmax.append(chunk_is_argmax)
        return torch.cat(log_probabilities), torch.cat(is_argmax)

    if computes_loss(head):
        return head(hidden, targets=targets, comparison=score_by_chunks)
    return score_logits(head(hidden), targets)
