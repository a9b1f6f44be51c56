"""A reward model: one score per answer from a classification head, learned from pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from strategies.settings import number
from trainer.data.config import Layout
from trainer.model.config import ModelKind
from trainer.objectives.base import Family, Objective, ObjectiveConfig, OtherSettings
from trainer.objectives.pairs import PairDataSpec, pair_problems, pair_terms


@dataclass(kw_only=True, slots=True)
class RewardConfig(ObjectiveConfig):
    """A reward model: one score an answer, the preferred one's higher (Bradley and Terry 1952)."""

    name: str = "reward"
    centre: float = number(0.0, least=0, advice="0 leaves it out; 0.01 as a rule")
    """Weight of the squared sum of a pair's scores, which keeps scores around zero (arXiv:2312.09244); 0 leaves it out."""


def problems(config: RewardConfig, other_settings: OtherSettings) -> Iterator[str]:
    """What pairs ask of the data, and a score of its layout."""
    yield from pair_problems(config, other_settings)
    if other_settings.data.layout is Layout.padding_free:
        yield "data.layout=padding_free: a score belongs to a row of its own; set data.layout=auto"


class Reward(Objective):
    """Terms, all summed over pairs: `loss` (Bradley and Terry's), and the `margin`, `accuracy` and scores of the pairs."""

    metrics = ("margin", "accuracy", "chosen_reward", "rejected_reward")

    def __init__(self, config: RewardConfig) -> None:
        self.config = config

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Score padded rows, chosen and rejected in turn; a pair without targets (a filler) counts nothing."""
        scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        chosen, rejected = scores.view(-1, 2).unbind(1)
        is_counted = (batch["targets"] != -100).any(dim=1).view(-1, 2).all(dim=1).float()
        losses = -F.logsigmoid(chosen - rejected)
        if self.config.centre:
            losses = losses + self.config.centre * (chosen + rejected).square()
        return pair_terms(losses, chosen, rejected, is_counted)


REWARD = Family(
    settings=RewardConfig,
    data_spec=lambda config: PairDataSpec(),
    build=lambda config, references: Reward(config),
    problems=problems,
    kind=ModelKind.classifier,
    num_outputs=1,
    better_when_larger=("accuracy", "margin"),
)
