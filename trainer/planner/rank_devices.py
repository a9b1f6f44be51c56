"""The two sizes of a job for which a step is simulated: how many ranks it has, and which device each of them has."""

from __future__ import annotations

from dataclasses import dataclass

from strategies.runtime import Runtime


@dataclass(frozen=True, slots=True)
class RankCounts:
    """How many ranks a job has, and how many of them run on each host."""

    world_size: int
    """All ranks of the job."""
    ranks_per_host: int

    @classmethod
    def of_job(cls, runtime: Runtime) -> RankCounts:
        """The counts of the job that this rank belongs to."""
        return cls(world_size=runtime.world_size, ranks_per_host=runtime.local_world_size)


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The kind of the ranks' devices, and the memory that each of them has."""

    kind: str
    """`cuda` or `cpu`."""
    available_gib: float
    """Memory of the smallest device in GiB."""
