"""Checks that ranks with the same parameters still agree: it finds a flipped bit, or a host that computes otherwise.

It compares a sum over each local tensor's bytes, taken as whole numbers modulo 2**64: any single flipped bit changes
it. As long as all agree, only one number per rank is exchanged.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from strategies.base import Engine
from strategies.errors import ReplicasDiffer
from strategies.parameters import named_parameters
from strategies.runtime import Runtime, gather_objects

INTEGER_TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Place = tuple[int, ...]
MODULUS = 2**64
MAX_NAMED = 3
"""Parameters that are named in an error."""


class ReplicaCheck:
    """Compares what is held more than once, every so many steps and before each checkpoint."""

    def __init__(self, every_steps: int, runtime: Runtime) -> None:
        """`every_steps` of 0 never compares."""
        self.every_steps = every_steps
        self.runtime = runtime
        self._compared = 0

    def start_at(self, step: int) -> None:
        """Count the interval to the next comparison from `step`."""
        self._compared = step

    def compare(self, engine: Engine, step: int, *, now: bool = False) -> None:
        """Compare where that is due, or `now`. Waits for the device. All ranks must call; raises ReplicasDiffer on all."""
        alone = self.runtime.world_size == 1 or self.runtime.simulated
        if alone or not self.every_steps or step == self._compared:
            return
        if not now and step - self._compared < self.every_steps:
            return
        last_alike = self._compared
        self._compared = step
        parameters = list(replicated_parameters(engine))
        if not parameters:  # on no rank: all ranks have the same kinds of parameters
            return
        checksums = torch.stack([checksum(tensor).to(self.runtime.device) for _, tensor, _ in parameters]).tolist()
        totals: dict[Place, int] = {}
        sums: dict[str, tuple[Place, int]] = {}
        for index, ((name, _, place), value) in enumerate(zip(parameters, checksums, strict=True)):
            # By an odd factor of its own, so that two parameters that are off by as much do not cancel out.
            totals[place] = (totals.get(place, 0) + (2 * index + 1) * value) % MODULUS
            sums[name] = (place, value)
        if _sums_differ(gather_objects(totals, self.runtime)):
            self._raise(sums, last_alike, step)

    def _raise(self, sums: dict[str, tuple[Place, int]], last_alike: int, step: int) -> None:
        """Name the parameters, and the ranks that are not like most. All ranks call it.

        `sums`: this rank's (place, checksum) of each parameter. `last_alike`: the step of the last comparison.
        """
        gathered = gather_objects((socket.gethostname(), sums), self.runtime)
        hosts = [host for host, _ in gathered]
        odd_ranks: set[int] = set()
        odd_parameters: list[str] = []
        for name in sums:
            ranks = _odd_ranks([sums_of_rank[name] for _, sums_of_rank in gathered])
            if ranks:
                odd_ranks |= ranks
                odd_parameters.append(name)
        named = ", ".join(odd_parameters[:MAX_NAMED])
        if len(odd_parameters) > MAX_NAMED:
            named += f" and {len(odd_parameters) - MAX_NAMED} more"
        who = " and ".join(f"rank {rank} on {hosts[rank]}" for rank in sorted(odd_ranks))
        holds = f"{who} holds" if len(odd_ranks) == 1 else f"{who} hold"
        raise ReplicasDiffer(
            f"step {step}: {holds} other values of {named} than ranks that should hold the same, and did after step "
            f"{last_alike}: memory that flips bits, or hosts whose processors compute differently. No checkpoint was written "
            "since; the same command continues from the last one. Leave such a host out, or where hosts differ on purpose set "
            "guards.replicas_every_steps=0"
        )


def _odd_ranks(sums: list[tuple[Place, int]]) -> set[int]:
    """Ranks whose checksum is not that of most ranks at the same place; all of a place if there is no majority.

    `sums`: (place, checksum) of one parameter on each rank.
    """
    sum_by_rank: dict[Place, dict[int, int]] = {}
    for rank, (place, value) in enumerate(sums):
        sum_by_rank.setdefault(place, {})[rank] = value
    odd: set[int] = set()
    for values in sum_by_rank.values():
        common, count = Counter(values.values()).most_common(1)[0]
        has_majority = 2 * count > len(values)
        if count < len(values):
            odd |= {rank for rank, value in values.items() if value != common or not has_majority}
    return odd


def replicated_parameters(engine: Engine) -> Iterator[tuple[str, Tensor, Place]]:
    """(name, local tensor, place) of each parameter that other ranks may hold, too: those with the same place hold the same.

    Nothing of parameters that are partitioned over all ranks (ZeRO-3).
    """
    for name, parameter in named_parameters(engine.step_module, teacher=True):
        if hasattr(parameter, "ds_id"):  # ZeRO-3: each rank has a part of its own
            continue
        tensor = parameter.detach()
        if not isinstance(tensor, DTensor):
            yield name, tensor, ()
            continue
        coordinate: Any = tensor.device_mesh.get_coordinate()
        shards = []
        for position, placement in zip(coordinate, tensor.placements, strict=True):
            if not isinstance(placement, Replicate):
                shards.append(position)
        if len(shards) < len(tensor.placements):  # else no other rank has this shard
            yield name, tensor.to_local(), tuple(shards)


def checksum(tensor: Tensor) -> Tensor:
    """The tensor's bytes summed as whole numbers, of eight bytes where they come out even: 0-d int64, where it is."""
    flat = tensor.contiguous().view(-1)
    size = flat.element_size()
    even = (flat.numel() * size) % 8 == 0 and (flat.storage_offset() * size) % 8 == 0
    return flat.view(torch.int64 if even else INTEGER_TYPES[size]).sum(dtype=torch.int64)


def _sums_differ(sums_by_rank: list[dict[Place, int]]) -> bool:
    """Whether two ranks have different sums for the same place."""
    first: dict[Place, int] = {}
    for sums in sums_by_rank:
        for place, value in sums.items():
            if first.setdefault(place, value) != value:
                return True
    return False
