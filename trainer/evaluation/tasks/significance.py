"""Significance when several numbers are tested together and any one of them would be reported."""

from __future__ import annotations

import numpy as np

LEVEL = 0.05
"""p below which something is told."""


def max_statistic_p(found: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """How often, by `chance` (float64 [draws, metrics]), the largest of all is as large as each that was `found` ([metrics])."""
    spread = np.sqrt(np.mean(chance**2, axis=0))
    spread = np.where(spread > 0, spread, np.inf)
    most = np.max(np.abs(chance) / spread, axis=1, initial=0.0)
    return (1 + (most[:, None] >= np.abs(found) / spread - 1e-12).sum(axis=0)) / (len(chance) + 1)
