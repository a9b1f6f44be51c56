"""Seconds of a step on a GPU: its FLOPs, memory traffic and communication, each divided by the GPU's rate for it.

No kernel was timed for it. The shares of peak below are what well-shaped work commonly reaches, independent of every
measurement that plans are compared with in docs/evidence/plans.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from strategies.base import Precision
from trainer.planner.cost_model import CollectiveTiming, CostModel
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
    """Seconds of one step of one rank, by what bounds them (a roofline model).

    A step is a sequence of operations, each bound either by FLOPs (matrix products, attention) or by memory bandwidth (all
    others). So their seconds add up. Communication runs beside them, and counts as far as they do not hide it.
    """

    matmul_s: float
    """Matrix products and attention, which are bound by FLOPs."""
    memory_bound_s: float
    """All other operations of forward and backward passes, which are bound by memory bandwidth."""
    communication_s: float
    """Collectives, hidden behind computation or not."""
    exposed_communication_s: float
    """The part of `communication_s` that no computation hides."""
    optimizer_s: float
    """The optimizer's update, and what crosses to the host and back."""

    @property
    def total_s(self) -> float:
        """Seconds of the step."""
        return self.matmul_s + self.memory_bound_s + self.exposed_communication_s + self.optimizer_s


@dataclass(frozen=True, slots=True)
class MicroBatchLoad:
    """A rank's micro-batches, as they are on average."""

    num_rows_or_tokens: float
    """Rows if `CostModel.size_is_in_rows`, else tokens."""
    sum_of_squared_lengths: float
    """Sum of the squared lengths of a micro-batch's sequences."""
    num_micro_batches: int
    """How many a rank takes in a step."""


class CollectiveSeconds(NamedTuple):
    """Seconds that a step takes for collectives on weights and gradients."""

    in_passes_s: float
    """In forward and backward passes, beside computation that may hide them."""
    in_update_s: float
    """In the optimizer's update, where nothing hides them."""


def estimate_step_time(
    cost_model: CostModel, load: MicroBatchLoad, card: Card, precision: Precision, *, ranks_per_node: int
) -> StepTime:
    """Estimate the seconds of one rank's step on a GPU from its FLOPs and bytes, divided by the GPU's rates (a roofline model).

    `cost_model`: FLOPs and bytes of the step. `load`: the size of its average micro-batch, and their number. `card`: the GPU.
    `ranks_per_node`: they share the host's memory bandwidth where optimizer state lies on the host.
    """
    # FLOPs of products and attention, bytes that all other operations move, and bytes between host and device.
    work = cost_model.micro_batch_work(load.num_rows_or_tokens, load.sum_of_squared_lengths)
    # Forward and backward passes. An operation is bound by FLOPs or by memory, one after the other: their seconds add up.
    flops_per_s = card.tflops(precision) * 1e12 * PRODUCT_EFFICIENCY
    memory_bytes_per_s = card.memory_gb_s * 1e9 * MEMORY_EFFICIENCY
    matmul_s = load.num_micro_batches * work.flops / flops_per_s
    memory_bound_s = load.num_micro_batches * work.moved_bytes / memory_bytes_per_s
    # Communication.
    collectives = collective_seconds(cost_model, load.num_micro_batches, card)  # on weights and gradients
    exposed_s = _exposed_collective_s(cost_model, load.num_micro_batches, collectives, matmul_s + memory_bound_s)
    # All-to-alls of tokens are all exposed: attention and experts wait for tokens of other ranks, and the next layer for its own.
    all_to_all_s = load.num_micro_batches * token_all_to_all_s(cost_model, load.num_rows_or_tokens, card)
    # The optimizer's update, and copies between host and device.
    host_copy_s = load.num_micro_batches * work.host_copy_bytes / (card.host_gb_s * 1e9 * LINK_EFFICIENCY)
    optimizer_s = cost_model.update_bytes / memory_bytes_per_s
    optimizer_s += host_copy_s
    optimizer_s += _host_update_s(cost_model, ranks_per_node)
    # `card.pace`: seconds of a measured step, divided by what this function estimates for it; 1 if none was measured.
    return StepTime(
        matmul_s=card.pace * matmul_s,
        memory_bound_s=card.pace * memory_bound_s,
        communication_s=card.pace * (collectives.in_passes_s + collectives.in_update_s + all_to_all_s),
        exposed_communication_s=card.pace * (exposed_s + all_to_all_s),
        optimizer_s=card.pace * optimizer_s,
    )


def _exposed_collective_s(
    cost_model: CostModel, num_micro_batches: int, collectives: CollectiveSeconds, compute_s: float
) -> float:
    """Seconds that a step waits for collectives on weights and gradients, because no computation runs beside them.

    Three add up: the seconds by which collectives of the passes take longer than the computation (`compute_s`); those of one
    block, beside which nothing is computed at the begin or end of a micro-batch; and those of the update.
    """
    one_block_s = collectives.in_passes_s / max(1, cost_model.num_blocks * num_micro_batches)
    return max(collectives.in_passes_s - compute_s, 0.0) + min(one_block_s, compute_s) + collectives.in_update_s


