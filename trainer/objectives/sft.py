"""Supervised fine-tuning and continued pre-training: the next-token loss on supervised tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer.data.store.sequences import REPLAY
from trainer.heads.divergence import Against, Divergence, Measure
from trainer.objectives.base import ForgettingConfig
from trainer.objectives.causal import summed_loss, supervised_rows

if TYPE_CHECKING:
    from trainer.data.store.sequences import Sample
    from trainer.objectives.teacher import Teacher


class Sft:
    """Terms: `loss` (summed cross-entropy, carries the gradient) and `accuracy` (correct argmaxes, evaluation only)."""

    sequences_per_document = 1
    perplexity = True
    metrics: tuple[str, ...] = ()
    head_labels: int | None = None
    uses_reference = False
    looks_ahead = False

    def counts(self, sample: Sample) -> dict[str, int]:
        """Supervised targets: a document's first token has none. Those of replayed documents are counted once more."""
        learned = int(sample.supervised[1:].sum())
        return {"loss": learned} if sample.replay is None else {"loss": learned, REPLAY: learned * sample.replay}

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Run the decoder on all tokens and the head on supervised rows only."""
        loss, correct = summed_loss(model, batch)
        return {"loss": loss, "accuracy": correct.detach()}


class Replaying(Sft):
    """Beside the loss, KL(before, now) on the supervised rows of replayed documents: a mean over their tokens.

    Terms in training, all to be divided by the count of `loss`: `loss`, the sum of both with the gradient, and its parts
    `sft_loss` and `replay_kl`. Evaluation has the plain loss.
    """

    metrics: tuple[str, ...] = ("sft_loss", "replay_kl")

    def __init__(self, config: ForgettingConfig, before: Teacher) -> None:
        self.config, self.before = config, before

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Run the decoder once on all tokens, and the model before training on the replayed documents."""
        if not torch.is_grad_enabled():
            return super().terms(model, batch)
        before_head, before = self.before(model, batch["replay"])
        head, selected, targets = supervised_rows(model, batch)
        learned, replayed = batch["totals"]["loss"], batch["totals"][REPLAY]
        # The loop divides by all learned tokens; these turn that into a division by their own number.
        per_replayed = learned / max(1, replayed)
        per_other = 1.0 if self.config.replay_loss else learned / max(1, learned - replayed)
        total, replayed_nll, apart, _, nll = head(
            selected,
            targets=targets,
            against=Against(
                measure=Measure(Divergence.forward_kl),
                hidden=before,
                head=before_head,
                divergence_weight=self.config.kl_weight * per_replayed,
                loss_weight=float(self.config.replay_loss),
                rows=batch["replay_rows"],
                others=batch["other_rows"],
                others_weight=per_other,
            ),
        )
        nll = nll + replayed_nll if self.config.replay_loss else nll * per_other
        return {"loss": total, "sft_loss": nll.detach(), "replay_kl": apart.detach() * per_replayed}
