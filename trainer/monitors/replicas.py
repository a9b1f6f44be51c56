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

AS_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Place = tuple[int, ...]
_MOST = 2**64
_NAMED = 3
"""Parameters that are named in an error."""


class ReplicaCheck:
    """Compares what is held more than once, every so many steps and before each checkpoint."""

    def __init__(self, every_steps: int, runtime: Runtime) -> None:
        """`every_steps` of 0 never compares."""
        self.every_steps, self.runtime = every_steps, runtime
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
        begin, self._compared = self._compared, step
        held = list(held_alike(engine))
        if not held:  # on no rank: all hold alike
            return
        found = torch.stack([checksum(tensor).to(self.runtime.device) for _, tensor, _ in held]).tolist()
        totals: dict[Place, int] = {}
        for index, ((_, _, place), value) in enumerate(zip(held, found, strict=True)):
            # By an odd factor of its own, so that two parameters that are off by as much do not cancel out.
            totals[place] = (totals.get(place, 0) + (2 * index + 1) * value) % _MOST
        if _differ(gather_objects(totals, self.runtime)):
            self._raise(
                {name: (place, value) for (name, _, place), value in zip(held, found, strict=True)}, begin, step
            )

    def _raise(self, found: dict[str, tuple[Place, int]], begin: int, step: int) -> None:
        """Name the parameters, and the ranks that are not like most. All ranks call it."""
        told = gather_objects((socket.gethostname(), found), self.runtime)
        odd: set[int] = set()
        off: list[str] = []
        for name in found:
            of_place: dict[Place, dict[int, int]] = {}
            for rank, (_, theirs) in enumerate(told):
                of_place.setdefault(theirs[name][0], {})[rank] = theirs[name][1]
            for values in of_place.values():
                common, count = Counter(values.values()).most_common(1)[0]
                if count < len(values):
                    odd |= {rank for rank, value in values.items() if value != common or 2 * count <= len(values)}
                    off += [] if name in off else [name]
        named = ", ".join(off[:_NAMED]) + (f" and {len(off) - _NAMED} more" if len(off) > _NAMED else "")
        who = " and ".join(f"rank {rank} on {told[rank][0]}" for rank in sorted(odd))
        holds = f"{who} holds" if len(odd) == 1 else f"{who} hold"
        raise ReplicasDiffer(
            f"step {step}: {holds} other values of {named} than ranks that should hold the same, and did after step {begin}: "
            "memory that flips bits, or hosts whose processors compute differently. No checkpoint was written since; the same "
            "command continues from the last one. Leave such a host out, or where hosts differ on purpose set "
            "guards.replicas_every_steps=0"
        )


def held_alike(engine: Engine) -> Iterator[tuple[str, Tensor, Place]]:
    """(name, local tensor, place) of each parameter that other ranks may hold, too: those with the same place hold the same.

    Nothing of parameters that are partitioned over all ranks (ZeRO-3).
    """
    for name, parameter in named_parameters(engine.step_module, teacher=True):
        if hasattr(parameter, "ds_id"):
            continue
        value = parameter.detach()
        if not isinstance(value, DTensor):
            yield name, value, ()
            continue
        mesh, placements = value.device_mesh, value.placements
        coordinate: Any = mesh.get_coordinate()
        shards = [at for at, each in zip(coordinate, placements, strict=True) if not isinstance(each, Replicate)]
        if len(shards) < len(placements):
            yield name, value.to_local(), tuple(shards)


def checksum(tensor: Tensor) -> Tensor:
    """The tensor's bytes summed as whole numbers, of eight bytes where they come out even: 0-d int64, where it is."""
    flat = tensor.contiguous().view(-1)
    size = flat.element_size()
    even = (flat.numel() * size) % 8 == 0 and (flat.storage_offset() * size) % 8 == 0
    return flat.view(torch.int64 if even else AS_NUMBERS[size]).sum(dtype=torch.int64)


def _differ(told: list[dict[Place, int]]) -> bool:
    first: dict[Place, int] = {}
    return any(first.setdefault(place, total) != total for totals in told for place, total in totals.items())
