"""What the rewards of a round become before anything is learned: advantages, idle groups, weights of answers in the loss.

Numpy alone, in float64, from the rewards of the whole round: every rank that has them comes to the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from strategies.errors import DataError
from trainer.objectives.grpo_config import Baseline, Normalise, Scale

STD_EPSILON = 1e-4
"""Added to a standard deviation before it divides, as TRL does."""
EQUAL_REWARDS_TOLERANCE = 1e-9
"""Rewards of a group count as equal if they differ by at most this share of the largest."""


def advantages(rewards: np.ndarray, baseline: Baseline, scale: Scale) -> np.ndarray:
    """Compute how much better each answer scored than its baseline, float64 [groups, answers]; 0 for unscored answers.

    The loss multiplies the tokens of an answer by its advantage. A group is all answers to one prompt.

    `rewards`: float64 [groups, answers]; nan for an answer that no reward applied to, which counts in no mean.
    `baseline`: what is subtracted from a reward (the mean of its group, of the others in it, of the batch).
    `scale`: what the difference is divided by.

    Raises DataError if `scale` is the mean reward of a group and a reward is negative: dividing by a negative mean would reward
    the worse answers.

    Sources: group mean and standard deviation are GRPO's (Shao et al. 2024, arXiv:2402.03300), without the latter Dr.GRPO's (Liu
    et al. 2025, arXiv:2503.20783); the mean of the others is RLOO's (Ahmadian et al. 2024, arXiv:2402.14740); mean and deviation
    of the whole batch are REINFORCE++'s (Hu et al. 2025, arXiv:2501.03262); dividing by the mean is MaxRL's.
    """
    is_scored = ~np.isnan(rewards)
    known_rewards = np.where(is_scored, rewards, 0.0)
    differences = _subtract_baseline(known_rewards, is_scored, baseline)
    scaled = differences / _scale_divisor(known_rewards, is_scored, scale)
    return np.where(is_scored, scaled, 0.0)


def normalised_sum(
    scores_by_reward: Mapping[str, np.ndarray], weight_by_reward: Mapping[str, float], rewards: np.ndarray
) -> np.ndarray:
    """Sum rewards by weight after each was normalised by mean and standard deviation in its group, float64 [groups, answers].

    Rewards of other ranges and spreads then weigh as their weights say: the first half of GDPO (Liu et al. 2026,
    arXiv:2601.05242), which divides the sum by its deviation in the round too (`Baseline.batch` and `Scale.batch_std`). TRL calls
    it `multi_objective_aggregation="normalize_then_sum"`.

    `scores_by_reward`: float64 [groups, answers] by name, nan where a reward does not apply.
    `rewards`: their plain weighted sum, nan for an unscored answer, which stays unscored and counts in no mean.
    """
    is_unscored = np.isnan(rewards)
    total = np.zeros_like(rewards)
    for name, scores in scores_by_reward.items():
        weight = weight_by_reward[name]
        if weight == 0:
            continue
        scores_of_scored = np.where(is_unscored, np.nan, scores)
        normalised = advantages(scores_of_scored, Baseline.group, Scale.std)
        # Equal rewards of a group become exactly 0: without this, rounding would leave small values.
        total += weight * np.where(is_idle_group(scores_of_scored)[:, None], 0.0, normalised)
    return np.where(is_unscored, np.nan, total)


def is_idle_group(rewards: np.ndarray) -> np.ndarray:
    """Find the groups from which nothing can be learned, bool [groups]: no answer is better than another.

    `rewards`: float64 [groups, answers], nan for unscored answers. A group is all answers to one prompt. It is idle if fewer than
    two of its answers are scored, or all scored ones have the same reward, up to `EQUAL_REWARDS_TOLERANCE`.
    """
    is_scored = ~np.isnan(rewards)
    highest = np.where(is_scored, rewards, -np.inf).max(axis=1)
    lowest = np.where(is_scored, rewards, np.inf).min(axis=1)
    largest_absolute = np.where(is_scored, np.abs(rewards), 0.0).max(axis=1)
    do_rewards_differ = highest - lowest > EQUAL_REWARDS_TOLERANCE * largest_absolute
    return ~((is_scored.sum(axis=1) >= 2) & do_rewards_differ)


class AnswerWeights(NamedTuple):
    """How a step's loss averages: each token's loss times the weight of its answer, summed, by the denominator."""

    weights: np.ndarray
    """float64 [answers]; 0 for an answer that is left out of the loss."""
    loss_denominator: float
    """What the sum is divided by; 0 if no answer is left."""


def answer_weights(lengths: np.ndarray, normalise: Normalise, max_new_tokens: int) -> AnswerWeights:
    """Decide how a step's loss averages over tokens and answers, by `normalise` (`objective.normalise`):

    - token: all tokens count alike. Weight 1, divided by the number of tokens.
    - answer: all answers count alike, whatever their length. Weight 1 / length, divided by the number of answers.
    - constant: a token counts the same in every step. Weight 1 / max_new_tokens, divided by the number of answers.
    - sum: the tokens of an answer are summed. Weight 1, divided by the number of answers.

    `lengths`, int64 [answers]: tokens of each answer of the step, all ranks together; 0 for an answer that is left out of the
    loss, which is not counted.
    """
    is_learned = lengths > 0
    num_learned = float(is_learned.sum())
    weights = is_learned.astype(np.float64)
    match normalise:
        case Normalise.token:
            return AnswerWeights(weights, float(lengths.sum()))
        case Normalise.answer:
            return AnswerWeights(weights / np.maximum(lengths, 1), num_learned)
        case Normalise.constant:
            return AnswerWeights(weights / max_new_tokens, num_learned)
        case Normalise.sum:
            return AnswerWeights(weights, num_learned)


def _subtract_baseline(known_rewards: np.ndarray, is_scored: np.ndarray, baseline: Baseline) -> np.ndarray:
    """Subtract from each reward what its answer is compared with, its baseline; float64 [groups, answers].

    A group is all answers to one prompt. By `baseline`:

    - none: nothing is subtracted.
    - batch: the mean of all scored rewards.
    - group: the mean of the scored rewards of the group.
    - others: the mean of the other scored rewards of the group (leave-one-out).

    `known_rewards`: 0 where `is_scored` is False.
    """
    if baseline is Baseline.none:
        return known_rewards
    if baseline is Baseline.batch:
        return known_rewards - _mean_of_scored(known_rewards, is_scored, axis=None)
    distance_from_mean = known_rewards - _mean_of_scored(known_rewards, is_scored, axis=1)
    if baseline is Baseline.group:
        return distance_from_mean
    # The distance of r from the mean of the n - 1 others, r - (sum - r) / (n - 1), is n / (n - 1) times its distance from the
    # mean of all n. A lone answer has no others: max(..., 1) avoids a division by zero, and its distance is 0.
    num_scored = is_scored.sum(axis=1, keepdims=True)
    return distance_from_mean * num_scored / np.maximum(num_scored - 1, 1)


def _scale_divisor(known_rewards: np.ndarray, is_scored: np.ndarray, scale: Scale) -> np.ndarray:
    """What differences from the baseline are divided by, float64 [groups, 1], or [1, 1] if it is the same for all groups.

    - none: 1.
    - batch_std: the standard deviation of all scored rewards, plus `STD_EPSILON`.
    - std: the standard deviation of the scored rewards of the group, plus `STD_EPSILON`.
    - mean: the mean of the scored rewards of the group, or 1 if all are 0. Raises DataError for a negative reward.

    `known_rewards`: float64 [groups, answers], 0 where `is_scored` is False.
    """
    if scale is Scale.none:
        return np.ones((1, 1))
    if scale is Scale.batch_std:
        return _std_of_scored(known_rewards, is_scored, axis=None) + STD_EPSILON
    if scale is Scale.std:
        return _std_of_scored(known_rewards, is_scored, axis=1) + STD_EPSILON
    lowest = float(known_rewards.min(initial=0.0))
    if lowest < 0:
        raise DataError(
            f"objective.scale=mean: a reward is {lowest:g}, and dividing by a negative mean would favour the worse answers; "
            "give rewards of at least 0, or set objective.scale=std"
        )
    mean = _mean_of_scored(known_rewards, is_scored, axis=1)
    # If the mean is 0, all rewards of the group are 0, and so are its differences.
    return np.where(mean > 0, mean, 1.0)


def _mean_of_scored(known_rewards: np.ndarray, is_scored: np.ndarray, axis: int | None) -> np.ndarray:
    """The mean of the scored rewards of each group (axis 1, [groups, 1]) or of all (None, [1, 1]); 0 if none is scored."""
    num_scored = is_scored.sum(axis=axis, keepdims=True)
    return known_rewards.sum(axis=axis, keepdims=True) / np.maximum(num_scored, 1)


def _std_of_scored(known_rewards: np.ndarray, is_scored: np.ndarray, axis: int | None) -> np.ndarray:
    """The unbiased standard deviation of the scored rewards of each group (axis 1) or of all (None); 0 of fewer than two."""
    mean = _mean_of_scored(known_rewards, is_scored, axis)
    distances = np.where(is_scored, known_rewards - mean, 0.0)
    num_scored = is_scored.sum(axis=axis, keepdims=True)
    return np.sqrt((distances**2).sum(axis=axis, keepdims=True) / np.maximum(num_scored - 1, 1))
