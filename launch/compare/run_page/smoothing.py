"""Smooths a curve by an exponential mean."""

from __future__ import annotations


def smoothing_weight(num_steps: float, min_steps: int) -> float:
    """The weight of the earlier values in an exponential mean that smooths like a mean over `num_steps`.

    At least `min_steps` are averaged. 0 if both are 0: then nothing is smoothed.
    """
    # The usual convention for N steps: alpha = 2 / (N + 1), with which both means have the same centre of mass.
    window = max(num_steps, min_steps)
    return 1 - 2 / (window + 1) if window else 0.0


def smoothed(value_by_step: dict[int, float], weight: float) -> dict[int, float]:
    """Smooth a curve by an exponential mean over the steps so far, without a bias towards 0 at the beginning.

    `value_by_step`: finite values. `weight`: that of the earlier values, from 0 (no smoothing) to below 1.
    """
    mean = 0.0
    sum_of_weights = 0.0  # of all values so far: it approaches 1
    mean_by_step = {}
    for step, value in value_by_step.items():
        mean = weight * mean + (1 - weight) * value
        sum_of_weights = weight * sum_of_weights + (1 - weight)
        mean_by_step[step] = mean / sum_of_weights
    return mean_by_step
