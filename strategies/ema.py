"""An exponential moving average of the trained weights, sharded like them (Polyak and Juditsky 1992).

After update `n`, the average moves by `1 - min(decay, (1 + n) / (10 + n))` towards the weights, so that early steps
do not make it lag. It is element-wise: each rank averages its own elements, and all strategies give the same values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EMA_KEY = "ema"
"""Its name beside the moments in a checkpoint."""


class WeightAverage:
    """The average of live tensors; on each rank of what it holds. Nothing here communicates or waits for the device."""

    def __init__(self, decay: float, weights: Sequence[Tensor]) -> None:
        """`weights` are float32, flat or not, and are updated in place by whoever owns them."""
        self.decay, self.weights = decay, list(weights)
        self.averages = [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def update(self, updates: Tensor, applied: Tensor) -> None:
        """After update number `updates` (0-d); nothing moves where it was not `applied` (0-d bool or float)."""
        share = applied.float() * (1 - ((1 + updates) / (10 + updates)).clamp(max=self.decay))
        for average, weight in zip(self.averages, self.weights, strict=True):
            average.lerp_(weight.detach(), share.to(average.device, average.dtype))

    @torch.no_grad()
    def swap(self) -> None:
        """Let the weights be the average, and the average the weights; twice is nothing, to the bit."""
        for average, weight in zip(self.averages, self.weights, strict=True):
            trained = weight.detach().clone()
            weight.detach().copy_(average)
            average.copy_(trained)
