"""Degrees of parallelism to a device mesh, with errors that name the degrees."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from strategies.errors import ConfigError
from strategies.runtime import Runtime
from strategies.simulation import real_tensors


def replicate_degree(requested: int, runtime: Runtime) -> int:
    """The number of replicas: as requested, or (0) one per host, and 2 where there is only one host."""
    hosts = runtime.world_size // runtime.local_world_size
    degree = requested or (hosts if hosts > 1 else 2)
    if degree < 1 or runtime.world_size % degree:
        legal = [d for d in range(1, runtime.world_size + 1) if runtime.world_size % d == 0]
        raise ConfigError(
            f"strategy.replicate={degree}: must divide the world size {runtime.world_size}; legal values: "
            f"{', '.join(map(str, legal))}"
        )
    return degree


def shard_mesh(device: torch.device, runtime: Runtime, replicate: int) -> DeviceMesh:
    """A mesh of (`replicate`, `shard`), or of `shard` alone where there is one replica. All ranks must call."""
    shape: tuple[int, ...] = (runtime.world_size,)
    names: tuple[str, ...] = ("shard",)
    if replicate > 1:
        shape, names = (replicate, runtime.world_size // replicate), ("replicate", "shard")
    with real_tensors():
        return init_device_mesh(device.type, shape, mesh_dim_names=names)
