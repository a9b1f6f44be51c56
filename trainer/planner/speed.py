"""Seconds of a step on a GPU, from its arithmetic, the bytes that it moves and exchanges, and the GPU's rates.

No kernel was timed for it. The shares of peak below are what well-shaped work commonly reaches, independent of every
measurement that plans are compared with in docs/evidence/plans.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from strategies.base import Precision
from trainer.planner.cost_model import CostModel
from trainer.planner.hardware import Card

PRODUCT_EFFICIENCY = 0.75
"""Share of the peak that products and attention reach."""
MEMORY_EFFICIENCY = 0.85
"""Share of its rate that memory reaches."""
LINK_EFFICIENCY = 0.8
"""Share of their rate that links reach with large messages."""
COLLECTIVE_LATENCY_S = 30e-6
"""Seconds that a collective takes before its first byte, within a node; once more for each doubling of nodes."""
HOST_UPDATE_GB_S = 40.0
"""GB/s at which a host's cores go through optimizer state that lies there, all ranks of a node together. An assumption."""
_WHOLE_TRIPS = {"allreduce": 2.0}
"""How often the bytes of a collective go around its ranks; once for others."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step of one rank."""

    products_s: float
    """Matrix products and attention."""
    moves_s: float
    """Everything else in forward and backward passes, which memory bounds."""
    exchange_s: float
    """Collectives, hidden behind arithmetic or not."""
    exposed_s: float
    """The part of `exchange_s` that no arithmetic hides."""
    update_s: float
    """The optimizer, and what crosses to the host and back."""

    @property
    def total_s(self) -> float:
        """Seconds of the step."""
        return self.products_s + self.moves_s + self.exposed_s + self.update_s


@dataclass(frozen=True, slots=True)
class MicroBatchLoad:
    """A rank's micro-batches, as they are on average."""

    units: float
    """Tokens, or rows if `CostModel.rows`."""
    squares: float
    """Sum of the squared lengths of a micro-batch's sequences."""
    micro_batches: int
    """How many a rank takes in a step."""


def step_time(
    cost_model: CostModel, load: MicroBatchLoad, card: Card, precision: Precision, *, ranks_per_node: int
) -> StepTime:
    """The seconds of one rank's step on that card, by part.

    `cost_model`: operations and bytes of the step. `load`: the size of its average micro-batch, and their number.
    `ranks_per_node`: they share the host's memory bandwidth where optimizer state lies on the host.
    """
    product_flops_per_s = card.tflops(precision) * 1e12 * PRODUCT_EFFICIENCY
    memory_bytes_per_s = card.memory_gb_s * 1e9 * MEMORY_EFFICIENCY
    host_bytes_per_s = card.host_gb_s * 1e9 * LINK_EFFICIENCY
    flops, moved, crossed = cost_model.work(load.units, load.squares)
    products_s = load.micro_batches * flops / product_flops_per_s
    moves_s = load.micro_batches * moved / memory_bytes_per_s
    compute_s = products_s + moves_s
    overlappable_s, update_exchange_s = exchange_s(cost_model, load.micro_batches, card)
    # Nothing hides what comes before the first product of a micro-batch, or after the last.
    unhidden_s = overlappable_s / max(1, cost_model.blocks * load.micro_batches)
    exposed_s = max(overlappable_s - compute_s, 0.0) + min(unhidden_s, compute_s) + update_exchange_s
    # Attention waits for the heads of the other slices, experts for the tokens of other ranks, and what follows waits for
    # its own tokens.
    waited_s = load.micro_batches * token_exchange_s(cost_model, load.units, card)
    update_s = cost_model.update_bytes / memory_bytes_per_s
    update_s += load.micro_batches * crossed / host_bytes_per_s
    if cost_model.host_bytes > 2**20:
        passes = 3  # states are read and written, gradients are read
        update_s += passes * cost_model.host_bytes * ranks_per_node / (HOST_UPDATE_GB_S * 1e9)
    # The pace is a measured step's time, divided by what this function estimates for it; 1 if none was measured.
    return StepTime(
        products_s=card.pace * products_s,
        moves_s=card.pace * moves_s,
        exchange_s=card.pace * (overlappable_s + update_exchange_s + waited_s),
        exposed_s=card.pace * (exposed_s + waited_s),
        update_s=card.pace * update_s,
    )


def exchange_s(cost_model: CostModel, micro_batches: int, card: Card) -> tuple[float, float]:
    """Seconds of a step's collectives over weights and gradients, on a step of `micro_batches` micro-batches.

    Returns (seconds in forward and backward passes, which arithmetic may hide; seconds in the update, which nothing hides).
    """
    overlappable_s = 0.0
    update_exchange_s = 0.0
    for (name, ranks, hosts, _dtype, when), (calls, size) in cost_model.exchanged.items():
        if ranks == 1:
            continue
        latency_s = calls * COLLECTIVE_LATENCY_S * (1 + math.log2(hosts))
        seconds = latency_s + _ring_trips(name, ranks) * size / ring_bytes_per_s(card, ranks, hosts)
        if when == "update":
            update_exchange_s += seconds
        elif when == "each" and cost_model.accumulation > 1:
            # The simulation counted these in all of its micro-batches but the last: scale them to the real number.
            overlappable_s += seconds * (micro_batches - 1) / (cost_model.accumulation - 1)
        else:
            overlappable_s += seconds
    return overlappable_s, update_exchange_s


def token_exchange_s(cost_model: CostModel, units: float, card: Card) -> float:
    """Seconds in which ranks that share rows or experts send each other tokens, in a micro-batch of `units` (rows or tokens)."""
    seconds = 0.0
    for exchange in cost_model.token_exchanges:
        latency_s = exchange.calls * COLLECTIVE_LATENCY_S * (1 + math.log2(exchange.hosts))
        size = cost_model.exchanged_bytes(exchange, units)
        ranks_a_host = exchange.ranks / exchange.hosts
        within_host = size * (ranks_a_host - 1) / exchange.ranks / (card.link_gb_s * 1e9 * LINK_EFFICIENCY)
        # All cards of a host send at a time through its links to the others.
        between_hosts = size * (1 - 1 / exchange.hosts) * card.gpus_per_node / (card.node_gb_s * 1e9 * LINK_EFFICIENCY)
        seconds += latency_s + max(within_host, between_hosts)
    return seconds


def ring_bytes_per_s(card: Card, ranks: int, hosts: int) -> float:
    """Bytes a second that a ring of `ranks` ranks on `hosts` hosts passes on: its slowest link."""
    if hosts == 1:
        return card.link_gb_s * 1e9 * LINK_EFFICIENCY
    share = min(1.0, ranks / hosts / card.gpus_per_node)
    inside = card.link_gb_s if ranks > hosts else math.inf
    return min(inside, card.node_gb_s * share) * 1e9 * LINK_EFFICIENCY


def _ring_trips(operation_name: str, ranks: int) -> float:
    """How often the bytes of a collective go around a ring of so many ranks."""
    whole_trips = 1.0
    for collective, trips in _WHOLE_TRIPS.items():
        if collective in operation_name:
            whole_trips = trips
    return whole_trips * ((ranks - 1) / ranks)
