"""How evenly a step's tokens spread over the experts of each layer."""

from __future__ import annotations

from torch import Tensor


def load_by_layer(tokens: Tensor) -> list[dict[str, float]]:
    """How evenly the router spread tokens over the experts, for each layer of a mixture-of-experts model.

    `tokens`: int64 [layers, experts], how many tokens chose each expert; below 0 if a layer has no such expert.
    `max_over_mean` is the tokens of the busiest expert over the mean of all (1 if they are even), and `unused` the share of
    experts without a token.
    """
    loads = []
    for layer in tokens.double():
        expert_tokens = layer[layer >= 0]
        mean = float(expert_tokens.mean())
        max_over_mean = float(expert_tokens.max()) / mean if mean else 1.0
        unused = float((expert_tokens == 0).double().mean())
        loads.append({"max_over_mean": max_over_mean, "unused": unused})
    return loads


def expert_metrics(tokens: Tensor) -> dict[str, float]:
    """`experts/max_over_mean` of the least even layer, and `experts/unused` over the experts of all layers."""
    num_experts = int((tokens >= 0).sum())
    return {
        "experts/max_over_mean": max(layer["max_over_mean"] for layer in load_by_layer(tokens)),
        "experts/unused": int((tokens == 0).sum()) / num_experts,
    }
