"""How far a step stands out from those before it, by median and median absolute deviation, computed on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DEVIATIONS_PER_MAD = 1.4826
"""Standard deviations of normal values in one median absolute deviation."""
MIN_SPREAD = 0.01
"""Share of the median that a standard deviation is at least: what hardly moves makes no outliers of trifles."""
MIN_STEPS = 5
"""Steps without which nothing is judged."""
MAX_SCORE = 1e6
"""Largest score."""


class RollingWindow:
    """Loss and gradient norm of the last steps, which new ones are judged against.

    Nothing waits for the device or communicates, but `rows`.
    """

    def __init__(self, window: int, device: torch.device, rows: Sequence[Sequence[float]] = (), width: int = 2) -> None:
        """`window`: steps that it holds. `rows`: numbers of earlier steps, oldest first, `width` each."""
        self.window = torch.full((window, width), torch.nan, dtype=torch.float64, device=device)
        """float64 [window, width], oldest first; NaN where there is no step yet."""
        newest = rows[-window:]
        if newest:
            self.window[-len(newest) :] = torch.tensor(newest, dtype=torch.float64)
        self.steady_steps = max(MIN_STEPS, window // 4)
        """Steps from which the spread counts as it is. That of fewer steps may be small by chance, and is widened."""

    def scores(self, values: Tensor) -> Tensor:
        """Tell how far a step stands out: by how many robust standard deviations each value is above the median of the window.

        `values` and the result are float64 [width]: loss and gradient norm, as a rule. Robust: estimated by medians, which few
        outliers hardly move. NaN while the window holds too few steps, and if any value is not finite.
        """
        middle = _median_of_columns(self.window)
        deviation = DEVIATIONS_PER_MAD * _median_of_columns((self.window - middle).abs())
        spread = torch.maximum(deviation, MIN_SPREAD * middle.abs())
        num_steps = (~self.window.isnan()).sum(0)
        # The deviation of few steps may be small by chance: it counts for more until there are `steady_steps`.
        widening = (self.steady_steps / num_steps.clamp(min=1).double()).clamp(min=1.0)
        scores = ((values - middle) / (spread * widening)).clamp(max=MAX_SCORE)
        has_enough_steps = num_steps >= MIN_STEPS
        return torch.where(has_enough_steps & values.isfinite().all(), scores, torch.nan)

    def newest_scores(self) -> Tensor:
        """The scores of the newest step in the window, by the window that it is in: float64 [width]."""
        return self.scores(self.window[-1])

    def push(self, values: Tensor, joins: Tensor) -> None:
        """Add a step to the window in place of the oldest one, if `joins` (0-d bool on the device) is true; waits for nothing."""
        shifted = torch.cat([self.window[1:], values[None]])
        # Both windows are computed, so that the host need not know the answer.
        self.window = torch.where(joins, shifted, self.window)

    def rows(self) -> list[list[float]]:
        """The values of the steps that the window holds, oldest first, on the host. Waits for the device."""
        return [row for row in self.window.tolist() if not math.isnan(row[0])]


def _median_of_columns(values: Tensor) -> Tensor:
    """The median of each column of float64 [n, width], without NaN, computed on the device: [width]; NaN if there is no other.

    `torch.nanmedian` would take the lower of the two middle values, not their mean.
    """
    ordered = values.sort(0).values  # NaN is sorted last
    counts = (~values.isnan()).sum(0)
    # The indices of the two middle values of each column, which are the same if the count is odd.
    low_index = ((counts - 1).clamp(min=0) // 2)[None]
    high_index = (counts // 2)[None].clamp(max=len(values) - 1)
    return (ordered.gather(0, low_index) + ordered.gather(0, high_index))[0] / 2
