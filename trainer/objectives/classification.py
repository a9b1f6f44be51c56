"""One label a document, from the model's own sequence-classification head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from trainer.data.dataset import Sample


class Classification:
    """Terms: `loss` (summed cross-entropy over documents) and `accuracy` (documents labelled right)."""

    sequences_per_document = 1
    perplexity = False
    metrics: tuple[str, ...] = ()
    head_labels: int | None = 0
    uses_reference = False

    def counts(self, sample: Sample) -> dict[str, int]:
        """Every document has one label."""
        return {"loss": 1}

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Run padded rows; a label of -100 (a filler row of an evaluation batch) counts nothing."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        labels = batch["labels"]
        loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
        return {"loss": loss, "accuracy": (logits.argmax(-1) == labels).sum().float()}
