"""Scores of the output head for each row's target: its log-probability, and whether it is the likeliest token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.losses.next_token import CHUNK_LOGITS, LossHead, _logits, computes_loss


def row_scores(head: nn.Module, hidden: Tensor, targets: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Log-probability `[N]` float32 of `targets [N]` by `hidden [N, H]`, and whether each is the argmax, `[N]` bool.

    The head is called as a module exactly once, as a sharded one must be, and logits exist a chunk at a time where it is a
    plain output layer. `bias [V]` is what the model adds to the head's output. No gradients.
    """

    def scored(logits: Tensor, wanted_ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.float() if bias is None else logits.float() + bias
        log_probability = logits.log_softmax(-1).gather(1, wanted_ids[:, None])[:, 0]
        return log_probability, logits.argmax(-1) == wanted_ids

    def by_chunks(plain: LossHead, rows: Tensor, wanted_ids: Tensor) -> tuple[Tensor, ...]:
        weight, chunk_rows = plain.training_weight, max(1, CHUNK_LOGITS // plain.weight.shape[0])
        chunks = [
            scored(_logits(chunk, weight, plain.bias, plain.softcap, plain.logit_scale), chunk_targets)
            for chunk, chunk_targets in zip(rows.split(chunk_rows), wanted_ids.split(chunk_rows), strict=True)
        ]
        return torch.cat([log_probability for log_probability, _ in chunks]), torch.cat(
            [is_best for _, is_best in chunks]
        )

    if computes_loss(head):
        return head(hidden, targets=targets, against=by_chunks)
    return scored(head(hidden), targets)
