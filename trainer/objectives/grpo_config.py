"""Settings of group relative policy optimisation (`objective=grpo`) and its kin.

GRPO, Dr.GRPO, DAPO, GSPO, RLOO, REINFORCE++, CISPO and MaxRL are one loss with other values of these settings, so each is a file
of values in `conf/objective/`, and none is a module of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from strategies.settings import DESCRIBES, group, number, setting
from trainer.objectives.rollouts import RoundsConfig


class Baseline(StrEnum):
    """What is subtracted from a reward: the mean of its group, of the others in the group, of the round, or nothing."""

    group = "group"
    others = "others"
    batch = "batch"
    none = "none"


class Scale(StrEnum):
    """What the difference is divided by: the deviation of the group or of the round, the mean of the group, or nothing."""

    std = "std"
    batch_std = "batch_std"
    mean = "mean"
    none = "none"


class Combine(StrEnum):
    """How several rewards become one: their weighted sum, or each by its spread in the group first (GDPO)."""

    sum = "sum"
    normalised = "normalised"


class ImportanceLevel(StrEnum):
    """Whether each token has a ratio of its own, or all tokens of an answer share the answer's mean."""

    token = "token"
    sequence = "sequence"


class ClipForm(StrEnum):
    """How the ratio is bounded: PPO's minimum, CISPO's weight without gradient, or not at all."""

    ppo = "ppo"
    cispo = "cispo"
    none = "none"


class Normalise(StrEnum):
    """What the sum over tokens is divided by; see `answer_weights` in `trainer/rollout/groups.py`."""

    token = "token"
    answer = "answer"
    constant = "constant"
    sum = "sum"


class KlPlace(StrEnum):
    """Whether the divergence is added to the loss, or subtracted from the reward."""

    loss = "loss"
    reward = "reward"


class KlEstimator(StrEnum):
    """How the divergence is estimated in the loss (Schulman 2020, http://joschu.net/blog/kl-approx.html)."""

    k2 = "k2"
    k3 = "k3"
    k3_corrected = "k3_corrected"


@dataclass(kw_only=True, slots=True)
class KlConfig:
    """The divergence from the policy as this run began."""

    weight: float = number(0.0, least=0, advice="0 leaves it out; 0.001 to 0.05 as a rule")
    """Weight of the KL divergence. Above 0 the run needs a reference model; with adapters it is the base, which costs no second
    model."""
    place: KlPlace = setting(KlPlace.loss, reach=DESCRIBES)
    """`loss` adds the divergence to the loss; `reward` subtracts its sum over the answer's tokens (k1) from the reward."""
    estimator: KlEstimator = setting(KlEstimator.k3, reach=DESCRIBES)
    """Estimator in the loss: `k3` as in GRPO's paper, `k2` with the gradient of the reverse KL, or `k3_corrected` (k3 times the
    ratio)."""


@dataclass(kw_only=True, slots=True)
class GrpoConfig(RoundsConfig):
    """Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300) and its kin, by rewards of written answers."""

    name: str = "grpo"
    recipe: str = setting("grpo", reach=DESCRIBES)
    """Method whose values the chosen file sets (`grpo`, `dapo`, ...). Set by the choice, not by hand."""
    baseline: Baseline = setting(Baseline.group, reach=DESCRIBES)
    """What is subtracted from a reward: the mean of its `group`, of the `others` in the group, of the `batch`, or `none`."""
    scale: Scale = setting(Scale.std, reach=DESCRIBES)
    """What the difference is divided by: `std` (standard deviation of the group), `batch_std` (of the round), `mean` (of the
    group), or `none`."""
    combine: Combine = setting(Combine.sum, reach=DESCRIBES)
    """How several rewards are combined: their weighted `sum`; or `normalised`: each in its group first, then the sum in the
    round (GDPO)."""
    importance_level: ImportanceLevel = setting(ImportanceLevel.token, reach=DESCRIBES)
    """Ratio of new to old probability, by `token`, or by `sequence` for the whole answer (GSPO)."""
    clip: float = number(0.2, above=0, below=1, advice="0.2 as a rule, 3e-4 with importance_level=sequence")
    """How far below 1 the probability ratio may move the policy (lower clip range)."""
    clip_high: float | None = number(None, above=0, advice="null is the same as objective.clip; 0.28 in DAPO")
    """How far above 1 the probability ratio may move the policy (upper clip range). null: as `clip`. With `clip_form=cispo` it
    is the bound of the ratio itself."""
    clip_negative: float | None = number(None, above=1, advice="null bounds nothing; 3 to 10 as a rule")
    """Largest ratio for tokens with a negative advantage (dual clip, arXiv:1912.09729). null: none."""
    clip_form: ClipForm = setting(ClipForm.ppo, reach=DESCRIBES)
    """`ppo`: the smaller of the clipped and the unclipped term; `cispo`: a clipped weight without gradient; `none`: no
    clipping."""
    normalise: Normalise = setting(Normalise.token, reach=DESCRIBES)
    """How the loss is averaged: over all `token`s of the step; over each `answer` first; over `constant` lengths
    (`max_new_tokens`); or the `sum` of each answer."""
    mask_truncated: bool = setting(False, reach=DESCRIBES)
    """Leave answers that were cut off at `max_new_tokens` out of the loss. They still count in baselines."""
    kl: KlConfig = group(KlConfig)
    """KL divergence from the policy at the start of the run."""

    @property
    def upper_clip(self) -> float:
        """How far above 1 the ratio may move the policy, or the bound of CISPO's ratio."""
        return self.clip if self.clip_high is None else self.clip_high
