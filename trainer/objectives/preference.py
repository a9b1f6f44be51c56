"""Learning from pairs of answers to the same prompt, of which one was preferred.

Every loss is a sum over pairs, divided by the number of pairs of the whole step: where a method takes a mean over
tokens (ORPO, SimPO, IPO, the share of plain fine-tuning), it is the mean over the tokens of one answer. A pair then
weighs the same whatever lies beside it in the micro-batch, under every strategy; TRL averages ORPO's own loss and the
plain share over the tokens of a batch instead, so that long answers weigh more there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.objectives.base import DpoConfig, OrpoConfig, PairLoss, SimpoConfig
from trainer.objectives.causal import Reference, reference_logps, sequence_logps

if TYPE_CHECKING:
    from trainer.data.store.sequences import Sample

LEAST_LOG = -1e-6
"""Largest mean log-probability of a token that odds are computed of: certainty has none."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Log-probabilities of both answers of each pair, `[P]` each, float32."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    reference_chosen: Tensor
    """Zeros where no reference is used."""
    reference_rejected: Tensor

    def mean(self) -> tuple[Tensor, Tensor]:
        """Mean log-probabilities of a token of the chosen and of the rejected answer."""
        return self.chosen / self.chosen_tokens.clamp(min=1), self.rejected / self.rejected_tokens.clamp(min=1)


class Preference(ABC):
    """A loss over pairs. Terms: `loss` (summed over pairs, carries the gradient), and sums of the pairs' `margin` of
    rewards, `accuracy` (the chosen answer's reward is the larger), `chosen_reward` and `rejected_reward`."""

    sequences_per_document = 2
    perplexity = False
    metrics: tuple[str, ...] = ("margin", "accuracy", "chosen_reward", "rejected_reward")
    head_labels: int | None = None
    uses_reference = False
    looks_ahead = False

    def counts(self, sample: Sample) -> dict[str, int]:
        """A pair counts once, with its chosen answer."""
        return {"loss": 0 if sample.rejected else 1}

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Run chosen and rejected answers side by side; a pair without supervised tokens (a filler) counts nothing."""
        reference = self.reference_logps(model, batch) if self.uses_reference else None
        logps, tokens = sequence_logps(model, batch)
        before = torch.zeros_like(logps) if reference is None else reference
        pairs = Pairs(*(column for table in (logps, tokens, before) for column in table.view(-1, 2).unbind(1)))
        losses, chosen, rejected = self.losses(pairs)
        counted = ((pairs.chosen_tokens > 0) & (pairs.rejected_tokens > 0)).float()
        chosen, rejected = chosen.detach(), rejected.detach()
        return {
            "loss": (losses * counted).sum(),
            "margin": ((chosen - rejected) * counted).sum(),
            "accuracy": ((chosen > rejected).float() * counted).sum(),
            "chosen_reward": (chosen * counted).sum(),
            "rejected_reward": (rejected * counted).sum(),
        }

    def reference_logps(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Log-probabilities under the model as it was, `[S]` float32."""
        raise AssertionError(f"{type(self).__name__} uses no reference")

    @abstractmethod
    def losses(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """Each pair's loss, and the rewards of its answers, `[P]` each."""


class Dpo(Preference):
    """Direct preference optimisation (Rafailov et al. 2023), IPO (Azar et al. 2023) and SLiC's hinge (Zhao et al. 2023).

    The reference is the model before training. With an adapter it is the same model with the adapter off, one more
    forward pass without gradients; else its log-probabilities were recorded and come with the batch.
    """

    uses_reference = True

    def __init__(self, config: DpoConfig, reference: Reference | None = None) -> None:
        self.config, self.reference = config, reference

    def reference_logps(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """As recorded, or computed with the adapter off and dropout off."""
        return reference_logps(model, batch, self.reference)

    def losses(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """Rewards are beta times the log-ratio to the reference."""
        config = self.config
        chosen, rejected = pairs.chosen - pairs.reference_chosen, pairs.rejected - pairs.reference_rejected
        difference = chosen - rejected
        if config.loss_type is PairLoss.hinge:
            losses = F.relu(1 - config.beta * difference)
        elif config.loss_type is PairLoss.ipo:
            # Per token, as IPO's authors have confirmed to TRL: sums would make the square grow with the length.
            chosen_mean = chosen / pairs.chosen_tokens.clamp(min=1)
            rejected_mean = rejected / pairs.rejected_tokens.clamp(min=1)
            losses = (chosen_mean - rejected_mean - 1 / (2 * config.beta)).square()
        else:
            losses = smoothed_logistic(config.beta * difference, config.label_smoothing)
        if config.sft_weight:
            losses = losses - config.sft_weight * pairs.mean()[0]
        return losses, config.beta * chosen, config.beta * rejected


class Orpo(Preference):
    """Odds-ratio preference optimisation (Hong et al. 2024): the chosen answer's mean loss, and the log odds ratio."""

    def __init__(self, config: OrpoConfig) -> None:
        self.config = config

    def losses(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """Rewards are beta times the mean log-probability of a token, as in TRL."""
        chosen, rejected = pairs.mean()
        odds = (chosen - rejected) - (_log_complement(chosen) - _log_complement(rejected))
        return -chosen - self.config.beta * F.logsigmoid(odds), self.config.beta * chosen, self.config.beta * rejected


class Simpo(Preference):
    """Simple preference optimisation (Meng et al. 2024): rewards are beta times the mean log-probability of a token."""

    def __init__(self, config: SimpoConfig) -> None:
        self.config = config

    def losses(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """The chosen answer's reward shall exceed the other's by gamma."""
        config, (chosen, rejected) = self.config, pairs.mean()
        losses = smoothed_logistic(config.beta * (chosen - rejected) - config.gamma, config.label_smoothing)
        if config.sft_weight:
            losses = losses - config.sft_weight * chosen
        return losses, config.beta * chosen, config.beta * rejected


def smoothed_logistic(logits: Tensor, smoothing: float) -> Tensor:
    """Logistic loss of each logit, where a share of the labels is believed to be wrong."""
    losses = -F.logsigmoid(logits)
    return losses if not smoothing else losses * (1 - smoothing) - F.logsigmoid(-logits) * smoothing


def _log_complement(logp: Tensor) -> Tensor:
    """log(1 - exp(logp)) without cancellation (Maechler 2012)."""
    logp = logp.clamp(max=LEAST_LOG)
    return torch.where(logp < -0.6931472, torch.log1p(-torch.exp(logp)), torch.log(-torch.expm1(logp)))


class RecordLogps:
    """Stands in for the objective for a pass over the data: each sequence's log-probability instead of a loss."""

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`logps`, `[S]` float32."""
        return {"logps": sequence_logps(model, batch)[0]}
