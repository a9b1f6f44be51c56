"""Tests whether a series rises: the one-sided Mann-Kendall test, with its exact distribution without ties."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np

MAX_VALUES_OF_EXACT_TEST = 60
"""Values up to which the distribution is exact; beyond, and with ties, the normal one is taken."""


def rising_p_value(values: Sequence[float]) -> float:
    """How likely chance makes a series rise as much as this one: the one-sided p-value of the Mann-Kendall test for a trend.

    Small if the values rise; 1 for fewer than two values. Of all pairs of an earlier and a later value, the test counts how
    many fall. Values in no order fall in half of the pairs. [1, 2, 3] has no falling pair, as one of the 6 orders of three
    values has: 1 / 6.
    """
    count = len(values)
    if count < 2:
        return 1.0
    series = np.asarray(values, np.float64)
    earlier, later = np.triu_indices(count, k=1)
    signs = np.sign(series[later] - series[earlier])  # of each pair: 1 if it rises, -1 if it falls, 0 for a tie
    num_ties = len(signs) - int(np.count_nonzero(signs))
    num_falls = int(np.count_nonzero(signs < 0))
    if not num_ties and count <= MAX_VALUES_OF_EXACT_TEST:
        return float(_falls_distribution(count)[: num_falls + 1].sum())

    # The sum of the signs is about normal, with a known variance that ties make smaller.
    score = float(np.sum(signs))
    _, group_sizes = np.unique(series, return_counts=True)  # groups of equal values
    tie_correction = float((group_sizes * (group_sizes - 1) * (2 * group_sizes + 5)).sum())
    variance = (count * (count - 1) * (2 * count + 5) - tie_correction) / 18
    if variance <= 0:
        return 1.0
    continuous_score = score - 1  # continuity correction: the score is a whole number
    return 0.5 * math.erfc(continuous_score / math.sqrt(2 * variance))


@cache
def _falls_distribution(count: int) -> np.ndarray:
    """The exact distribution behind the Mann-Kendall test without ties, as float64 probabilities by number of falling pairs.

    Of 0, 1, 2 ... pairs of an earlier and a later value that fall, among `count` different values in random order. The k-th
    number that is added has a random rank among the k, so it falls below 0 to k - 1 of those before it, each equally likely.
    """
    probabilities = np.ones(1)
    for size in range(2, count + 1):
        probabilities = np.convolve(probabilities, np.full(size, 1 / size))
    return probabilities
