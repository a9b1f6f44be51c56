"""Times all-reduce, all-gather and transfers between each pair of nodes over the job's own backend, within seconds."""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

CPU_MIB = 2
"""MiB that each rank sends in one exchange between CPUs."""
GPU_MIB = 64
"""The same between GPUs, whose faster links need more data to show their rate."""
TIMES = 3
"""Measurements of each rate."""
MOST_ROUNDS = 16
"""Rounds of pairs; with more nodes than that, a node meets only some of the others."""


def measure_communication(device: str, timeout_s: float) -> dict[str, Any]:
    """Time all-reduce, all-gather and transfers between nodes, as one rank of the job that torchrun's variables describe.

    All ranks must call. Returns rates in GB/s: `all_reduce` and `all_gather` as a rank's link carries them, `pairs` of
    (node, node, rate) both ways at once between the first ranks of nodes; and `backend`, `ranks`, `met_s` (seconds until the
    ranks had met) and `hosts` (by rank). Errors: those of torch.distributed if the ranks do not meet within `timeout_s`.
    """
    # The device and the process group.
    rank = int(os.environ["RANK"])
    world_size = int(os.environ["WORLD_SIZE"])
    ranks_per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    torch_device = torch.device("cpu")
    if on_gpu:
        gpu_index = int(os.environ["LOCAL_RANK"]) % max(1, torch.cuda.device_count())
        torch_device = torch.device("cuda", gpu_index)
        torch.cuda.set_device(torch_device)
    # gloo beside NCCL: the ranks also exchange objects, such as their host names, which lie in host memory.
    backends = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    began = time.monotonic()
    dist.init_process_group(backends, timeout=timedelta(seconds=timeout_s))
    rendezvous_s = time.monotonic() - began
    try:
        size_mib = GPU_MIB if on_gpu else CPU_MIB
        sent = torch.ones(size_mib * 2**18, device=torch_device)  # float32: 2**18 are a MiB
        gathered = [torch.empty_like(sent) for _ in range(world_size)]
        # Filled with ones before each call, which leaves the sum over all ranks in it.
        reduce_s = _median_seconds(lambda: dist.all_reduce(sent.fill_(1.0)), torch_device)
        if sent[0].item() != world_size:
            raise RuntimeError(f"all-reduce of {world_size} ones gave {sent[0].item():g} on rank {rank}")
        gather_s = _median_seconds(lambda: dist.all_gather(gathered, sent), torch_device)
        pairs = []
        if world_size > ranks_per_node:
            pairs = _measure_pairs(world_size // ranks_per_node, ranks_per_node, sent)
        # A ring sends this share of the data over each link: once to gather, twice to reduce.
        ring_share = (world_size - 1) / world_size
        return {
            "backend": "nccl" if on_gpu else "gloo",
            "ranks": world_size,
            "met_s": rendezvous_s,
            "all_reduce": 2 * ring_share * sent.nbytes / reduce_s / 1e9,
            "all_gather": ring_share * sent.nbytes * world_size / gather_s / 1e9,
            "pairs": pairs,
            "hosts": _hosts(world_size),
        }
    finally:
        dist.destroy_process_group()


def _median_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Median time of `run` over `TIMES` calls, in seconds. A first call sets connections up and is not counted."""
    times_s = []
    for _ in range(TIMES + 1):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times_s.append(time.perf_counter() - began)
    return max(statistics.median(times_s[1:]), 1e-9)  # a rate is divided by it


def _measure_pairs(nodes: int, ranks_per_node: int, sent: torch.Tensor) -> list[tuple[int, int, float]]:
    """(node, node, GB/s) for pairs of nodes, measured both ways at once between their first ranks. All ranks must call.

    `sent`: what each rank sends. Nodes exchange in rounds, in each of which a node has at most one partner. Only the first
    `MOST_ROUNDS` rounds are measured.
    """
    rank = dist.get_rank()
    received = torch.empty_like(sent)
    rates = []
    for pairs in pairing_rounds(nodes)[:MOST_ROUNDS]:
        dist.barrier()
        for first_node, second_node in pairs:
            first_rank = first_node * ranks_per_node
            second_rank = second_node * ranks_per_node
            if rank not in (first_rank, second_rank):
                continue
            peer = second_rank if rank == first_rank else first_rank
            exchange_s = _median_seconds(partial(_swap, sent, received, peer), sent.device)
            if rank == first_rank:
                rates.append((first_node, second_node, sent.nbytes / exchange_s / 1e9))
    # Every rank gets the rates of all.
    rates_by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rates_by_rank, rates)
    return [rate for rank_rates in rates_by_rank for rate in rank_rates]


def _swap(sent: torch.Tensor, received: torch.Tensor, peer: int) -> None:
    """Send to a rank and receive from it at the same time; both ranks must call."""
    # Send first, then receive, on both sides: the order of a batch must be the same.
    operations = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def pairing_rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """All pairs of nodes, in rounds in which each node has at most one partner, by the circle method of tournaments.

    The nodes stand in a circle that is folded in the middle: who faces each other is a pair. From round to round the first stays,
    and the others move on by one place. 4 -> [[(0, 3), (1, 2)], [(0, 2), (1, 3)], [(0, 1), (2, 3)]]
    """
    circle: list[int | None] = [*range(nodes)]
    if nodes % 2:
        circle.append(None)  # its partner pauses
    half = len(circle) // 2
    rounds = []
    for _ in range(len(circle) - 1):
        pairs = []
        for one, other in zip(circle[:half], reversed(circle[half:]), strict=True):
            if one is not None and other is not None:
                pairs.append((min(one, other), max(one, other)))
        rounds.append(pairs)
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def _hosts(world_size: int) -> list[str]:
    """The host name of each rank, by rank. All ranks must call."""
    hosts: list[Any] = [None] * world_size
    dist.all_gather_object(hosts, socket.gethostname())
    return hosts
