"""Times all-reduce, all-gather and transfers between each pair of nodes over the job's own backend, within seconds."""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

CPU_MIB, GPU_MIB = 2, 64
"""MiB that each rank sends in one exchange."""
TIMES = 3
MOST_ROUNDS = 16
"""Rounds of pairs; more nodes than that meet some of the others only."""


def exchange(device: str, timeout_s: float) -> dict[str, Any]:
    """Measure as one rank of the job that the environment describes (torchrun's variables); all ranks must call.

    Returns rates in GB/s: `all_reduce` and `all_gather` as a rank's link carries them, `pairs` [node, node, rate] both ways at
    once between the first ranks of nodes. Errors: those of torch.distributed where the ranks do not meet within `timeout_s`.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local, per_node = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    where = torch.device("cuda", local % max(1, torch.cuda.device_count())) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(where)
    began = time.monotonic()
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout_s))
    met_s = time.monotonic() - began
    try:
        mine = torch.ones((GPU_MIB if on_gpu else CPU_MIB) * 2**18, device=where)
        size = mine.nbytes
        ours = [torch.empty_like(mine) for _ in range(world)]
        reduce_s = _seconds(lambda: dist.all_reduce(mine.fill_(1.0)), where)
        if mine[0].item() != world:
            raise RuntimeError(f"all-reduce of {world} ones gave {mine[0].item():g} on rank {rank}")
        gather_s = _seconds(lambda: dist.all_gather(ours, mine), where)
        share = (world - 1) / world
        return {
            "backend": "nccl" if on_gpu else "gloo",
            "ranks": world,
            "met_s": met_s,
            "all_reduce": 2 * share * size / reduce_s / 1e9,
            "all_gather": share * size * world / gather_s / 1e9,
            "pairs": _pairs(world // per_node, per_node, mine) if world > per_node else [],
            "hosts": _hosts(world),
        }
    finally:
        dist.destroy_process_group()


def _seconds(run: Callable[[], Any], where: torch.device) -> float:
    """Median of some runs, the first of which sets connections up and is not counted."""
    took = []
    for _ in range(TIMES + 1):
        began = time.perf_counter()
        run()
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        took.append(time.perf_counter() - began)
    return max(statistics.median(took[1:]), 1e-9)


def _pairs(nodes: int, per_node: int, mine: torch.Tensor) -> list[tuple[int, int, float]]:
    """[node, node, GB/s] of pairs that exchange at the same time, each node with one other in a round. All ranks must call."""
    rank = dist.get_rank()
    theirs, found = torch.empty_like(mine), []
    for meeting in rounds(nodes)[:MOST_ROUNDS]:
        dist.barrier()
        pair = next((pair for pair in meeting if rank in (pair[0] * per_node, pair[1] * per_node)), None)
        if pair is None:
            continue
        first, second = pair[0] * per_node, pair[1] * per_node
        peer = second if rank == first else first

        def swap(peer: int = peer) -> None:
            # Which of the two comes first is the same on both sides.
            both = [dist.P2POp(dist.isend, mine, peer), dist.P2POp(dist.irecv, theirs, peer)]
            for work in dist.batch_isend_irecv(both):
                work.wait()

        took = _seconds(swap, mine.device)
        if rank == first:
            found.append((*pair, mine.nbytes / took / 1e9))
    heard: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(heard, found)
    return [pair for part in heard for pair in part]


def rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """All pairs of nodes, in rounds in which each node has at most one partner (the circle of a tournament)."""
    players: list[int | None] = [*range(nodes), *([None] if nodes % 2 else [])]
    half, found = len(players) // 2, []
    for _ in range(len(players) - 1):
        pairs = zip(players[:half], reversed(players[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        players = [players[0], players[-1], *players[1:-1]]
    return found


def _hosts(world: int) -> list[str]:
    heard: list[Any] = [None] * world
    dist.all_gather_object(heard, socket.gethostname())
    return heard