def _host_update_s(cost_model: CostModel, ranks_per_node: int) -> float:
    """Seconds in which the host's cores update the optimizer state that lies there; 0 if it is on the device."""
    keeps_state_on_host = cost_model.host_bytes > 2**20  # not just step counters
    if not keeps_state_on_host:
        return 0.0
    passes = 3  # states are read and written, gradients are read
    return passes * cost_model.host_bytes * ranks_per_node / (HOST_UPDATE_GB_S * 1e9)


def collective_seconds(cost_model: CostModel, num_micro_batches: int, card: Card) -> CollectiveSeconds:
    """Estimate the seconds of the collectives on weights and gradients in a step of so many micro-batches, hidden or not.

    `cost_model`: which collectives the simulated step has, and their bytes. `card`: the GPU, with the rates of its links.
    """
    in_passes_s = 0.0
    in_update_s = 0.0
    for kind, total in cost_model.collective_totals.items():
        if kind.num_ranks == 1:
            continue
        latency_s = _collective_latency_s(total.num_calls, kind.num_hosts)
        sent_bytes = _ring_trips(kind.name, kind.num_ranks) * total.num_bytes
        seconds = latency_s + sent_bytes / ring_bytes_per_s(card, kind.num_ranks, kind.num_hosts)
        if kind.when == CollectiveTiming.update:
            in_update_s += seconds
        elif kind.when == CollectiveTiming.each_micro_batch and cost_model.accumulation > 1:
            # Counted in all simulated micro-batches but the last (`accumulation - 1`): scale to those of the real step.
            in_passes_s += seconds * (num_micro_batches - 1) / (cost_model.accumulation - 1)
        else:
            in_passes_s += seconds
    return CollectiveSeconds(in_passes_s, in_update_s)


def _collective_latency_s(num_calls: int, num_hosts: int) -> float:
    """Seconds that collectives take before their first bytes, as if messages went along a tree of hosts (log2(hosts) levels)."""
    return num_calls * COLLECTIVE_LATENCY_S * (1 + math.log2(num_hosts))


def token_all_to_all_s(cost_model: CostModel, num_rows_or_tokens: float, card: Card) -> float:
    """Estimate the seconds of the all-to-alls in a micro-batch, between ranks that share rows or a layer's experts.

    `num_rows_or_tokens`: the size of the micro-batch as the cost model counts it. `card`: the GPU, with the rates of its links.
    """
    seconds = 0.0
    for all_to_all in cost_model.token_all_to_alls:
        latency_s = _collective_latency_s(all_to_all.num_calls, all_to_all.num_hosts)
        size_bytes = cost_model.all_to_all_bytes(all_to_all, num_rows_or_tokens)
        # The part for ranks on the same host goes over links between cards, the part for other hosts over the network, which all
        # cards of a host share. Both are sent at the same time.
        ranks_per_host = all_to_all.num_ranks / all_to_all.num_hosts
        link_bytes = size_bytes * (ranks_per_host - 1) / all_to_all.num_ranks
        network_bytes = size_bytes * (1 - 1 / all_to_all.num_hosts) * card.gpus_per_node
        link_s = link_bytes / (card.link_gb_s * 1e9 * LINK_EFFICIENCY)
        network_s = network_bytes / (card.node_gb_s * 1e9 * LINK_EFFICIENCY)  # `node_gb_s`: from one host to the others
        seconds += latency_s + max(link_s, network_s)
    return seconds


def ring_bytes_per_s(card: Card, ranks: int, hosts: int) -> float:
    """Bytes a second that `ranks` ranks on `hosts` hosts pass on in a ring, as collectives do: those of its slowest link.

    Ranks of a host share its network, which counts if there are several hosts.
    """
    if hosts == 1:
        return card.link_gb_s * 1e9 * LINK_EFFICIENCY
    share_of_network = min(1.0, ranks / hosts / card.gpus_per_node)
    link_gb_s = card.link_gb_s if ranks > hosts else math.inf  # with one rank a host, no link within a host is used
    return min(link_gb_s, card.node_gb_s * share_of_network) * 1e9 * LINK_EFFICIENCY


def _ring_trips(operation_name: str, ranks: int) -> float:
    """How often the bytes of a collective pass each link of a ring of `ranks` ranks, by which its time is estimated.

    An all-gather over 8 ranks: 7/8, since each rank sends on all parts but one. An all-reduce goes around twice.
    `operation_name`: of the collective, such as `allreduce`.
    """
    passes = 1.0
    for collective, passes_of_collective in _RING_PASSES.items():
        if collective in operation_name:
            passes = passes_of_collective
    return passes * ((ranks - 1) / ranks)
