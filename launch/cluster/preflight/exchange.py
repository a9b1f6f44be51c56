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
TIMES = 3
"""Measurements of each rate."""
MOST_ROUNDS = 16
"""Rounds of pairs; with more nodes than that, a node meets only some of the others."""


def exchange(device: str, timeout_s: float) -> dict[str, Any]:
    """Measure as one rank of the job that the environment describes (torchrun's variables); all ranks must call.

    Returns rates in GB/s: `all_reduce` and `all_gather` as a rank's link carries them, `pairs` [node, node, rate] both ways at
    once between the first ranks of nodes. Errors: those of torch.distributed if the ranks do not meet within `timeout_s`.
    """
    rank = int(os.environ["RANK"])
    world = int(os.environ["WORLD_SIZE"])
    ranks_per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    place = torch.device("cpu")
    if on_gpu:
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % max(1, torch.cuda.device_count()))
        torch.cuda.set_device(place)
    began = time.monotonic()
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout_s))
    rendezvous_s = time.monotonic() - began
    try:
        sent = torch.ones((GPU_MIB if on_gpu else CPU_MIB) * 2**18, device=place)  # float32: 2**18 are a MiB
        gathered = [torch.empty_like(sent) for _ in range(world)]
        reduce_s = _seconds(lambda: dist.all_reduce(sent.fill_(1.0)), place)
        if sent[0].item() != world:
            raise RuntimeError(f"all-reduce of {world} ones gave {sent[0].item():g} on rank {rank}")
        gather_s = _seconds(lambda: dist.all_gather(gathered, sent), place)
        # A ring sends this share of the data over each link: once to gather, twice to reduce.
        share = (world - 1) / world
        return {
            "backend": "nccl" if on_gpu else "gloo",
            "ranks": world,
            "met_s": rendezvous_s,
            "all_reduce": 2 * share * sent.nbytes / reduce_s / 1e9,
            "all_gather": share * sent.nbytes * world / gather_s / 1e9,
            "pairs": _pairs(world // ranks_per_node, ranks_per_node, sent) if world > ranks_per_node else [],
            "hosts": _hosts(world),
        }
    finally:
        dist.destroy_process_group()


def _seconds(run: Callable[[], Any], place: torch.device) -> float:
    """Median time of `run`. The first call sets connections up and is not counted."""
    times = []
    for _ in range(TIMES + 1):
        began = time.perf_counter()
        run()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        times.append(time.perf_counter() - began)
    return max(statistics.median(times[1:]), 1e-9)


def _pairs(nodes: int, ranks_per_node: int, sent: torch.Tensor) -> list[tuple[int, int, float]]:
    """[node, node, GB/s] of pairs of nodes. In a round each node exchanges with one other. All ranks must call."""
    rank = dist.get_rank()
    received = torch.empty_like(sent)
    rates = []
    for pairs in pairing_rounds(nodes)[:MOST_ROUNDS]:
        dist.barrier()
        for pair in pairs:
            # The first rank of each of the two nodes.
            first, second = (node * ranks_per_node for node in pair)
            if rank not in (first, second):
                continue
            peer = second if rank == first else first
            exchange_s = _seconds(partial(_swap, sent, received, peer), sent.device)
            if rank == first:
                rates.append((*pair, sent.nbytes / exchange_s / 1e9))
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
    """All pairs of nodes, in rounds in which each node has at most one partner (the circle of a tournament)."""
    players: list[int | None] = [*range(nodes)]
    if nodes % 2:
        players.append(None)  # its partner pauses
    half = len(players) // 2
    rounds = []
    for _ in range(len(players) - 1):
        pairs = []
        for one, other in zip(players[:half], reversed(players[half:]), strict=True):
            if one is not None and other is not None:
                pairs.append((min(one, other), max(one, other)))
        rounds.append(pairs)
        players = [players[0], players[-1], *players[1:-1]]  # the first stays, the others move on by one
    return rounds


def _hosts(world: int) -> list[str]:
    hosts: list[Any] = [None] * world
    dist.all_gather_object(hosts, socket.gethostname())
    return hosts
