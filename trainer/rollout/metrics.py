"""Metrics of a round, by the names that TRL's GRPOTrainer gives them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np

from trainer.rollout.round import stack_rewards
from trainer.rollout.types import Group, GroupScores, all_answers


def round_metrics(groups: Sequence[Group], scores: Sequence[GroupScores], is_idle: np.ndarray) -> dict[str, float]:
    """The metrics of a round: rewards, lengths and how many answers are unscored. A mean over nothing is left out.

    A group is all answers to one prompt; `scores` has one entry a group. `is_idle`, bool [groups]: groups whose answers all
    score alike, and so teach nothing.
    """
    rewards = stack_rewards(scores)
    metrics = {
        "reward": _mean(rewards),
        "reward_std": _mean(_spread(rewards, axis=1)),
        "frac_reward_zero_std": float(is_idle.mean()),
        "answers/unscored": float(np.isnan(rewards).sum()),
        "answers/timed_out": float(sum(score.timed_out for score in scores)),
    }
    for name in scores[0].by_reward:
        reward_values = np.concatenate([score.by_reward[name] for score in scores])
        metrics[f"rewards/{name}/mean"] = _mean(reward_values)
        metrics[f"rewards/{name}/std"] = float(_spread(reward_values, axis=0))
    metrics |= _by_source(groups, rewards, is_idle) | _logged(scores) | _lengths(groups)
    return {name: value for name, value in metrics.items() if not np.isnan(value)}


def _lengths(groups: Sequence[Group]) -> dict[str, float]:
    """How long answers are, in tokens with their end token, and how many of them were cut off."""
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


def _by_source(groups: Sequence[Group], rewards: np.ndarray, is_idle: np.ndarray) -> dict[str, float]:
    """Mean reward and share of idle groups of each source, where the prompts have several."""
    sources = np.array([group.prompt.source for group in groups])
    metrics = {}
    for source in sorted({*sources.tolist()} - {""}):
        metrics[f"reward/{source}"] = _mean(rewards[sources == source])
        metrics[f"frac_reward_zero_std/{source}"] = float(is_idle[sources == source].mean())
    return metrics


def _logged(scores: Sequence[GroupScores]) -> dict[str, float]:
    """Means of what reward functions logged: `logged/NAME` by `log_metric`, `extra/NAME` of numbers in columns of `log_extra`.

    The prefixes keep them apart from a run's own metrics, which may have the same names. `maths` logging `steps` as 2.0 and 4.0
    becomes {"logged/maths/steps": 3.0}.
    """
    values_by_name: dict[str, list[float]] = {}
    for score in scores:
        for name, values in score.logged.items():
            values_by_name.setdefault(f"logged/{name}", []).extend(values)
    for score in scores:
        for name, column in score.extra.items():
            numbers = [value for value in column if isinstance(value, int | float) and math.isfinite(value)]
            # Of verl's dictionaries each number is logged too, under the same name: once is enough.
            if numbers and f"logged/{name}" not in values_by_name:
                values_by_name.setdefault(f"extra/{name}", []).extend(numbers)
    return {name: _mean(np.array(values, dtype=np.float64)) for name, values in values_by_name.items()}


def _mean(values: np.ndarray) -> float:
    """The mean of what is no nan; nan if nothing is left."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _spread(values: np.ndarray, axis: int) -> np.ndarray:
    """The unbiased standard deviation along an axis of what is no nan; nan where fewer than two are left."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy warns of fewer than two
        spread: np.ndarray = np.nanstd(values, axis=axis, ddof=1)
    return spread
