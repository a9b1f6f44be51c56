"""Metrics of a round, by the names that TRL's GRPOTrainer gives them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np

from trainer.rollout.round import stack_rewards
from trainer.rollout.types import AnswerGroup, GroupScores, all_answers


def round_metrics(
    groups: Sequence[AnswerGroup], scores: Sequence[GroupScores], is_idle: np.ndarray
) -> dict[str, float]:
    """Compute the metrics of a round by name: rewards, lengths, numbers of unscored answers.

    Those that would be nan are left out. A group is all answers to one prompt; `scores` has one entry for each group. `is_idle`,
    bool [groups]: whether all answers of the group score alike, and so teach nothing.
    """
    rewards = stack_rewards(scores)
    metrics = {
        "reward": mean_without_nan(rewards),
        "reward_std": mean_without_nan(_nan_std(rewards, axis=1)),
        "frac_reward_zero_std": float(is_idle.mean()),
        "answers/unscored": float(np.isnan(rewards).sum()),
        "answers/timed_out": float(sum(score.num_timed_out for score in scores)),
    }
    for name in scores[0].scores_by_reward:
        reward_values = np.concatenate([score.scores_by_reward[name] for score in scores])
        metrics[f"rewards/{name}/mean"] = mean_without_nan(reward_values)
        metrics[f"rewards/{name}/std"] = float(_nan_std(reward_values, axis=0))
    metrics |= _source_metrics(groups, rewards, is_idle)
    metrics |= _logged_metrics(scores)
    metrics |= _length_metrics(groups)
    return {name: value for name, value in metrics.items() if not np.isnan(value)}


def _length_metrics(groups: Sequence[AnswerGroup]) -> dict[str, float]:
    """Measure the answers' lengths in tokens, with the end token, and the share of answers without an end."""
    answers = all_answers(groups)
    lengths = np.array([len(answer.ids) for answer in answers], dtype=np.float64)
    ended = np.array([answer.has_ended for answer in answers])
    metrics = {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(1 - ended.mean()),
    }
    if ended.any():
        metrics["completions/mean_terminated_length"] = float(lengths[ended].mean())
    return metrics


def _source_metrics(groups: Sequence[AnswerGroup], rewards: np.ndarray, is_idle: np.ndarray) -> dict[str, float]:
    """Mean reward and share of idle groups of each source of prompts; {} if there is one source."""
    sources = np.array([group.prompt.source for group in groups])
    metrics = {}
    for source in sorted({*sources.tolist()} - {""}):
        metrics[f"reward/{source}"] = mean_without_nan(rewards[sources == source])
        metrics[f"frac_reward_zero_std/{source}"] = float(is_idle[sources == source].mean())
    return metrics


def _logged_metrics(scores: Sequence[GroupScores]) -> dict[str, float]:
    """Average what reward functions logged: `logged/NAME` by `log_metric`, `extra/NAME` of numbers in columns of `log_extra`.

    The prefixes keep them apart from a run's own metrics, which may have the same names. `maths` logging `steps` as 2.0 and 4.0
    becomes {"logged/maths/steps": 3.0}.
    """
    values_by_name: dict[str, list[float]] = {}
    for score in scores:
        for name, values in score.logged_numbers.items():
            values_by_name.setdefault(f"logged/{name}", []).extend(values)
    for score in scores:
        for name, column in score.extra_columns.items():
            numbers = [value for value in column if isinstance(value, int | float) and math.isfinite(value)]
            # The numbers in verl's dictionaries are logged under the same name already.
            if numbers and f"logged/{name}" not in values_by_name:
                values_by_name.setdefault(f"extra/{name}", []).extend(numbers)
    return {name: mean_without_nan(np.array(values, dtype=np.float64)) for name, values in values_by_name.items()}


def mean_without_nan(values: np.ndarray) -> float:
    """The mean of the values that are not nan; nan if all are."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _nan_std(values: np.ndarray, axis: int) -> np.ndarray:
    """The unbiased standard deviation along an axis of the values that are not nan; nan where fewer than two are left."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy warns of fewer than two
        deviation: np.ndarray = np.nanstd(values, axis=axis, ddof=1)
    return deviation
