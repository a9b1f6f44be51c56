"""How evenly a step's tokens spread over the experts of each layer."""

from __future__ import annotations

from torch import Tensor


def by_layer(tokens: Tensor) -> list[dict[str, float]]:
    """Of each layer of `tokens [layers, experts]` (below zero where a layer has no such expert):

    `max_over_mean`, the tokens of its busiest expert over the mean of all (1 where they are even), and `unused`, the share
    of its experts without a token.
    """
    rows = []
    for row in tokens.double():
        there = row[row >= 0]
        mean = float(there.mean())
        rows.append(
            {
                "max_over_mean": float(there.max()) / mean if mean else 1.0,
                "unused": float((there == 0).double().mean()),
            }
        )
    return rows


def of_step(tokens: Tensor) -> dict[str, float]:
    """`experts/max_over_mean` of the least even layer, and `experts/unused` over the experts of all layers."""
    layers, there = by_layer(tokens), tokens >= 0
    return {
        "experts/max_over_mean": max(layer["max_over_mean"] for layer in layers),
        "experts/unused": int((tokens == 0).sum()) / int(there.sum()),
    }
