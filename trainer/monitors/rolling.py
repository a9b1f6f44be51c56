"""How far a step stands out from those before it, by median and median absolute deviation, computed on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NORMAL = 1.4826
"""Standard deviations of normal values in one median absolute deviation."""
LEAST_SPREAD = 0.01
"""Share of the median that a standard deviation is at least: what hardly moves makes no outliers of trifles."""
MOST = 1e6
"""Largest score."""


class RollingWindow:
    """The values of the last steps that were taken in. Nothing here waits for the device or communicates."""

    def __init__(self, window: int, device: torch.device, rows: Sequence[Sequence[float]] = (), width: int = 2) -> None:
        """`rows` are values of earlier steps, oldest first, each of `width` numbers."""
        self.window = torch.full((window, width), torch.nan, dtype=torch.float64, device=device)
        """float64 [window, width], oldest first; NaN where there is no step yet."""
        if newest := rows[-window:]:
            self.window[-len(newest) :] = torch.tensor(newest, dtype=torch.float64)
        self.least = max(5, window // 4)

    def scores(self, values: Tensor) -> Tensor:
        """Standard deviations of each value (float64 [width]) above the median.

        NaN while the window holds too few steps, and where any value is not finite: that is reported by itself.
        """
        middle = _median(self.window)
        spread = NORMAL * _median((self.window - middle).abs())
        spread = torch.maximum(spread, LEAST_SPREAD * middle.abs())
        scores = ((values - middle) / spread).clamp(max=MOST)
        has_enough = (~self.window.isnan()).sum(0) >= self.least
        return torch.where(has_enough & values.isfinite().all(), scores, torch.nan)

    def push(self, values: Tensor, where: Tensor) -> None:
        """Let the newest step push the oldest out, `where` (0-d bool) it is to count."""
        self.window = torch.where(where, torch.cat([self.window[1:], values[None]]), self.window)

    def rows(self) -> list[list[float]]:
        """The values that are there, oldest first, on the host."""
        return [row for row in self.window.tolist() if not math.isnan(row[0])]


def _median(values: Tensor) -> Tensor:
    """Of each column of float64 [n, width], NaN left out; NaN where there is nothing else."""
    ordered = values.sort(0).values  # NaN is sorted last
    counts = (~values.isnan()).sum(0)
    # The two middle places of each column, which are one if the count is odd.
    low = ((counts - 1).clamp(min=0) // 2)[None]
    high = (counts // 2)[None].clamp(max=len(values) - 1)
    return (ordered.gather(0, low) + ordered.gather(0, high))[0] / 2
