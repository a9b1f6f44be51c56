"""What the project uses of sacrebleu beside its public interface. Read in sacrebleu 2.6; see tests/compat/test_small.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def weighted_score(metric: Any, answers: Sequence[str], references: Sequence[str]) -> Callable[[np.ndarray], float]:
    """sacrebleu's score of a corpus as a function for the bootstrap: of how often each answer counts, float64 [answers].

    There is one reference for each answer. Calls `_extract_corpus_statistics` and `_compute_score_from_stats` of sacrebleu's
    metrics, as its own significance tests do: counts of each sentence add up. The public `corpus_score` would count all
    sentences anew for each of a thousand resamples.
    """
    answer_statistics = np.array(
        metric._extract_corpus_statistics(answers, [references]), np.float64
    )  # [answers, counts]
    return lambda weights: float(metric._compute_score_from_stats((weights @ answer_statistics).tolist()).score)
