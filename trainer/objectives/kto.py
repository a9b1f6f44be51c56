"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306): answers with a verdict each, no pairs.

An answer gains by being likelier (desirable) or less likely (undesirable) than under the model before training, beside
a reference point: how much likelier the model has made arbitrary answers, estimated on prompts that meet the answers of
others. That estimate is a mean over the whole step, computed before its first backward pass, so that it is the same for
any micro-batch, number of ranks and strategy. TRL takes it over one device's micro-batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer.data.store.sequences import DESIRABLE, UNDESIRABLE
from trainer.objectives.base import KtoConfig
from trainer.objectives.causal import Reference, reference_logps, sequence_logps

if TYPE_CHECKING:
    from trainer.data.store.sequences import Sample


class Kto:
    """Terms, summed so that the count of answers divides them: `loss`; `kl`, the reference point; `desirable_reward`
    and `undesirable_reward`, means over the answers of their kind; `margin` between these; and `accuracy`, the answers
    whose reward is on their side of the reference point. Of mismatched answers, `kl` alone: the sum of log-ratios.
    """

    sequences_per_document = 1
    perplexity = False
    metrics: tuple[str, ...] = ("kl", "desirable_reward", "undesirable_reward", "margin", "accuracy")
    head_labels: int | None = None
    uses_reference = True
    looks_ahead = True

    def __init__(self, config: KtoConfig, reference: Reference | None = None) -> None:
        self.config, self.reference = config, reference

    def counts(self, sample: Sample) -> dict[str, int]:
        """An answer counts once, under its verdict too."""
        return {"loss": 1, DESIRABLE: int(sample.desirable is True), UNDESIRABLE: int(sample.desirable is False)}

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """An answer without supervised tokens (a filler) counts nothing."""
        before = reference_logps(model, batch, self.reference)
        logps, tokens = sequence_logps(model, batch)
        counted = (tokens > 0).float()
        ratios = (logps - before) * counted
        if "mismatched" in batch:
            return {"kl": ratios.detach().sum()}
        point = batch["ahead"]["kl"].clamp(min=0)
        config, beta = self.config, self.config.beta
        good = batch["desirable"].float() * counted
        bad = counted - good
        # 1 - sigmoid(x) is sigmoid(-x), which does not cancel.
        losses = config.desirable_weight * good * torch.sigmoid(-beta * (ratios - point))
        losses = losses + config.undesirable_weight * bad * torch.sigmoid(-beta * (point - ratios))
        rewards, limit = beta * ratios.detach(), beta * point
        totals = batch["totals"]
        good_mean = (rewards * good).sum() * (totals["loss"] / max(1, totals[DESIRABLE]))
        bad_mean = (rewards * bad).sum() * (totals["loss"] / max(1, totals[UNDESIRABLE]))
        right = good * (rewards > limit) + bad * (rewards < limit)
        return {
            "loss": losses.sum(),
            "kl": point * counted.sum(),
            "desirable_reward": good_mean,
            "undesirable_reward": bad_mean,
            "margin": good_mean - bad_mean,
            "accuracy": right.sum(),
        }
