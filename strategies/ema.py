"""An exponential moving average of the trained weights, sharded like them (Polyak and Juditsky 1992).

After update `n`, the average moves by `1 - min(decay, (1 + n) / (10 + n))` towards the weights, so that early steps
do not make it lag. It is element-wise: each rank averages its own elements, and all strategies give the same values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EMA_KEY = "ema"
"""Key of the average in a checkpoint, beside the optimizer's moments."""


class WeightAverage:
    """Averages the tensors that this rank holds. Nothing here communicates or waits for the device."""

    def __init__(self, decay: float, weights: Sequence[Tensor]) -> None:
        """`weights`: live float32 tensors of any shape, which the optimizer updates in place."""
        self.decay = decay
        self.weights = list(weights)
        self.averages = [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def update(self, updates: Tensor, is_applied: Tensor) -> None:
        """Move the average after update number `updates` (0-d), unless it was skipped (`is_applied`, 0-d bool or float, is 0)."""
        decay = ((1 + updates) / (10 + updates)).clamp(max=self.decay)
        share = is_applied.float() * (1 - decay)
        for average, weight in zip(self.averages, self.weights, strict=True):
            average.lerp_(weight.detach(), share.to(average.device, average.dtype))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and averages in place. Doing it twice restores both, bit for bit."""
        for average, weight in zip(self.averages, self.weights, strict=True):
            trained = weight.detach().clone()
            weight.detach().copy_(average)
            average.copy_(trained)
