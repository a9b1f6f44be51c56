"""Learning from pairs of a chosen and a rejected answer to one prompt.

Every loss is a sum over pairs, divided by the number of pairs of the whole step: where a method takes a mean over
tokens (ORPO, SimPO, IPO, the share of plain fine-tuning), it is the mean over the tokens of one answer. A pair then
weighs the same whatever lies beside it in the micro-batch, under every strategy; TRL averages ORPO's own loss and the
plain share over the tokens of a batch instead, so that long answers weigh more there.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strategies.settings import DESCRIBES, number, setting
from trainer.objectives.base import (
    Objective,
    ObjectiveConfig,
    ObjectiveFamily,
    OtherSettings,
    Reference,
    ReferenceModels,
)
from trainer.objectives.causal import counted_here, reference_logps, sequence_logps
from trainer.objectives.pairs import PairDataSpec, pair_problems, pair_terms


class PairLoss(StrEnum):
    """How DPO turns the difference of two rewards into a loss."""

    sigmoid = "sigmoid"
    ipo = "ipo"
    hinge = "hinge"


@dataclass(kw_only=True, slots=True)
class DpoConfig(ObjectiveConfig):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) against the model as it was."""

    name: str = "dpo"
    beta: float = number(0.1, above=0, advice="0.1 for dpo, kto and orpo, 2 for simpo")
    """How closely the model stays to the reference model. Larger is closer. With `ipo` it is the paper's tau."""
    loss_type: PairLoss = setting(PairLoss.sigmoid, reach=DESCRIBES)
    """`sigmoid` (DPO), `ipo` (Azar et al. 2023, arXiv:2310.12036, per token) or `hinge` (SLiC, arXiv:2305.10425)."""
    label_smoothing: float = number(0.0, least=0, below=0.5, advice="0 trusts every label or pair; 0.1 as a rule")
    """Share of pairs that are assumed to be labelled the wrong way round, 0 to below 0.5 (conservative DPO). Only for
    `sigmoid`."""
    sft_weight: float = number(0.0, least=0, advice="0 leaves it out; 0.1 to 1 as a rule")
    """Weight of the chosen answer's cross-entropy loss (mean over its tokens), added to the loss of each pair. 0: not added."""


@dataclass(kw_only=True, slots=True)
class OrpoConfig(ObjectiveConfig):
    """Odds-ratio preference optimisation (Hong et al. 2024, arXiv:2403.07691): SFT and preference at once, no reference."""

    name: str = "orpo"
    beta: float = number(0.1, above=0, advice="0.1 for dpo, kto and orpo, 2 for simpo")
    """Weight of the odds-ratio loss, added to the chosen answer's cross-entropy loss (lambda in the paper)."""


@dataclass(kw_only=True, slots=True)
class SimpoConfig(ObjectiveConfig):
    """Simple preference optimisation (Meng et al. 2024, arXiv:2405.14734): mean log-probabilities, no reference."""

    name: str = "simpo"
    beta: float = number(2.0, above=0, advice="0.1 for dpo, kto and orpo, 2 for simpo")
    """Scale of the reward: beta times the mean log-probability of the answer's tokens."""
    gamma: float = number(1.0, least=0, advice="half of objective.beta as a rule")
    """Margin by which the chosen answer's reward should exceed that of the rejected one. About half of beta is usual."""
    label_smoothing: float = number(0.0, least=0, below=0.5, advice="0 trusts every label or pair; 0.1 as a rule")
    """Share of pairs that are assumed to be labelled the wrong way round, 0 to below 0.5."""
    sft_weight: float = number(0.0, least=0, advice="0 leaves it out; 0.1 to 1 as a rule")
    """Weight of the chosen answer's cross-entropy loss (mean over its tokens), added to the loss of each pair. 0: not added."""


def preference_problems(config: DpoConfig | OrpoConfig | SimpoConfig, other_settings: OtherSettings) -> Iterator[str]:
    """What is wrong with the data settings for pairs, and with the objective's own."""
    yield from pair_problems(config, other_settings)
    if isinstance(config, DpoConfig) and config.label_smoothing and config.loss_type is not PairLoss.sigmoid:
        yield (
            f"objective.label_smoothing={config.label_smoothing:g}: objective.loss_type={config.loss_type} knows "
            "no doubt about labels; set it to 0, or objective.loss_type=sigmoid"
        )


