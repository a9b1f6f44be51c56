"""Degrees of parallelism to a device mesh, with errors that name the degrees."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from strategies.base import Fsdp2Config, StrategyConfig, StrategyName
from strategies.errors import ConfigError
from strategies.runtime import Runtime
from strategies.simulation import real_tensors


def replicate_degree(requested: int, world: int, hosts: int) -> int:
    """The number of replicas among `world` ranks on `hosts` hosts: as requested, or (0) one per host, and 2 on one host.

    Raises ConfigError where it does not divide the ranks.
    """
    degree = requested or (hosts if hosts > 1 else 2)
    if degree < 1 or world % degree:
        legal = [d for d in range(1, world + 1) if world % d == 0]
        raise ConfigError(
            f"strategy.replicate={degree}: must divide the world size {world}; legal values: "
            f"{', '.join(map(str, legal))}"
        )
    return degree


def replica_count(config: StrategyConfig, world: int, hosts: int) -> int:
    """The number of replicas of a strategy that shards with `fully_shard`; 1 for any other. Errors: as `replicate_degree`."""
    if not isinstance(config, Fsdp2Config) or (config.name is not StrategyName.hsdp and config.replicate == 1):
        return 1
    return replicate_degree(0 if config.replicate == 1 else config.replicate, world, hosts)


def shard_mesh(device: torch.device, runtime: Runtime, replicate: int) -> DeviceMesh:
    """A mesh of (`replicate`, `shard`), or of `shard` alone where there is one replica. All ranks must call.

    Its groups keep to the run's timeout; torch's own would take half an hour. Each rank makes its own two groups and meets
    their members alone, where torch makes all groups on every rank.
    """
    if replicate == 1:
        assert dist.group.WORLD is not None
        with real_tensors():
            return DeviceMesh.from_group(dist.group.WORLD, device.type, mesh_dim_names=("shard",))
    settings: dict[str, Any] = {
        "timeout": timedelta(seconds=runtime.timeout_s),
        "backend": "nccl" if device.type == "cuda" else None,  # without a second, unused one for CPUs
        "use_local_synchronization": True,
    }
    with real_tensors():
        ranks = torch.arange(runtime.world_size).view(replicate, -1)
        row, column = divmod(runtime.rank, ranks.shape[1])
        groups = [dist.new_group(members.tolist(), **settings) for members in (ranks[:, column], ranks[row])]
        return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=("replicate", "shard"))
