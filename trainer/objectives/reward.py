"""A reward model: one score per answer from a classification head, learned from pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from strategies.settings import number
from trainer.data.batches.cutting import IGNORED_TARGET
from trainer.data.config import Layout
from trainer.model.config import ModelKind
from trainer.objectives.base import Objective, ObjectiveConfig, ObjectiveFamily, OtherSettings
from trainer.objectives.causal import counted_here
from trainer.objectives.pairs import PairDataSpec, pair_problems, pair_terms
from trainer.objectives.pooled import IS_SUPERVISED, PooledCollator, classifier_logits, gather_sequences


@dataclass(kw_only=True, slots=True)
class RewardConfig(ObjectiveConfig):
    """A reward model: one score an answer, the preferred one's higher (Bradley and Terry 1952)."""

    name: str = "reward"
    centre: float = number(0.0, least=0, advice="0 leaves it out; 0.01 as a rule")
    """Weight of the squared sum of a pair's scores, which keeps scores around zero (arXiv:2312.09244). 0: not added."""


def reward_problems(config: RewardConfig, other_settings: OtherSettings) -> Iterator[str]:
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
        """Compute the reward model's loss over pairs: the score of the chosen answer should exceed that of the rejected one.

        Sequences alternate, chosen and rejected; a pair without targets (a filler) counts nothing. If ranks share the row, all of
        them compute the loss of each pair, and one counts it.
        """
        scores = gather_sequences(batch, classifier_logits(model, batch)[:, 0])
        chosen, rejected = scores.view(-1, 2).unbind(1)
        # Rows without padding say for each sequence whether it has a target; of padded rows, one a sequence, the targets do.
        if IS_SUPERVISED in batch:
            is_supervised = batch[IS_SUPERVISED]
        else:
            is_supervised = (batch["targets"] != IGNORED_TARGET).any(dim=1)
        is_counted = is_supervised.view(-1, 2).all(dim=1).float() * counted_here(batch)
        losses = -F.logsigmoid(chosen - rejected)
        centring_weight = self.config.centre
        if centring_weight:
            losses = losses + centring_weight * (chosen + rejected).square()
        return pair_terms(losses, chosen, rejected, is_counted)


REWARD = ObjectiveFamily(
    settings=RewardConfig,
    data_spec=lambda config: PairDataSpec(collator=PooledCollator),
    build=lambda config, references: Reward(config),
    problems=reward_problems,
    kind=ModelKind.classifier,
    num_outputs=1,
    better_when_larger=("accuracy", "margin"),
)
