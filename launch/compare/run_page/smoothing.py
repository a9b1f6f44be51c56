"""Smooths a curve by an exponential mean."""

from __future__ import annotations


def smoothing_weight(num_steps: float, min_steps: int) -> float:
    """The weight of the earlier values in an exponential mean that smooths like a mean over `num_steps`; 0 smooths nothing.

    At least `min_steps` are averaged.
    """
    # The usual convention for N steps: alpha = 2 / (N + 1), with which both means have the same centre of mass.
    window = max(num_steps, min_steps)
    return 1 - 2 / (window + 1) if window else 0.0


def smoothed(values: dict[int, float], weight: float) -> dict[int, float]:
    """The exponential mean of finite values by step, without the bias towards 0 at the beginning."""
    mean = 0.0
    norm = 0.0
    smoothed_values = {}
    for step, value in values.items():
        mean = weight * mean + (1 - weight) * value
        norm = weight * norm + (1 - weight)  # the sum of all weights so far, which approaches 1
        smoothed_values[step] = mean / norm
    return smoothed_values
