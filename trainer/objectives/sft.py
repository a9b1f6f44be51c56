"""Supervised fine-tuning: the next-token loss on supervised tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from trainer.objectives.causal import summed_loss

if TYPE_CHECKING:
    from trainer.data.dataset import Sample


class Sft:
    """Terms: `loss` (summed cross-entropy, carries the gradient) and `accuracy` (correct argmaxes, evaluation only)."""

    sequences_per_document = 1
    perplexity = True
    metrics: tuple[str, ...] = ()
    head_labels: int | None = None
    uses_reference = False

    def counts(self, sample: Sample) -> dict[str, int]:
        """Supervised targets: a document's first token has none."""
        return {"loss": int(sample.supervised[1:].sum())}

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Run the decoder on all tokens and the head on supervised rows only."""
        loss, correct = summed_loss(model, batch)
        return {"loss": loss, "accuracy": correct.detach()}
