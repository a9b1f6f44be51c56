"""Collectives of CPU ranks on one host through shared memory. gloo would send every byte through loopback sockets.

Each rank owns a region that all others map. In a collective each rank writes into its own region, waits for all others, and reads
from theirs. They wait by means of counters in the regions: that takes a few microseconds after the last rank has come, where
gloo's barrier takes up to half a millisecond. If a peer has died or makes no progress, the wait ends with an error. Regions are
anonymous memory files, so nothing is left behind, however a run ends.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from strategies.communication_counters import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, counted_collective
from strategies.runtime import Runtime

_HEADER_BYTES = 4096
"""Bytes at the beginning of a region, for its counter."""
_SLOT_BYTES = 8 * 2**20
"""Bytes that a rank hands over at a time. Each region has two slots, used in turn. Before a rank writes into a slot again, it has
waited for all others once more, so all of them have finished reading it."""
_SPIN_S = 0.005
"""Seconds for which a waiting rank keeps its core. After that it sleeps between looks."""


class HostMemory:
    """Collectives of a group's ranks. All of them must make the same calls in the same order, with contiguous tensors."""

    def __init__(
        self, group: dist.ProcessGroup | None, regions: list[Tensor], process_ids: list[int], timeout_s: float
    ) -> None:
        """Make collectives through shared memory for the ranks of `group` (None: all ranks), which are on this host.

        `regions`: the shared memory of each rank as this process has mapped it, uint8. `process_ids`: their processes, by
        which it is seen that one has ended. Both are in the order of the group's ranks. `timeout_s`: longest wait for a rank.
        """
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = len(regions)
        self._regions = [region[_HEADER_BYTES:].view(2, -1) for region in regions]
        self._barrier_counters: list[np.ndarray] = [region[:8].view(torch.int64).numpy() for region in regions]
        """One cell for each rank, in shared memory: how many barriers the rank has reached."""
        self._global_ranks = dist.get_process_group_ranks(group)
        self._process_ids = process_ids
        self._timeout_s = timeout_s
        self._num_barriers = 0
        """How often this rank has waited for all others; published in its region's counter."""
        self._current_slot = 0

    @counted_collective(ALL_GATHER, 0)
    def all_gather(self, output: Tensor, input: Tensor) -> None:
        """Concatenate the `input` [n] of each rank into `output` [ranks * n], on every rank. All ranks must call.

        `input` may be this rank's part of `output`. Chunk by chunk, each rank puts its own into its region of shared memory,
        waits for all, and reads those of the others. One wait a chunk is enough, since a region has two slots that chunks take
        in turn.
        """
        gathered = output.view(self.size, -1)
        own_part = input.view(-1)
        if gathered[self.rank].data_ptr() != own_part.data_ptr():
            gathered[self.rank].copy_(own_part)
        for start, slots in self._chunks(own_part, own_part.numel()):
            chunk = own_part[start : start + slots[0].numel()]
            stop = start + chunk.numel()
            slots[self.rank].copy_(chunk)
            self._wait_at_barrier()
            for peer in self._peers():
                gathered[peer, start:stop].copy_(slots[peer])

    @counted_collective(REDUCE_SCATTER, 1)
    def reduce_scatter(self, output: Tensor, input: Tensor, *, average: bool) -> None:
        """Sum or average `input` [ranks * n] over the ranks, and put this rank's part into `output` [n]. All ranks must call.

        Chunk by chunk, each rank writes the parts for the others into its region of shared memory, waits for all, and sums up
        what the others wrote for it. One wait a chunk is enough, since a region has two slots that chunks take in turn.
        """
        parts = input.view(self.size, -1)
        reduced = output.view(-1)
        for start, slots in self._chunks(reduced, reduced.numel(), slot_multiple=self.size):
            stop = start + slots[0].numel() // self.size
            own_slot = slots[self.rank].view(self.size, -1)
            for peer in self._peers():
                own_slot[peer].copy_(parts[peer, start:stop])
            self._wait_at_barrier()
            peer_parts = [slots[peer].view(self.size, -1)[self.rank] for peer in self._peers()]
            self._add_up(parts[self.rank, start:stop], peer_parts, reduced[start:stop], average)

    @counted_collective(ALL_REDUCE, 0)
    def all_reduce(self, tensor: Tensor, *, average: bool) -> None:
        """Sum or average `tensor` over the ranks, in place; the same on every rank, bit for bit. All ranks must call.

        Each rank has a region of shared memory with two slots, in which it hands chunks over in turn, so that no rank writes into
        what others still read.
        """
        flat = tensor.view(-1)
        for start, slots in self._chunks(flat, flat.numel()):
            chunk = flat[start : start + slots[0].numel()]
            bounds = [chunk.numel() * rank // self.size for rank in range(self.size + 1)]
            shares = [slice(low, high) for low, high in pairwise(bounds)]  # of the chunk, one for each rank
            own_share = shares[self.rank]
            own_slot = slots[self.rank]
            # Reduce-scatter: each rank sums up its own share of the chunk.
            for peer in self._peers():
                own_slot[shares[peer]].copy_(chunk[shares[peer]])
            self._wait_at_barrier()
            peer_shares = [slots[peer][own_share] for peer in self._peers()]
            self._add_up(chunk[own_share], peer_shares, chunk[own_share], average)
            # All-gather: each rank publishes its share, and reads those of the others.
            own_slot[own_share].copy_(chunk[own_share])
            self._wait_at_barrier()
            for peer in self._peers():
                chunk[shares[peer]].copy_(slots[peer][shares[peer]])

    def _peers(self) -> list[int]:
        """All ranks of the group but this one."""
        return [rank for rank in range(self.size) if rank != self.rank]

    def _chunks(self, like: Tensor, num_elements: int, slot_multiple: int = 1) -> Iterator[tuple[int, list[Tensor]]]:
        """Divide the elements of a collective into chunks that fit into the slots of shared memory through which ranks exchange.

        Yields for each chunk (index of its first element, a list with the slot of each rank). A slot is a 1-d view with the data
        type of `like` and room for `slot_multiple` times the elements of the chunk. Each rank has two, which chunks take in turn.
        """
        chunk_numel = _SLOT_BYTES // like.element_size() // slot_multiple
        for start in range(0, num_elements, chunk_numel):
            self._current_slot = 1 - self._current_slot
            slot_numel = min(chunk_numel, num_elements - start) * slot_multiple
            yield start, [region[self._current_slot].view(like.dtype)[:slot_numel] for region in self._regions]

    def _add_up(self, own_part: Tensor, peer_parts: list[Tensor], out: Tensor, average: bool) -> None:
        """Put the sum or mean of all parts into `out`, which may be `own_part`."""
        torch.add(own_part, peer_parts[0], out=out)
        for peer_part in peer_parts[1:]:
            out.add_(peer_part)
        if average:
            out.div_(self.size)

    def _wait_at_barrier(self) -> None:
        """Announce that this rank's data is written, and wait until that of every rank is: all have called this equally often.

        Each rank counts its calls in shared memory, where the others look. On a processor that may show the counter before the
        data that it announces, the process group's barrier is taken instead.
        """
        if not _CPU_KEEPS_STORE_ORDER:
            dist.barrier(self.group)
            return
        self._num_barriers += 1
        self._barrier_counters[self.rank][0] = self._num_barriers
        for peer in self._peers():
            if self._barrier_counters[peer][0] < self._num_barriers:
                self._wait_for_peer(peer)

    def _wait_for_peer(self, peer: int) -> None:
        """Wait until the rank `peer` of the group has reached as many barriers as this one, which its counter tells.

        Looks without sleeping for a few milliseconds, then every 0.1 ms. Raises RuntimeError if the peer has ended, or does not
        come within the run's timeout.
        """
        counter = self._barrier_counters[peer]
        began_at = time.monotonic()
        last_check_s = 0.0
        while counter[0] < self._num_barriers:
            waited_s = time.monotonic() - began_at
            if waited_s < _SPIN_S:
                os.sched_yield()
                continue
            time.sleep(1e-4)
            if waited_s - last_check_s <= 0.1:
                continue
            # Ten times a second: is the peer still alive?
            last_check_s = waited_s
            wait_text = (
                f"rank {self._global_ranks[self.rank]} waited {waited_s:.0f} s for its peer {self._global_ranks[peer]}"
            )
            if _has_ended(self._process_ids[peer]):
                raise RuntimeError(f"{wait_text}, which has ended")
            if waited_s > self._timeout_s:
                raise RuntimeError(f"timed out: {wait_text} (run.timeout_s={self._timeout_s:.0f})")


_CPU_KEEPS_STORE_ORDER = platform.machine().lower() in ("x86_64", "amd64")
"""Whether other cores see stores in the order in which they were made. Then a counter never overtakes the data it announces."""


def _has_ended(process_id: int) -> bool:
    """Whether a process of this host has ended, also if its parent has not yet read its exit status."""
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text(encoding="utf-8")
        # The state follows the name of the program, which stands in brackets and may hold anything.
        state = stat.rpartition(")")[2].split()[0]
        return state in "ZX"  # a zombie, or dead
    except (FileNotFoundError, ProcessLookupError):
        return True


class _RegionAddress(NamedTuple):
    """Where the memory file of a rank is; sent to the other ranks of its group."""

    namespace: str | None
    """The kernel and namespace in which `process_id` is valid; None if the system does not say."""
    process_id: int
    descriptor: int
    """The file descriptor in that process."""


def open_host_memory(runtime: Runtime, group: dist.ProcessGroup | None = None) -> HostMemory | None:
    """Let the CPU ranks of a group on one host exchange through shared memory, which is faster than gloo's sockets.

    `group`: None for all ranks. Returns None if the process group is to be used instead:

    - for a single rank, on a GPU, and in a simulation;
    - if `run.shared_memory` forbids it;
    - if some rank cannot map the regions of all others: ranks on several hosts, or in several containers.

    All ranks of the group must call, and get shared memory or None alike.
    """
    group_size = dist.get_world_size(group)
    if group_size == 1 or runtime.kind != "cpu" or runtime.simulated or not runtime.shared_memory:
        return None
    descriptor = _create_region()
    try:
        # Tell each other where the regions are.
        own_address = None
        if descriptor is not None:
            own_address = _RegionAddress(_process_namespace(), os.getpid(), descriptor)
        address_by_rank: list[_RegionAddress | None] = [None] * group_size
        dist.all_gather_object(address_by_rank, own_address, group=group)
        # Map them, and use them only if every rank could.
        regions = _map_regions(address_by_rank)
        mapped_by_rank = [False] * group_size
        dist.all_gather_object(mapped_by_rank, regions is not None, group=group)
        if regions is None or not all(mapped_by_rank):
            return None
        process_ids = [address.process_id for address in address_by_rank if address]
        return HostMemory(group, regions, process_ids, runtime.timeout_s)
    finally:
        if descriptor is not None:
            os.close(descriptor)  # mappings stay


def _create_region() -> int | None:
    """Make this rank's region of shared memory: the descriptor of an anonymous memory file; None if the system cannot make one.

    It has a header and two slots. No name on disk is left behind, however the run ends.
    """
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
    """An identifier of the running kernel and its namespace of process ids; ranks with the same one see the same ids."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return boot_id + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return None


def _map_regions(address_by_rank: list[_RegionAddress | None]) -> list[Tensor] | None:
    """Map the regions of shared memory of all ranks into this process; returns them as uint8 tensors, in rank order.

    `address_by_rank`: the memory file of each rank, which is reached through its process's entry in /proc. None if a rank has no
    region, is on another host or in another container, or has one that cannot be mapped here.
    """
    own_namespace = _process_namespace()
    if own_namespace is None:
        return None
    paths = []
    for address in address_by_rank:
        if address is None or address.namespace != own_namespace:
            return None
        paths.append(f"/proc/{address.process_id}/fd/{address.descriptor}")
    try:
        return [
            torch.from_file(path, shared=True, size=_HEADER_BYTES + 2 * _SLOT_BYTES, dtype=torch.uint8)
            for path in paths
        ]
    except (OSError, RuntimeError):  # another user's process, or a system that hides them
        return None
