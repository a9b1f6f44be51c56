"""The policy-gradient loss over the tokens of written answers (`objective=grpo`), and its metrics.

For answer i with advantage A and token t: the ratio r is exp(now - old), of log-probabilities at the temperature of writing. With
`importance_level=sequence` its logarithm is the mean over the answer's tokens (GSPO, Zheng et al. 2025, arXiv:2507.18071). The
loss of a token is, by `clip_form`:

- `ppo`: `-min(r A, clamp(r, 1 - clip, 1 + clip_high) A)` (Schulman et al. 2017, arXiv:1707.06347), where `clip_negative` bounds
  r from above first (Ye et al. 2020, arXiv:1912.09729);
- `cispo`: `-min(r, clip_high) A now`, with no gradient through the minimum (MiniMax 2025, arXiv:2506.13585);
- `none`: `-r A`.

It is weighed by `normalise` and summed. The divergence from the reference is added to each token's loss before that. Where a
round is one step, old is now without its gradient: r is 1 in value and no pass is needed for old.

In this file N is the number of supervised positions of a micro-batch, and S the number of its sequences.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from strategies.sequence import sum_over_group
from trainer.losses.row_logps import row_logps
from trainer.objectives.answers import (
    ADVANTAGES,
    ANSWER_LENGTHS,
    LOSS_WEIGHTS,
    OLD_LOGPS,
    REFERENCE_LOGPS,
    SAMPLING_LOGPS,
)
from trainer.objectives.base import Objective, ReferenceModels
from trainer.objectives.causal import states_at_targets
from trainer.objectives.grpo_config import ClipForm, GrpoConfig, ImportanceLevel, KlEstimator, KlPlace

ENTROPY_METRIC = "entropy"
KL_METRIC = "kl"
LOW_CLIPPED_METRIC = "clip_ratio/low_mean"
HIGH_CLIPPED_METRIC = "clip_ratio/high_mean"
CLIPPED_METRIC = "clip_ratio/region_mean"
SAMPLING_DIFFERENCE_METRIC = "sampling/sampling_logp_difference/mean"
"""Names of metrics, as TRL's GRPOTrainer has them."""


class _TokenEntries(NamedTuple):
    """What a batch has for each learned token beside its target, float32 `[N]` each; see `trainer/objectives/answers.py`."""

    advantages: Tensor
    loss_weights: Tensor
    sampling_logps: Tensor
    """Log-probabilities at the time when the answers were written."""
    old_logps: Tensor | None
    """Log-probabilities before the round's first update; None in a round of one step."""
    reference_logps: Tensor | None
    """None without a reference model."""

    @classmethod
    def of_batch(cls, batch: dict[str, Any]) -> _TokenEntries:
        """Take the entries out of a batch that `AnswerCollator` has made."""
        return cls(
            advantages=batch[ADVANTAGES],
            loss_weights=batch[LOSS_WEIGHTS],
            sampling_logps=batch[SAMPLING_LOGPS],
            old_logps=batch.get(OLD_LOGPS),
            reference_logps=batch.get(REFERENCE_LOGPS),
        )


