"""How evenly a step's tokens spread over the experts of each layer, and over the ranks that hold them."""

from __future__ import annotations

from torch import Tensor


def expert_load_by_layer(tokens_by_expert: Tensor, expert_ranks: int = 1) -> list[dict[str, float]]:
    """Measure how evenly the router of each layer spread tokens over the experts: [{"max_over_mean": 1.8, "unused": 0.1}, ...].

    `tokens_by_expert`: int64 [layers, experts], how many tokens chose each expert; below 0 if a layer has no such expert.
    `max_over_mean` is the tokens of the busiest expert over the mean of all (1 if they are even), and `unused` the share of
    experts without a token. If experts are spread over several `expert_ranks`, `rank_max_over_mean` is the same of the busiest
    rank: how much more than its share arrives there.
    """
    loads = []
    for row in tokens_by_expert.double():
        layer_tokens = row[row >= 0]  # of the experts that this layer has
        load = {
            "max_over_mean": _max_over_mean(layer_tokens),
            "unused": float((layer_tokens == 0).double().mean()),
        }
        if expert_ranks > 1:
            tokens_by_rank = layer_tokens.view(expert_ranks, -1).sum(dim=1)  # a rank holds consecutive experts
            load["rank_max_over_mean"] = _max_over_mean(tokens_by_rank)
        loads.append(load)
    return loads


def _max_over_mean(tokens: Tensor) -> float:
    """The largest of these counts over their mean; 1 if all are 0."""
    mean = float(tokens.mean())
    return float(tokens.max()) / mean if mean else 1.0


def expert_metrics(tokens_by_expert: Tensor, expert_ranks: int = 1) -> dict[str, float]:
    """How evenly a step's tokens spread over experts, as metrics: {"experts/max_over_mean": 1.8, "experts/unused": 0.1}.

    The first is that of the least even layer, the second is over the experts of all layers. If experts are spread over
    several `expert_ranks`, also `experts/rank_max_over_mean` of the least even layer. `tokens_by_expert`: int64 [layers,
    experts], below 0 if a layer has no such expert.
    """
    loads = expert_load_by_layer(tokens_by_expert, expert_ranks)
    metrics = {
        "experts/max_over_mean": max(layer["max_over_mean"] for layer in loads),
        "experts/unused": int((tokens_by_expert == 0).sum()) / int((tokens_by_expert >= 0).sum()),
    }
    if expert_ranks > 1:
        metrics["experts/rank_max_over_mean"] = max(layer["rank_max_over_mean"] for layer in loads)
    return metrics
