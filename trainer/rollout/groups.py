"""What the rewards of a round become before anything is learned: advantages, groups without spread, weights of answers.

Numpy alone, in float64, from the rewards of the whole round: every rank that has them comes to the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from strategies.errors import DataError
from trainer.objectives.grpo_config import Baseline, Normalise, Scale

STD_EPSILON = 1e-4
"""Added to a standard deviation before it divides, as TRL does."""
NO_SPREAD = 1e-9
"""Rewards of a group count as equal if they differ by at most this share of the largest."""


def advantages(rewards: np.ndarray, baseline: Baseline, scale: Scale) -> np.ndarray:
    """Advantages, by which the loss weighs each answer's tokens: how much better it scored than what it is compared with.

    float64 [groups, answers], 0 for unscored answers. A group is all answers to one prompt. `baseline` is what a reward is
    compared with (the mean of its group, of the others in it, of the batch), `scale` what the difference is divided by.

    `rewards`, float64 [groups, answers]: nan for an answer that no reward applied to. Unscored answers count in no mean.
    Raises DataError if `scale` is the mean reward of a group and a reward is negative: dividing by a negative mean would
    reward the worse answers.

    Sources: group mean and standard deviation are GRPO's (Shao et al. 2024, arXiv:2402.03300), without the latter Dr.GRPO's
    (Liu et al. 2025, arXiv:2503.20783); the mean of the others is RLOO's (Ahmadian et al. 2024, arXiv:2402.14740); mean and
    deviation of the whole batch are REINFORCE++'s (Hu et al. 2025, arXiv:2501.03262); dividing by the mean is MaxRL's.
    """
    is_scored = ~np.isnan(rewards)
    known = np.where(is_scored, rewards, 0.0)
    differences = _minus_baseline(known, is_scored, baseline)
    scaled = differences / _divisor(known, is_scored, scale)
    return np.where(is_scored, scaled, 0.0)


def normalised_sum(
    by_reward: Mapping[str, np.ndarray], weights: Mapping[str, float], rewards: np.ndarray
) -> np.ndarray:
    """float64 [groups, answers]: the weighted sum of rewards, each less its mean in the group and divided by its deviation there.

    Rewards of other ranges and spreads then weigh as their weights say: the first half of GDPO (Liu et al. 2026,
    arXiv:2601.05242), which divides the sum by its deviation in the round too (`Baseline.batch` and `Scale.batch_std`). TRL calls
    it `multi_objective_aggregation="normalize_then_sum"`.

    `by_reward`: float64 [groups, answers] by name, nan where a reward does not apply. `rewards`: their plain weighted sum, nan
    for an unscored answer, which stays unscored and counts in no mean.
    """
    total = np.zeros_like(rewards)
    for name, reward_values in by_reward.items():
        if weights[name] == 0:
            continue
        scored = np.where(np.isnan(rewards), np.nan, reward_values)
        normalised = advantages(scored, Baseline.group, Scale.std)
        # Equal rewards become exactly 0, without what rounding leaves of them.
        total += weights[name] * np.where(idle(scored)[:, None], 0.0, normalised)
    return np.where(np.isnan(rewards), np.nan, total)


def idle(rewards: np.ndarray) -> np.ndarray:
    """bool [groups]: whether the scored answers of a group all have the same reward, or fewer than two are scored."""
    is_scored = ~np.isnan(rewards)
    highest = np.where(is_scored, rewards, -np.inf).max(axis=1)
    lowest = np.where(is_scored, rewards, np.inf).min(axis=1)
    largest = np.where(is_scored, np.abs(rewards), 0.0).max(axis=1)
    has_spread = (is_scored.sum(axis=1) >= 2) & (highest - lowest > NO_SPREAD * largest)
    return ~has_spread


def answer_weights(lengths: np.ndarray, normalise: Normalise, max_new_tokens: int) -> tuple[np.ndarray, float]:
    """How the loss of a step averages over tokens and answers: (weight of each token of an answer, divisor of the step's sum).

    `objective.normalise` says whether each token, each answer or a constant length counts alike. `lengths`, int64 [answers]:
    tokens of each answer of the step, all ranks together; 0 for an answer that is left out of the loss, which counts in neither.
    The weights are float64 [answers]. The divisor is 0 if no answer is left.
    """
    is_learned = lengths > 0
    num_learned = float(is_learned.sum())
    weights = is_learned.astype(np.float64)
    if normalise is Normalise.token:
        return weights, float(lengths.sum())
    if normalise is Normalise.answer:
        return weights / np.maximum(lengths, 1), num_learned
    if normalise is Normalise.constant:
        return weights / max_new_tokens, num_learned
    return weights, num_learned


def _minus_baseline(known: np.ndarray, is_scored: np.ndarray, baseline: Baseline) -> np.ndarray:
    """Rewards minus their baseline, float64 [groups, answers]; `known`: rewards, 0 where unscored (`is_scored` False)."""
    if baseline is Baseline.none:
        return known
    if baseline is Baseline.batch:
        return known - _mean(known, is_scored, axis=None)
    from_mean = known - _mean(known, is_scored, axis=1)
    if baseline is Baseline.group:
        return from_mean
    # r - (sum - r) / (n - 1) is n / (n - 1) times the distance from the mean of all n. A lone answer has no others.
    number = is_scored.sum(axis=1, keepdims=True)
    return from_mean * number / np.maximum(number - 1, 1)


def _divisor(known: np.ndarray, is_scored: np.ndarray, scale: Scale) -> np.ndarray:
    """What differences from the baseline are divided by, float64 [groups, 1] or [1, 1] for the whole batch.

    `known`: rewards [groups, answers], 0 where unscored. Raises DataError for a negative reward if `scale` is the mean.
    """
    if scale is Scale.none:
        return np.ones((1, 1))
    if scale is Scale.batch_std:
        return _std(known, is_scored, axis=None) + STD_EPSILON
    if scale is Scale.std:
        return _std(known, is_scored, axis=1) + STD_EPSILON
    lowest = float(known.min(initial=0.0))
    if lowest < 0:
        raise DataError(
            f"objective.scale=mean: a reward is {lowest:g}, and dividing by a negative mean would favour the worse answers; "
            "give rewards of at least 0, or set objective.scale=std"
        )
    mean = _mean(known, is_scored, axis=1)
    # All rewards of such a group are 0, and so are its differences.
    return np.where(mean > 0, mean, 1.0)


def _mean(known: np.ndarray, is_scored: np.ndarray, axis: int | None) -> np.ndarray:
    """The mean of the scored rewards of each group (axis 1) or of all (None); 0 without any."""
    number = is_scored.sum(axis=axis, keepdims=True)
    return known.sum(axis=axis, keepdims=True) / np.maximum(number, 1)


def _std(known: np.ndarray, is_scored: np.ndarray, axis: int | None) -> np.ndarray:
    """The unbiased standard deviation of the scored rewards of each group (axis 1) or of all (None); 0 of fewer than two."""
    from_mean = np.where(is_scored, known - _mean(known, is_scored, axis), 0.0)
    number = is_scored.sum(axis=axis, keepdims=True)
    return np.sqrt((from_mean**2).sum(axis=axis, keepdims=True) / np.maximum(number - 1, 1))
