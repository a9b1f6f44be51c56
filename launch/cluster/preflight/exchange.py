"""Times all-reduce, all-gather and transfers between each pair of nodes over the job's own backend, within seconds."""

import os
import socket
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

CPU_MESSAGE_MIB = 2
"""MiB that each rank sends in one collective between CPUs."""
GPU_MESSAGE_MIB = 64
"""The same between GPUs, whose faster links need more data to show their rate."""
NUM_MEASUREMENTS = 3
"""Measurements of each rate."""
MAX_PAIRING_ROUNDS = 16
"""Rounds of pairs; with more nodes than that, a node meets only some of the others."""


class PairRate(NamedTuple):
    """How fast two nodes transfer data to each other, both ways at once."""

    first_node: int
    second_node: int
    gb_per_s: float


def measure_communication(device: str, timeout_s: float) -> dict[str, Any]:
    """Time how fast the ranks of a job exchange data, before the job starts: all-reduce, all-gather, transfers between nodes.

    Every rank must call; torchrun's variables in the environment say which one this is. Returns rates in GB/s: `all_reduce` and
    `all_gather` as a rank's link carries them, `pairs` of (node, node, rate) both ways at once between the first ranks of nodes;
    and `backend`, `ranks`, `met_s` (seconds until the ranks had met) and `hosts` (by rank).

    `device`: cpu, cuda or auto.
    Raises the errors of torch.distributed if the ranks do not meet within `timeout_s`, and RuntimeError for a wrong sum.
    """
    rank = int(os.environ["RANK"])
    world_size = int(os.environ["WORLD_SIZE"])
    ranks_per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    torch_device = _device_of_rank(device)
    on_gpu = torch_device.type == "cuda"
    # gloo beside NCCL: the ranks also exchange objects, such as their host names, which lie in host memory.
    backends = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    began = time.monotonic()
    dist.init_process_group(backends, timeout=timedelta(seconds=timeout_s))
    rendezvous_s = time.monotonic() - began
    try:
        message_mib = GPU_MESSAGE_MIB if on_gpu else CPU_MESSAGE_MIB
        message = torch.ones(message_mib * 2**18, device=torch_device)  # float32: 2**18 are a MiB
        gathered = [torch.empty_like(message) for _ in range(world_size)]
        # Filled with ones before each call, which leaves the sum over all ranks in it.
        reduce_s = _median_seconds(lambda: dist.all_reduce(message.fill_(1.0)), torch_device)
        if message[0].item() != world_size:
            raise RuntimeError(f"all-reduce of {world_size} ones gave {message[0].item():g} on rank {rank}")
        gather_s = _median_seconds(lambda: dist.all_gather(gathered, message), torch_device)
        pair_rates: list[PairRate] = []
        if world_size > ranks_per_node:
            pair_rates = _measure_pairs(world_size // ranks_per_node, ranks_per_node, message)
        # A ring sends this share of the data over each link: once to gather, twice to reduce.
        ring_share = (world_size - 1) / world_size
        return {
            "backend": "nccl" if on_gpu else "gloo",
            "ranks": world_size,
            "met_s": rendezvous_s,
            "all_reduce": 2 * ring_share * message.nbytes / reduce_s / 1e9,
            "all_gather": ring_share * message.nbytes * world_size / gather_s / 1e9,
            "pairs": pair_rates,
            "hosts": _host_names_by_rank(world_size),
        }
    finally:
        dist.destroy_process_group()


def _device_of_rank(requested: str) -> torch.device:
    """The device on which this rank tests communication, for `cpu`, `cuda` or `auto` (a GPU if there is one).

    Makes a GPU the current one, since NCCL takes that.
    """
    uses_gpu = requested == "cuda" or (requested == "auto" and torch.cuda.is_available())
    if not uses_gpu:
        return torch.device("cpu")
    gpu_index = int(os.environ["LOCAL_RANK"]) % max(1, torch.cuda.device_count())
    device = torch.device("cuda", gpu_index)
    torch.cuda.set_device(device)
    return device


def _median_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """How long one collective or transfer takes: the median over `NUM_MEASUREMENTS` calls of `run`, in seconds.

    A first call sets connections up and is not counted.
    `device`: a GPU is waited for, since its calls return before they are done.
    """
    times_s = []
    for _ in range(NUM_MEASUREMENTS + 1):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times_s.append(time.perf_counter() - began)
    return max(statistics.median(times_s[1:]), 1e-9)  # never 0, since a rate is divided by it


def _measure_pairs(num_nodes: int, ranks_per_node: int, sent: torch.Tensor) -> list[PairRate]:
    """Time transfers between each two nodes, both ways at once between their first ranks. All ranks must call.

    `sent`: what each rank sends.
    Nodes are paired in rounds, in each of which a node has at most one partner, so that its transfers do not slow each other
    down. Only the first `MAX_PAIRING_ROUNDS` rounds are measured. Every rank gets the rates of all pairs.
    """
    rank = dist.get_rank()
    received = torch.empty_like(sent)
    own_rates = []
    for node_pairs in pairing_rounds(num_nodes)[:MAX_PAIRING_ROUNDS]:
        dist.barrier()
        for first_node, second_node in node_pairs:
            first_rank = first_node * ranks_per_node
            second_rank = second_node * ranks_per_node
            if rank not in (first_rank, second_rank):
                continue
            peer = second_rank if rank == first_rank else first_rank
            transfer_s = _median_seconds(partial(_swap, sent, received, peer), sent.device)
            if rank == first_rank:  # one of the two reports the pair
                own_rates.append(PairRate(first_node, second_node, sent.nbytes / transfer_s / 1e9))
    rates_by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rates_by_rank, own_rates)
    return [rate for rank_rates in rates_by_rank for rate in rank_rates]


def _swap(sent: torch.Tensor, received: torch.Tensor, peer: int) -> None:
    """Send to a rank and receive from it at the same time; both ranks must call."""
    # Send first, then receive, on both sides: the order of a batch must be the same.
    operations = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def pairing_rounds(num_nodes: int) -> list[list[tuple[int, int]]]:
    """All pairs of nodes, in rounds in which each node has at most one partner, as in a tournament (circle method).

    The nodes stand in a circle that is folded in the middle: who faces each other is a pair. From round to round the first stays,
    and the others move on by one place. 4 -> [[(0, 3), (1, 2)], [(0, 2), (1, 3)], [(0, 1), (2, 3)]]
    """
    circle: list[int | None] = [*range(num_nodes)]
    if num_nodes % 2:
        circle.append(None)  # its partner pauses
    half = len(circle) // 2
    rounds = []
    for _ in range(len(circle) - 1):
        pairs = []
        for node, facing_node in zip(circle[:half], reversed(circle[half:]), strict=True):
            if node is not None and facing_node is not None:
                pairs.append((min(node, facing_node), max(node, facing_node)))
        rounds.append(pairs)
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def _host_names_by_rank(world_size: int) -> list[str]:
    """The host name of each rank, by rank. All ranks must call."""
    hosts: list[Any] = [None] * world_size
    dist.all_gather_object(hosts, socket.gethostname())
    return hosts
