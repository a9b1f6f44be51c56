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
_RING_PASSES = {"allreduce": 2.0}
"""How often the bytes of a collective go around the ring of its ranks; once for others."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step of one rank."""

    products_s: float
    """Matrix products and attention."""
    moves_s: float
    """Everything else in forward and backward passes, which memory bounds."""
    collective_s: float
    """Collectives, hidden behind arithmetic or not."""
    exposed_s: float
    """The part of `collective_s` that no arithmetic hides."""
    update_s: float
    """The optimizer, and what crosses to the host and back."""

    @property
    def total_s(self) -> float:
        """Seconds of the step."""
        return self.products_s + self.moves_s + self.exposed_s + self.update_s


@dataclass(frozen=True, slots=True)
class MicroBatchLoad:
    """A rank's micro-batches, as they are on average."""

    num_units: float
    """Tokens, or rows if `CostModel.units_are_rows`."""
    sum_of_squared_lengths: float
    """Sum of the squared lengths of a micro-batch's sequences."""
    num_micro_batches: int
    """How many a rank takes in a step."""


def estimate_step_time(
    cost_model: CostModel, load: MicroBatchLoad, card: Card, precision: Precision, *, ranks_per_node: int
) -> StepTime:
    """The seconds of one rank's step on that card, by part.

    `cost_model`: operations and bytes of the step. `load`: the size of its average micro-batch, and their number.
    `ranks_per_node`: they share the host's memory bandwidth where optimizer state lies on the host.
    """
    product_flops_per_s = card.tflops(precision) * 1e12 * PRODUCT_EFFICIENCY
    memory_bytes_per_s = card.memory_gb_s * 1e9 * MEMORY_EFFICIENCY
    host_bytes_per_s = card.host_gb_s * 1e9 * LINK_EFFICIENCY
    flops, moved_bytes, host_copy_bytes = cost_model.micro_batch_work(load.num_units, load.sum_of_squared_lengths)
    # Forward and backward passes.
    products_s = load.num_micro_batches * flops / product_flops_per_s
    moves_s = load.num_micro_batches * moved_bytes / memory_bytes_per_s
    compute_s = products_s + moves_s
    # Collectives on weights and gradients run beside the computation. Exposed are the seconds by which they take longer, and one
    # block's collectives, beside which nothing is computed at the begin or end of a micro-batch.
    overlappable_s, update_collective_s = collective_seconds(cost_model, load.num_micro_batches, card)
    one_block_s = overlappable_s / max(1, cost_model.num_blocks * load.num_micro_batches)
    exposed_s = max(overlappable_s - compute_s, 0.0) + min(one_block_s, compute_s) + update_collective_s
    # All-to-alls of tokens are all exposed: attention and experts wait for tokens of other ranks, and the next layer for its own.
    token_all_to_all_total_s = load.num_micro_batches * token_all_to_all_s(cost_model, load.num_units, card)
    # The update, and copies between host and device.
    update_s = cost_model.update_bytes / memory_bytes_per_s
    update_s += load.num_micro_batches * host_copy_bytes / host_bytes_per_s
    keeps_state_on_host = cost_model.host_bytes > 2**20  # not just step counters
    if keeps_state_on_host:
        passes = 3  # states are read and written, gradients are read
        update_s += passes * cost_model.host_bytes * ranks_per_node / (HOST_UPDATE_GB_S * 1e9)
    # `card.pace`: seconds of a measured step, divided by what this function estimates for it; 1 if none was measured.
    return StepTime(
        products_s=card.pace * products_s,
        moves_s=card.pace * moves_s,
        collective_s=card.pace * (overlappable_s + update_collective_s + token_all_to_all_total_s),
        exposed_s=card.pace * (exposed_s + token_all_to_all_total_s),
        update_s=card.pace * update_s,
    )


def collective_seconds(cost_model: CostModel, micro_batches: int, card: Card) -> tuple[float, float]:
    """Seconds of the collectives on weights and gradients, in a step of `micro_batches` micro-batches.

    Returns (seconds in forward and backward passes, which computation may hide; seconds in the update, which nothing hides).
    """
    overlappable_s = 0.0
    update_collective_s = 0.0
    for (name, ranks, hosts, _dtype, when), (calls, size) in cost_model.collective_totals.items():
        if ranks == 1:
            continue
        latency_s = calls * COLLECTIVE_LATENCY_S * (1 + math.log2(hosts))
        seconds = latency_s + _ring_trips(name, ranks) * size / ring_bytes_per_s(card, ranks, hosts)
        if when == "update":
            update_collective_s += seconds
        elif when == "each" and cost_model.accumulation > 1:
            # Counted in all simulated micro-batches but the last (`accumulation - 1`): scale to those of the real step.
            overlappable_s += seconds * (micro_batches - 1) / (cost_model.accumulation - 1)
        else:
            overlappable_s += seconds
    return overlappable_s, update_collective_s


def token_all_to_all_s(cost_model: CostModel, units: float, card: Card) -> float:
    """Seconds of the all-to-alls between ranks that share rows or experts, in a micro-batch of `units` (rows or tokens)."""
    seconds = 0.0
    for all_to_all in cost_model.token_all_to_alls:
        latency_s = all_to_all.num_calls * COLLECTIVE_LATENCY_S * (1 + math.log2(all_to_all.num_hosts))
        size = cost_model.all_to_all_bytes(all_to_all, units)
        # The part for ranks on the same host goes over links between cards, the part for other hosts over the network, which all
        # cards of a host share. Both are sent at the same time.
        ranks_per_host = all_to_all.num_ranks / all_to_all.num_hosts
        link_bytes = size * (ranks_per_host - 1) / all_to_all.num_ranks
        network_bytes = size * (1 - 1 / all_to_all.num_hosts) * card.gpus_per_node
        link_s = link_bytes / (card.link_gb_s * 1e9 * LINK_EFFICIENCY)
        network_s = network_bytes / (card.node_gb_s * 1e9 * LINK_EFFICIENCY)
        seconds += latency_s + max(link_s, network_s)
    return seconds


def ring_bytes_per_s(card: Card, ranks: int, hosts: int) -> float:
    """Bytes a second that a ring of `ranks` ranks on `hosts` hosts passes on: those of its slowest link."""
    if hosts == 1:
        return card.link_gb_s * 1e9 * LINK_EFFICIENCY
    share_of_network = min(1.0, ranks / hosts / card.gpus_per_node)
    link_gb_s = card.link_gb_s if ranks > hosts else math.inf  # with one rank a host, no link within a host is used
    return min(link_gb_s, card.node_gb_s * share_of_network) * 1e9 * LINK_EFFICIENCY


def _ring_trips(operation_name: str, ranks: int) -> float:
    """How often the bytes of a collective pass each link of a ring of `ranks` ranks; `operation_name`: such as `allreduce_`."""
    passes = 1.0
    for collective, passes_of_collective in _RING_PASSES.items():
        if collective in operation_name:
            passes = passes_of_collective
    return passes * ((ranks - 1) / ranks)
