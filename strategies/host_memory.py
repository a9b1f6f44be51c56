"""Collectives of CPU ranks on one host through memory they share: gloo would send every byte through loopback sockets.

Each rank owns a region that all others map. A collective is: write into the own region, meet, read from the others'.
Ranks meet by counters in their regions, a few microseconds after the last has come where gloo's barrier takes up to half a
millisecond; a peer that died or makes no progress ends the wait with an error. Regions are anonymous memory files:
nothing is left behind, however a run ends.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from strategies.communication_counters import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, counted_collective
from strategies.runtime import Runtime

_HEADER_BYTES = 4096
"""Bytes before the slots of a region, for its counter."""
_SLOT_BYTES = 8 * 2**20
"""Bytes that a rank hands over at a time. Each rank has two slots, used in turn: who writes a slot again has met everyone
since it was last read."""
_SPIN_S = 0.005
"""Seconds that a wait keeps its core; then it sleeps between looks."""


class HostMemory:
    """The regions of a group's ranks. All its ranks must make the same calls in the same order, with contiguous tensors."""

    def __init__(
        self, group: dist.ProcessGroup | None, regions: list[Tensor], processes: list[int], timeout_s: float
    ) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), len(regions)
        self._regions = [region[_HEADER_BYTES:].view(2, -1) for region in regions]
        self._counters: list[np.ndarray] = [region[:8].view(torch.int64).numpy() for region in regions]
        self._ranks, self._processes, self._timeout_s = dist.get_process_group_ranks(group), processes, timeout_s
        self._meetings_so_far = self._current_slot = 0

    @counted_collective(ALL_GATHER, 0)
    def all_gather(self, output: Tensor, input: Tensor) -> None:
        """The ranks' `input`s [n], one after another, to `output` [ranks * n] on every rank; `input` may be its own part."""
        gathered, own_part = output.view(self.size, -1), input.view(-1)
        if gathered[self.rank].data_ptr() != own_part.data_ptr():
            gathered[self.rank].copy_(own_part)
        for start, slots in self._chunks(own_part, own_part.numel()):
            chunk = own_part[start : start + slots[0].numel()]
            slots[self.rank].copy_(chunk)
            self._wait_for_all()
            for peer in self._peers():
                gathered[peer, start : start + chunk.numel()].copy_(slots[peer])

    @counted_collective(REDUCE_SCATTER, 1)
    def reduce_scatter(self, output: Tensor, input: Tensor, *, average: bool) -> None:
        """The sum or mean over the ranks of the part of `input` [ranks * n] that belongs to this rank, to `output` [n]."""
        parts, total = input.view(self.size, -1), output.view(-1)
        for start, slots in self._chunks(total, total.numel(), parts=self.size):
            count = slots[0].numel() // self.size
            for peer in self._peers():
                slots[self.rank].view(self.size, -1)[peer].copy_(parts[peer, start : start + count])
            self._wait_for_all()
            peer_parts = [slots[peer].view(self.size, -1)[self.rank] for peer in self._peers()]
            self._combine(parts[self.rank, start : start + count], peer_parts, total[start : start + count], average)

    @counted_collective(ALL_REDUCE, 0)
    def all_reduce(self, tensor: Tensor, *, average: bool) -> None:
        """The sum or mean of `tensor` over the ranks, in place, the same to the bit on every rank."""
        flat = tensor.view(-1)
        for start, slots in self._chunks(flat, flat.numel()):
            chunk = flat[start : start + slots[0].numel()]
            bounds = [chunk.numel() * rank // self.size for rank in range(self.size + 1)]
            shares = [slice(*share_bounds) for share_bounds in pairwise(bounds)]
            own_share = shares[self.rank]
            for peer in self._peers():
                slots[self.rank][shares[peer]].copy_(chunk[shares[peer]])
            self._wait_for_all()
            self._combine(
                chunk[own_share], [slots[peer][own_share] for peer in self._peers()], chunk[own_share], average
            )
            slots[self.rank][own_share].copy_(chunk[own_share])  # nobody else reads this share of the own slot before
            self._wait_for_all()
            for peer in self._peers():
                chunk[shares[peer]].copy_(slots[peer][shares[peer]])

    def _peers(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def _chunks(self, like: Tensor, count: int, parts: int = 1) -> Iterator[tuple[int, list[Tensor]]]:
        """(start, each rank's slot for `parts` times as many elements as handed over) until `count` elements are."""
        chunk_numel = _SLOT_BYTES // like.element_size() // parts
        for start in range(0, count, chunk_numel):
            self._current_slot = 1 - self._current_slot
            length = min(chunk_numel, count - start) * parts
            yield start, [region[self._current_slot].view(like.dtype)[:length] for region in self._regions]

    def _combine(self, own: Tensor, peer_parts: list[Tensor], out: Tensor, average: bool) -> None:
        """`out` may be `own`."""
        torch.add(own, peer_parts[0], out=out)
        for peer_part in peer_parts[1:]:
            out.add_(peer_part)
        if average:
            out.div_(self.size)

    def _wait_for_all(self) -> None:
        """Wait until every rank has come here as often as this one."""
        if not _STORES_IN_ORDER:
            dist.barrier(self.group)
            return
        self._meetings_so_far += 1
        self._counters[self.rank][0] = self._meetings_so_far
        for peer in self._peers():
            if self._counters[peer][0] < self._meetings_so_far:
                self._wait_for(peer)

    def _wait_for(self, peer: int) -> None:
        counter, start_time, last_check_s = self._counters[peer], time.monotonic(), 0.0
        while counter[0] < self._meetings_so_far:
            waited = time.monotonic() - start_time
            if waited < _SPIN_S:
                os.sched_yield()
                continue
            time.sleep(1e-4)
            if waited - last_check_s > 0.1:
                last_check_s = waited
                who = f"rank {self._ranks[self.rank]} waited {waited:.0f} s for its peer {self._ranks[peer]}"
                if _has_ended(self._processes[peer]):
                    raise RuntimeError(f"{who}, which has ended")
                if waited > self._timeout_s:
                    raise RuntimeError(f"timed out: {who} (run.timeout_s={self._timeout_s:.0f})")


_STORES_IN_ORDER = platform.machine().lower() in ("x86_64", "amd64")
"""Whether other cores see stores in the order they were made, so that a counter never overtakes what it announces."""


def _has_ended(process: int) -> bool:
    """Whether a process is gone, or only its exit status is left."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def open_host_memory(runtime: Runtime, group: dist.ProcessGroup | None = None) -> HostMemory | None:
    """The shared memory of a group's ranks; None for a single rank, on a GPU, where `run.shared_memory` forbids it, and
    where any rank cannot reach all the others'. All ranks of the group must call.
    """
    size = dist.get_world_size(group)
    if size == 1 or runtime.kind != "cpu" or runtime.simulated or not runtime.shared_memory:
        return None
    descriptor = _create_region()
    offers: list[tuple[str | None, int, int] | None] = [None] * size
    try:
        own_offer = None if descriptor is None else (_process_namespace(), os.getpid(), descriptor)
        dist.all_gather_object(offers, own_offer, group=group)
        regions = _map_regions(offers)
        mapped_by_rank = [False] * size
        dist.all_gather_object(mapped_by_rank, regions is not None, group=group)
        if regions is None or not all(mapped_by_rank):
            return None
        return HostMemory(group, regions, [offer[1] for offer in offers if offer], runtime.timeout_s)
    finally:
        if descriptor is not None:
            os.close(descriptor)  # what is mapped stays


def _create_region() -> int | None:
    try:
        descriptor = os.memfd_create("shardtune")
    except (AttributeError, OSError):  # only Linux has it
        return None
    try:
        os.posix_fallocate(descriptor, 0, _HEADER_BYTES + 2 * _SLOT_BYTES)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _process_namespace() -> str | None:
    """Where a process's number means the same process: the running kernel and the namespace of its processes."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip() + str(
            Path("/proc/self/ns/pid").readlink()
        )
    except OSError:
        return None


def _map_regions(offers: list[tuple[str | None, int, int] | None]) -> list[Tensor] | None:
    namespace = _process_namespace()
    if namespace is None or any(offer is None or offer[0] != namespace for offer in offers):
        return None
    try:
        paths = [f"/proc/{offer[1]}/fd/{offer[2]}" for offer in offers if offer]
        return [
            torch.from_file(path, shared=True, size=_HEADER_BYTES + 2 * _SLOT_BYTES, dtype=torch.uint8)
            for path in paths
        ]
    except (OSError, RuntimeError):  # another user's process, or a system that hides them
        return None
