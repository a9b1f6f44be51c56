"""Significance when several numbers are tested together and any one of them would be reported."""

from __future__ import annotations

import numpy as np

SIGNIFICANCE_LEVEL = 0.05
"""A difference with a p below this is reported."""


def max_statistic_p(observed: np.ndarray, chance_effects: np.ndarray) -> np.ndarray:
    """p-values of several effects that are tested together, such as one for each group of people, corrected for their number.

    `observed`: float64 [metrics]. `chance_effects`: float64 [draws, metrics], the same effects if chance alone decides. p of a
    metric is the share of draws whose largest effect over all metrics is at least as large as the observed one, all of them in
    units of their spread by chance (root of the mean square). This is single-step max T of Westfall & Young 1993. Returns
    float64 [metrics].
    """
    spread = np.sqrt(np.mean(chance_effects**2, axis=0))
    spread = np.where(spread > 0, spread, np.inf)  # a metric that never moves by chance contributes nothing
    largest_by_chance = np.max(np.abs(chance_effects) / spread, axis=1, initial=0.0)  # [draws]
    observed_sizes = np.abs(observed) / spread  # [metrics]
    # The tolerance lets equal values count, whatever their rounding.
    is_as_large = largest_by_chance[:, None] >= observed_sizes - 1e-12  # [draws, metrics]
    # The observed assignment is one of the possible ones, hence the 1 + and + 1: p is never 0.
    return (1 + is_as_large.sum(axis=0)) / (len(chance_effects) + 1)
