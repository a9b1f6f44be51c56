"""Makes the device mesh from the number of replicas, with errors that name the possible numbers."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from strategies.base import Fsdp2Config, StrategyConfig, StrategyName
from strategies.errors import ConfigError
from strategies.runtime import Runtime
from strategies.simulation import real_tensors

REPLICA_PER_HOST = 0
"""Value of `strategy.replicate` that asks for one replica a host, or 2 on a single host."""


def resolve_replica_count(requested: int, world_size: int, num_hosts: int) -> int:
    """Turn the setting `strategy.replicate` into a number of replicas, each sharded over its part of the `world_size` ranks.

    `requested`: the setting; `REPLICA_PER_HOST` (0) is one for each of `num_hosts` hosts, or 2 on a single host. Raises
    ConfigError, with the possible numbers, if it does not divide the number of ranks.
    """
    num_replicas = requested
    if requested == REPLICA_PER_HOST:
        num_replicas = num_hosts if num_hosts > 1 else 2
    if num_replicas < 1 or world_size % num_replicas:
        legal = [divisor for divisor in range(1, world_size + 1) if world_size % divisor == 0]
        raise ConfigError(
            f"strategy.replicate={num_replicas}: must divide the world size {world_size}; legal values: "
            f"{', '.join(map(str, legal))}"
        )
    return num_replicas


def replica_count(config: StrategyConfig, world_size: int, num_hosts: int) -> int:
    """The number of replicas of the model among the ranks: 1, unless `strategy=hsdp` or `strategy.replicate` asks for more.

    Each is sharded over its own ranks. Raises ConfigError if the number does not divide `world_size`.
    """
    if not isinstance(config, Fsdp2Config):
        return 1
    if config.replicate != 1:
        return resolve_replica_count(config.replicate, world_size, num_hosts)
    if config.name is StrategyName.hsdp:  # 1 is the default, which hsdp shares with fsdp2: it was not chosen
        return resolve_replica_count(REPLICA_PER_HOST, world_size, num_hosts)
    return 1


def shard_mesh(device: torch.device, runtime: Runtime, num_replicas: int) -> DeviceMesh:
    """Make the device mesh over which FSDP2 shards: dimensions `replicate` and `shard`, or only `shard` for one replica.

    The ranks of a row of the mesh hold one replica of the model together; those of a column hold the same shard. 8 ranks in two
    replicas: rows 0 to 3 and 4 to 7. All ranks must call.
    """
    # We make the groups of a mesh ourselves: they get the run's timeout instead of torch's own, and a rank makes only its own
    # two, where torch would make all groups on every rank.
    # Values of the mesh's tensor are read, and a simulation, in which tensors have no values, may be active.
    with real_tensors():
        if num_replicas == 1:
            assert dist.group.WORLD is not None
            return DeviceMesh.from_group(dist.group.WORLD, device.type, mesh_dim_names=("shard",))
        ranks = torch.arange(runtime.world_size).view(num_replicas, -1)
        row, column = divmod(runtime.rank, ranks.shape[1])
        replicate_group = _new_process_group(ranks[:, column].tolist(), device, runtime)
        shard_group = _new_process_group(ranks[row].tolist(), device, runtime)
        groups = [replicate_group, shard_group]  # in the order of the dimensions' names
        return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=("replicate", "shard"))


def expert_mesh(
    device: torch.device, runtime: Runtime, num_replicas: int, expert_ranks: int
) -> tuple[dist.ProcessGroup, DeviceMesh]:
    """Make the process groups of expert parallelism (`parallel.experts`) that this rank belongs to. All ranks must call.

    `expert_ranks` neighbouring ranks of a replica form an expert group, which together holds all experts of a layer. The index of
    a rank within its group determines which experts are its own. Ranks with the same index in other groups hold the
    same experts; those of one replica shard them.

    Returns (this rank's expert group, the mesh of the ranks with the same experts, whose dimensions are those of `shard_mesh`).
    """
    with real_tensors():  # as in `shard_mesh`
        # Axes: replica, expert group within the replica, index within the group.
        ranks = torch.arange(runtime.world_size).view(num_replicas, -1, expert_ranks)
        own_position = torch.unravel_index(torch.tensor(runtime.rank), ranks.shape)
        replica, group, group_rank = (int(index) for index in own_position)
        expert_group = _new_process_group(ranks[replica, group].tolist(), device, runtime)
        shard_group = _new_process_group(ranks[replica, :, group_rank].tolist(), device, runtime)
        if num_replicas == 1:
            return expert_group, DeviceMesh.from_group(shard_group, device.type, mesh_dim_names=("shard",))
        replicate_group = _new_process_group(ranks[:, group, group_rank].tolist(), device, runtime)
        mesh = DeviceMesh.from_group(
            [replicate_group, shard_group],
            device.type,
            ranks[:, :, group_rank],
            mesh_dim_names=("replicate", "shard"),
        )
        return expert_group, mesh


def _new_process_group(member_ranks: list[int], device: torch.device, runtime: Runtime) -> dist.ProcessGroup:
    """Form a process group of `member_ranks`, of which this rank is one, with the run's timeout. Only its members must call."""
    group = dist.new_group(
        member_ranks,
        timeout=timedelta(seconds=runtime.timeout_s),
        backend="nccl" if device.type == "cuda" else None,  # without a second, unused one for CPUs
        use_local_synchronization=True,
    )
    assert isinstance(group, dist.ProcessGroup)
    return group
