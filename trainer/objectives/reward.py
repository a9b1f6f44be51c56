"""A reward model: one score an answer from a classification head, learned from pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.objectives.base import RewardConfig

if TYPE_CHECKING:
    from trainer.data.store.sequences import Sample


class Reward:
    """Terms, all summed over pairs: `loss` (Bradley and Terry's), and the `margin`, `accuracy` and scores of the pairs."""

    sequences_per_document = 2
    perplexity = False
    metrics: tuple[str, ...] = ("margin", "accuracy", "chosen_reward", "rejected_reward")
    head_labels: int | None = 1
    uses_reference = False
    looks_ahead = False

    def __init__(self, config: RewardConfig) -> None:
        self.config = config

    def counts(self, sample: Sample) -> dict[str, int]:
        """A pair counts once, with its chosen answer."""
        return {"loss": 0 if sample.rejected else 1}

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Score padded rows, chosen and rejected in turn; a pair without targets (a filler) counts nothing."""
        scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        chosen, rejected = scores.view(-1, 2).unbind(1)
        counted = (batch["targets"] != -100).any(dim=1).view(-1, 2).all(dim=1).float()
        losses = -F.logsigmoid(chosen - rejected)
        if self.config.centre:
            losses = losses + self.config.centre * (chosen + rejected).square()
        chosen, rejected = chosen.detach(), rejected.detach()
        return {
            "loss": (losses * counted).sum(),
            "margin": ((chosen - rejected) * counted).sum(),
            "accuracy": ((chosen > rejected).float() * counted).sum(),
            "chosen_reward": (chosen * counted).sum(),
            "rejected_reward": (rejected * counted).sum(),
        }