class Policy(Objective):
    """The loss of written answers. Terms are summed so that the step's count of `loss` divides them:

    - `loss`, which carries the gradient;
    - `entropy`, `kl` (only if it has a weight, by k3 whatever the loss takes), and the shares of clipped tokens: means over the
      learned tokens of the step;
    - `sampling/sampling_logp_difference/mean`: how far the log-probabilities of writing lie from those of learning, in nats.
    """

    def __init__(self, config: GrpoConfig, references: ReferenceModels) -> None:
        self.config = config
        self.references = references
        """What gives the reference its log-probabilities, in the passes of `trainer/rollout/answer_logps.py`."""
        self.uses_kl = config.kl.weight > 0
        kl_metrics = (KL_METRIC,) if self.uses_kl else ()
        clip_metrics = (LOW_CLIPPED_METRIC, HIGH_CLIPPED_METRIC, CLIPPED_METRIC)
        self.metrics = (ENTROPY_METRIC, *kl_metrics, *clip_metrics, SAMPLING_DIFFERENCE_METRIC)

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute GRPO's loss and its metrics, by the names that the class lists; each a sum over the learned tokens, 0-d.

        All ranks that share rows must call. A micro-batch may hold no learned token.
        """
        config = self.config
        entries = _TokenEntries.of_batch(batch)
        # Runs the model up to its output head; N learned tokens are left of all positions.
        head, hidden, targets = states_at_targets(model, batch)
        # By token: its log-probability, and the entropy of its distribution, at the temperature of generation.
        logps, entropy = row_logps(head, hidden, targets, config.rollout.temperature)
        # Those before the round's first update. In a round of one step no update precedes, so that they are those of now.
        old_logps = logps.detach() if entries.old_logps is None else entries.old_logps
        ratio = self._importance_ratio(logps - old_logps, batch)

        # The loss of each token, and numbers of each token whose mean is logged.
        losses = self._policy_losses(ratio, logps, entries.advantages)
        # The second is how far the log-probabilities at generation are from those of training, which should be the same.
        logged = {ENTROPY_METRIC: entropy, SAMPLING_DIFFERENCE_METRIC: (old_logps - entries.sampling_logps).abs()}
        if self.uses_kl:
            assert entries.reference_logps is not None
            reference_log_ratio = entries.reference_logps - logps
            logged[KL_METRIC] = _k3_estimate(reference_log_ratio)
            if config.kl.place is KlPlace.loss:  # else it is subtracted from the rewards
                losses = losses + config.kl.weight * _kl_estimates(reference_log_ratio, ratio, config.kl.estimator)
        logged |= self._clipped_tokens(ratio, entries.advantages)

        # The loop divides each term by the step's count of `loss`; this factor makes it a mean over learned tokens instead.
        totals = batch["totals"]
        mean_factor = totals["loss"] / max(1, totals["tokens"])
        terms = {"loss": (losses * entries.loss_weights).sum()}
        for name, values in logged.items():
            terms[name] = values.detach().float().sum() * mean_factor
        return terms

    def _importance_ratio(self, log_ratio: Tensor, batch: dict[str, Any]) -> Tensor:
        """`[N]`: each token's probability now over that before the round's first update, or the geometric mean over its answer.

        `log_ratio [N]`: its logarithm by token. All ranks that share rows must call.
        """
        if self.config.importance_level is ImportanceLevel.sequence:
            log_ratio = _means_over_answers(log_ratio, batch)
        return log_ratio.exp()

    def _policy_losses(self, ratio: Tensor, logps: Tensor, advantages: Tensor) -> Tensor:
        """`[N]`: each token's loss, without the divergence from the reference, by `clip_form` (formulas: see the module).

        `ratio`: the token's probability now over that before the round's first update.
        `logps`: its log-probability now.
        `advantages`: how much better its answer scored than others.
        """
        config = self.config
        if config.clip_form is ClipForm.none:
            return -ratio * advantages
        if config.clip_form is ClipForm.cispo:
            # CISPO clips the weight, not the gradient: every token keeps its gradient through `logps`.
            return -ratio.detach().clamp(max=config.upper_clip) * advantages * logps
        clipped_ratio = ratio.clamp(1 - config.clip, 1 + config.upper_clip)
        if config.clip_negative is not None:
            # With a positive advantage the minimum takes the tighter bound above anyway.
            ratio = ratio.clamp(max=config.clip_negative)
        return -torch.minimum(ratio * advantages, clipped_ratio * advantages)

    def _clipped_tokens(self, ratio: Tensor, advantages: Tensor) -> dict[str, Tensor]:
        """Which tokens clipping affects: bool `[N]` each at the lower bound, at the upper one, at either, by names of metrics.

        With `ppo` such a token has no gradient, with `cispo` a bounded weight; weights are bounded with a negative advantage too,
        which is not counted here. Clipped is:

        - `none`: no token.
        - `cispo`: above `clip_high` (`config.upper_clip`), which bounds the ratio itself, with a positive advantage.
        - `ppo`: below 1 - `clip` with a negative advantage, above 1 + `clip_high` with a positive advantage.
        """
        config = self.config
        is_low = torch.zeros_like(ratio, dtype=torch.bool)
        is_high = is_low
        if config.clip_form is ClipForm.cispo:
            is_high = (ratio > config.upper_clip) & (advantages > 0)
        elif config.clip_form is ClipForm.ppo:
            is_low = (ratio < 1 - config.clip) & (advantages < 0)
            is_high = (ratio > 1 + config.upper_clip) & (advantages > 0)
        return {LOW_CLIPPED_METRIC: is_low, HIGH_CLIPPED_METRIC: is_high, CLIPPED_METRIC: is_low + is_high}


def _means_over_answers(token_values: Tensor, batch: dict[str, Any]) -> Tensor:
    """Average numbers of tokens over their answer, and give each token that mean: `[N]` from `token_values [N]`.

    N counts the learned tokens of the micro-batch; `batch["row_sequence"]` says which answer each belongs to. If ranks share a
    row of tokens, an answer may lie on several of them: each has the mean of the whole answer, and all of them must call.
    """
    answer_of_token = batch["row_sequence"]
    zeros = token_values.new_zeros(batch["num_sequences"])
    answer_sums = sum_over_group(zeros.index_add(0, answer_of_token, token_values), batch.get("row_slices"))
    # A sequence that only fills up a micro-batch has a length of 0, and no token that would take its mean.
    return (answer_sums / batch[ANSWER_LENGTHS].clamp(min=1))[answer_of_token]


def _k3_estimate(reference_log_ratio: Tensor) -> Tensor:
    """`[N]`: Schulman's estimate k3 of KL(policy, reference) for each token, exp(d) - 1 - d; never negative.

    `reference_log_ratio` (d): the token's log-probability under the reference model minus that under the policy.
    """
    return torch.expm1(reference_log_ratio) - reference_log_ratio


def _kl_estimates(reference_log_ratio: Tensor, importance_ratio: Tensor, estimator: KlEstimator) -> Tensor:
    """`[N]`: the estimate of KL(policy, reference) that is added to each token's loss.

    `reference_log_ratio`: the token's log-probability under the reference model minus that under the policy.
    `importance_ratio`: the token's probability now over that before the round's first update.
    """
    if estimator is KlEstimator.k2:
        return reference_log_ratio.square() / 2
    if estimator is KlEstimator.k3_corrected:
        # The expectation is over the old policy, which generated the answer (DeepSeek-V3.2, arXiv:2512.02556).
        return _k3_estimate(reference_log_ratio) * importance_ratio
    return _k3_estimate(reference_log_ratio)
