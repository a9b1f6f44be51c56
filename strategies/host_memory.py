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

from strategies.communication_counters import GATHER, REDUCE, SCATTER, waits
from strategies.runtime import Runtime

_HEAD = 4096
"""Bytes before the slots of a region, for its counter."""
_SLOT = 8 * 2**20
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
        self._regions = [region[_HEAD:].view(2, -1) for region in regions]
        self._counters: list[np.ndarray] = [region[:8].view(torch.int64).numpy() for region in regions]
        self._ranks, self._processes, self._timeout_s = dist.get_process_group_ranks(group), processes, timeout_s
        self._meetings = self._turn = 0

    @waits(GATHER, 0)
    def all_gather(self, output: Tensor, input: Tensor) -> None:
        """The ranks' `input`s [n], one after another, to `output` [ranks * n] on every rank; `input` may be its own part."""
        whole, own = output.view(self.size, -1), input.view(-1)
        if whole[self.rank].data_ptr() != own.data_ptr():
            whole[self.rank].copy_(own)
        for at, slots in self._portions(own, own.numel()):
            part = own[at : at + slots[0].numel()]
            slots[self.rank].copy_(part)
            self._meet()
            for other in self._others():
                whole[other, at : at + part.numel()].copy_(slots[other])

    @waits(SCATTER, 1)
    def reduce_scatter(self, output: Tensor, input: Tensor, *, average: bool) -> None:
        """The sum or mean over the ranks of the part of `input` [ranks * n] that belongs to this rank, to `output` [n]."""
        parts, total = input.view(self.size, -1), output.view(-1)
        for at, slots in self._portions(total, total.numel(), parts=self.size):
            count = slots[0].numel() // self.size
            for other in self._others():
                slots[self.rank].view(self.size, -1)[other].copy_(parts[other, at : at + count])
            self._meet()
            theirs = [slots[other].view(self.size, -1)[self.rank] for other in self._others()]
            self._combine(parts[self.rank, at : at + count], theirs, total[at : at + count], average)

    @waits(REDUCE, 0)
    def all_reduce(self, tensor: Tensor, *, average: bool) -> None:
        """The sum or mean of `tensor` over the ranks, in place, the same to the bit on every rank."""
        flat = tensor.view(-1)
        for at, slots in self._portions(flat, flat.numel()):
            part = flat[at : at + slots[0].numel()]
            bounds = [part.numel() * rank // self.size for rank in range(self.size + 1)]
            shares = [slice(*ends) for ends in pairwise(bounds)]
            mine = shares[self.rank]
            for other in self._others():
                slots[self.rank][shares[other]].copy_(part[shares[other]])
            self._meet()
            self._combine(part[mine], [slots[other][mine] for other in self._others()], part[mine], average)
            slots[self.rank][mine].copy_(part[mine])  # nobody else reads this share of the own slot before
            self._meet()
            for other in self._others():
                part[shares[other]].copy_(slots[other][shares[other]])

    def _others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def _portions(self, like: Tensor, count: int, parts: int = 1) -> Iterator[tuple[int, list[Tensor]]]:
        """(start, each rank's slot for `parts` times as many elements as handed over) until `count` elements are."""
        per = _SLOT // like.element_size() // parts
        for at in range(0, count, per):
            self._turn = 1 - self._turn
            length = min(per, count - at) * parts
            yield at, [region[self._turn].view(like.dtype)[:length] for region in self._regions]

    def _combine(self, own: Tensor, theirs: list[Tensor], out: Tensor, average: bool) -> None:
        """`out` may be `own`."""
        torch.add(own, theirs[0], out=out)
        for further in theirs[1:]:
            out.add_(further)
        if average:
            out.div_(self.size)

    def _meet(self) -> None:
        """Wait until every rank has come here as often as this one."""
        if not _ORDERED:
            dist.barrier(self.group)
            return
        self._meetings += 1
        self._counters[self.rank][0] = self._meetings
        for other in self._others():
            if self._counters[other][0] < self._meetings:
                self._await(other)

    def _await(self, other: int) -> None:
        counter, began, looked = self._counters[other], time.monotonic(), 0.0
        while counter[0] < self._meetings:
            waited = time.monotonic() - began
            if waited < _SPIN_S:
                os.sched_yield()
                continue
            time.sleep(1e-4)
            if waited - looked > 0.1:
                looked = waited
                who = f"rank {self._ranks[self.rank]} waited {waited:.0f} s for its peer {self._ranks[other]}"
                if _ended(self._processes[other]):
                    raise RuntimeError(f"{who}, which has ended")
                if waited > self._timeout_s:
                    raise RuntimeError(f"timed out: {who} (run.timeout_s={self._timeout_s:.0f})")


_ORDERED = platform.machine().lower() in ("x86_64", "amd64")
"""Whether other cores see stores in the order they were made, so that a counter never overtakes what it announces."""


def _ended(process: int) -> bool:
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
    descriptor = _create()
    offers: list[tuple[str | None, int, int] | None] = [None] * size
    try:
        mine = None if descriptor is None else (_place(), os.getpid(), descriptor)
        dist.all_gather_object(offers, mine, group=group)
        regions = _map(offers)
        reached = [False] * size
        dist.all_gather_object(reached, regions is not None, group=group)
        if regions is None or not all(reached):
            return None
        return HostMemory(group, regions, [offer[1] for offer in offers if offer], runtime.timeout_s)
    finally:
        if descriptor is not None:
            os.close(descriptor)  # what is mapped stays


def _create() -> int | None:
    try:
        descriptor = os.memfd_create("shardtune")
    except (AttributeError, OSError):  # only Linux has it
        return None
    try:
        os.posix_fallocate(descriptor, 0, _HEAD + 2 * _SLOT)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _place() -> str | None:
    """Where a process's number means the same process: the running kernel and the namespace of its processes."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip() + str(
            Path("/proc/self/ns/pid").readlink()
        )
    except OSError:
        return None


def _map(offers: list[tuple[str | None, int, int] | None]) -> list[Tensor] | None:
    here = _place()
    if here is None or any(offer is None or offer[0] != here for offer in offers):
        return None
    try:
        paths = [f"/proc/{offer[1]}/fd/{offer[2]}" for offer in offers if offer]
        return [torch.from_file(path, shared=True, size=_HEAD + 2 * _SLOT, dtype=torch.uint8) for path in paths]
    except (OSError, RuntimeError):  # another user's process, or a system that hides them
        return None