MAX_MEAN_LOGP = -1e-6
"""Upper bound of a mean log-probability in the odds ratio: at 0 (certainty) the odds would be infinite."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Log-probabilities of both answers of each pair, `[P]` each, float32."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    """Number of tokens of each chosen answer."""
    rejected_tokens: Tensor
    reference_chosen: Tensor
    """Zeros where no reference is used."""
    reference_rejected: Tensor

    def mean_logps(self) -> tuple[Tensor, Tensor]:
        """(chosen, rejected): the mean log-probability of a token of each answer."""
        chosen = self.chosen / self.chosen_tokens.clamp(min=1)
        rejected = self.rejected / self.rejected_tokens.clamp(min=1)
        return chosen, rejected


class PairLosses(NamedTuple):
    """What an objective makes of pairs, `[P]` each."""

    losses: Tensor
    chosen_rewards: Tensor
    """The reward of each chosen answer that the model's log-probability of it implies: beta times it, as the method has it."""
    rejected_rewards: Tensor


class Preference(Objective):
    """A loss over pairs. Terms: `loss` (summed over pairs, carries the gradient), and sums of the pairs' `margin` of
    rewards, `accuracy` (the chosen answer's reward is the larger), `chosen_reward` and `rejected_reward`."""

    metrics = ("margin", "accuracy", "chosen_reward", "rejected_reward")

    def __init__(self, config: Any, reference: Reference | None = None) -> None:
        self.config = config
        self.reference = reference

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the terms of a loss over pairs by name, summed over the micro-batch.

        Chosen and rejected answers run in one pass. A pair without supervised tokens (a filler) adds nothing.
        """
        reference = None
        if self.uses_reference:  # before the model itself, so that its activations are not held meanwhile
            reference = reference_logps(model, batch, self.reference)
        logps, num_tokens = sequence_logps(model, batch)
        if reference is None:
            reference = torch.zeros_like(logps)
        # Sequences alternate: the chosen answer of a pair, then its rejected one.
        chosen_logps, rejected_logps = logps.view(-1, 2).unbind(1)
        chosen_tokens, rejected_tokens = num_tokens.view(-1, 2).unbind(1)
        reference_chosen, reference_rejected = reference.view(-1, 2).unbind(1)
        pairs = Pairs(
            chosen=chosen_logps,
            rejected=rejected_logps,
            chosen_tokens=chosen_tokens,
            rejected_tokens=rejected_tokens,
            reference_chosen=reference_chosen,
            reference_rejected=reference_rejected,
        )
        losses, chosen_rewards, rejected_rewards = self.losses(pairs)
        has_both = (pairs.chosen_tokens > 0) & (pairs.rejected_tokens > 0)
        # Ranks that share a row all know the loss of its pairs: one of them counts it.
        is_counted = has_both.float() * counted_here(batch)
        return pair_terms(losses, chosen_rewards, rejected_rewards, is_counted)

    @abstractmethod
    def losses(self, pairs: Pairs) -> PairLosses:
        """The loss of each pair, and the rewards of its two answers."""


class Dpo(Preference):
    """Direct preference optimisation (Rafailov et al. 2023), IPO (Azar et al. 2023) and SLiC's hinge (Zhao et al. 2023).

    The reference is the model before training. With an adapter it is the same model with the adapter off, one more
    forward pass without gradients; else its log-probabilities were recorded and come with the batch.
    """

    uses_reference = True
    config: DpoConfig

    def losses(self, pairs: Pairs) -> PairLosses:
        """DPO's loss of each pair, or one of its kin, and the rewards of its two answers.

        A reward is beta times the log-probability of an answer, less that under the reference model. The loss by `loss_type`:
        hinge (as in SLiC), ipo, else DPO's logistic loss; with `sft_weight` also the chosen answer's loss per token.
        """
        config = self.config
        chosen_log_ratio = pairs.chosen - pairs.reference_chosen
        rejected_log_ratio = pairs.rejected - pairs.reference_rejected
        difference = chosen_log_ratio - rejected_log_ratio
        if config.loss_type is PairLoss.hinge:
            losses = F.relu(1 - config.beta * difference)
        elif config.loss_type is PairLoss.ipo:
            # Per token, as IPO's authors have confirmed to TRL: sums would make the square grow with the length.
            chosen_mean = chosen_log_ratio / pairs.chosen_tokens.clamp(min=1)
            rejected_mean = rejected_log_ratio / pairs.rejected_tokens.clamp(min=1)
            losses = (chosen_mean - rejected_mean - 1 / (2 * config.beta)).square()
        else:
            losses = smoothed_logistic(config.beta * difference, config.label_smoothing)
        if config.sft_weight:
            chosen_mean_logps, _ = pairs.mean_logps()
            losses = losses - config.sft_weight * chosen_mean_logps
        return PairLosses(losses, config.beta * chosen_log_ratio, config.beta * rejected_log_ratio)


class Orpo(Preference):
    """Odds-ratio preference optimisation (Hong et al. 2024): the chosen answer's mean loss, and the log odds ratio."""

    config: OrpoConfig

    def losses(self, pairs: Pairs) -> PairLosses:
        """ORPO's loss of each pair (arXiv:2403.07691, equations 6 and 7), and the rewards of its two answers.

        A reward is beta times the mean log-probability of a token, as in TRL.
        """
        chosen_logps, rejected_logps = pairs.mean_logps()
        # The odds of a probability p are p / (1 - p).
        log_odds_ratio = (chosen_logps - rejected_logps) - (
            _log_complement(chosen_logps) - _log_complement(rejected_logps)
        )
        beta = self.config.beta
        losses = -chosen_logps - beta * F.logsigmoid(log_odds_ratio)
        return PairLosses(losses, beta * chosen_logps, beta * rejected_logps)


