"""Tests whether a series rises: the one-sided Mann-Kendall test, with its exact distribution without ties."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np

EXACT = 60
"""Numbers up to which the distribution is exact; beyond, and with ties, the normal one is taken."""


def rising_p_value(values: Sequence[float]) -> float:
    """The p-value of "they are in no order" against "they rise"; 1 of fewer than two."""
    count = len(values)
    if count < 2:
        return 1.0
    signs: list[float] = []
    for place, earlier in enumerate(values):
        signs += [np.sign(later - earlier) for later in values[place + 1 :]]
    ties = len(signs) - int(np.count_nonzero(signs))
    falls = sum(sign < 0 for sign in signs)
    if not ties and count <= EXACT:
        return float(_falls_distribution(count)[: falls + 1].sum())
    score = float(np.sum(signs))
    variance = (count * (count - 1) * (2 * count + 5) - _tie_correction(values)) / 18
    if variance <= 0:
        return 1.0
    return 0.5 * math.erfc((score - 1) / math.sqrt(2 * variance))  # one less, since the score is a whole number


@cache
def _falls_distribution(count: int) -> np.ndarray:
    """How likely each number of pairs in falling order is, of `count` numbers in no order (float64)."""
    ways = np.ones(1)
    for more in range(2, count + 1):
        ways = np.convolve(ways, np.full(more, 1 / more))
    return ways


def _tie_correction(values: Sequence[float]) -> float:
    _, counts = np.unique(np.asarray(values, np.float64), return_counts=True)
    return float((counts * (counts - 1) * (2 * counts + 5)).sum())
