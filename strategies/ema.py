"""An exponential moving average of the trained weights, sharded like them (Polyak and Juditsky 1992).

After update `n`, the average moves by `1 - min(decay, (1 + n) / (10 + n))` towards the weights, so that early steps
do not make it lag. It is element-wise: each rank averages its own elements, and all strategies give the same values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

KEY = "ema"
"""Its name beside the moments in a checkpoint."""


class Average:
    """The average of live tensors; on each rank of what it holds. Nothing here communicates or waits for the device."""

    def __init__(self, decay: float, weights: Sequence[Tensor]) -> None:
        """`weights` are float32, flat or not, and are updated in place by whoever owns them."""
        self.decay, self.weights = decay, list(weights)
        self.values = [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def update(self, updates: Tensor, kept: Tensor) -> None:
        """After update number `updates` (0-d); nothing moves where it was not `kept` (0-d bool or float)."""
        share = kept.float() * (1 - ((1 + updates) / (10 + updates)).clamp(max=self.decay))
        for value, weight in zip(self.values, self.weights, strict=True):
            value.lerp_(weight.detach(), share.to(value.device, value.dtype))

    @torch.no_grad()
    def swap(self) -> None:
        """Let the weights be the average, and the average the weights; twice is nothing, to the bit."""
        for value, weight in zip(self.values, self.weights, strict=True):
            kept = weight.detach().clone()
            weight.detach().copy_(value)
            value.copy_(kept)