class Simpo(Preference):
    """Simple preference optimisation (Meng et al. 2024): rewards are beta times the mean log-probability of a token."""

    config: SimpoConfig

    def losses(self, pairs: Pairs) -> PairLosses:
        """SimPO's loss of each pair, and the rewards of its two answers.

        The chosen answer's reward should exceed the rejected one's by gamma. With `sft_weight` the loss also has the chosen
        answer's loss per token.
        """
        config = self.config
        chosen_logps, rejected_logps = pairs.mean_logps()
        reward_margin = config.beta * (chosen_logps - rejected_logps)
        losses = smoothed_logistic(reward_margin - config.gamma, config.label_smoothing)
        if config.sft_weight:
            losses = losses - config.sft_weight * chosen_logps
        return PairLosses(losses, config.beta * chosen_logps, config.beta * rejected_logps)


def smoothed_logistic(logits: Tensor, smoothing: float) -> Tensor:
    """Logistic loss of each logit, with the share `smoothing` of the labels believed to be wrong."""
    losses = -F.logsigmoid(logits)
    if not smoothing:
        return losses
    return losses * (1 - smoothing) - F.logsigmoid(-logits) * smoothing


def _log_complement(logp: Tensor) -> Tensor:
    """log(1 - exp(logp)) without cancellation, by one of two forms on either side of log(1/2) (Maechler 2012)."""
    logp = logp.clamp(max=MAX_MEAN_LOGP)
    return torch.where(logp < -0.6931472, torch.log1p(-torch.exp(logp)), torch.log(-torch.expm1(logp)))


def pair_family(settings: type[ObjectiveConfig], loss: type[Preference]) -> ObjectiveFamily:
    """Build the family (everything the trainer asks of an objective) of an objective that learns from pairs of answers.

    `loss`: says whether it uses a reference, so that the reference's log-probabilities are recorded with the data.
    """

    def build(config: Any, references: ReferenceModels) -> Objective:
        return loss(config, references.reference)

    return ObjectiveFamily(
        settings=settings,
        data_spec=lambda config: PairDataSpec(uses_reference=loss.uses_reference),
        build=build,
        problems=preference_problems,
        better_when_larger=("accuracy", "margin"),
    )


DPO = pair_family(DpoConfig, Dpo)
ORPO = pair_family(OrpoConfig, Orpo)
SIMPO = pair_family(SimpoConfig, Simpo)
