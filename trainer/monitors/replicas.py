"""Checks that ranks with the same parameters still agree: it finds a flipped bit, or a host that computes otherwise.

It compares a sum over each local tensor's bytes, taken as whole numbers modulo 2**64: any single flipped bit changes
it. As long as all agree, only one number per rank is exchanged.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from strategies.base import Engine
from strategies.errors import ReplicasDiffer
from strategies.expert_share import expert_share_of_parameter
from strategies.parameters import named_parameters
from strategies.runtime import Runtime, gather_objects

INTEGER_TYPE_BY_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Types as whose numbers bytes are summed, by their size in bytes."""
ShardPosition = tuple[int, ...]
"""Which part of a sharded parameter a rank holds: its position along each mesh dimension that shards it; () for the whole.

Ranks with an equal position should hold equal values."""
CHECKSUM_MODULUS = 2**64
MAX_NAMED_PARAMETERS = 3
"""Parameters that are named in an error."""


class ReplicaCheck:
    """Compares parameters that several ranks hold a copy of, every so many steps and before each checkpoint."""

    def __init__(self, every_steps: int, runtime: Runtime) -> None:
        """`every_steps` of 0 never compares."""
        self.every_steps = every_steps
        self.runtime = runtime
        self._last_compared_step = 0
        """The step of the last comparison."""

    def start_at(self, step: int) -> None:
        """Count the interval to the next comparison from `step`."""
        self._last_compared_step = step

    def check_replicas(self, engine: Engine, step: int, *, now: bool = False) -> None:
        """Make sure that parameters which several ranks hold copies of are still equal; raises ReplicasDiffer, on all ranks.

        They are compared by checksums. It is done every `guards.replicas_every_steps` steps (0: never), or `now`, as before a
        checkpoint: copies that have come apart mean memory that flips bits, and no checkpoint should have them. A step that
        was compared already is not compared again. All ranks must call, after the same steps. Waits for the device. As long
        as all agree, each rank sends one number for each shard that it holds parts of: the sum of its checksums.
        """
        if not self._is_due(step, now=now):
            return
        last_equal_step = self._last_compared_step  # if the copies had differed there, the run would have ended
        self._last_compared_step = step
        checksum_by_name = self._shard_and_checksum_by_name(engine)
        if not checksum_by_name:  # on no rank: all ranks have the same kinds of parameters
            return
        # One sum for all parameters of a shard, so that little is sent while all agree.
        total_by_shard: dict[ShardPosition, int] = {}
        for index, (shard, parameter_checksum) in enumerate(checksum_by_name.values()):
            # Each has an odd factor of its own, so that two parameters that are off by as much do not cancel out.
            factor = 2 * index + 1
            total_by_shard[shard] = (total_by_shard.get(shard, 0) + factor * parameter_checksum) % CHECKSUM_MODULUS
        if _sums_differ(gather_objects(total_by_shard, self.runtime)):
            self._raise_difference(checksum_by_name, last_equal_step, step)

    def _is_due(self, step: int, *, now: bool) -> bool:
        """Whether to compare after this step: never for a single rank, and not twice for a step."""
        is_alone = self.runtime.world_size == 1 or self.runtime.simulated
        if is_alone or not self.every_steps or step == self._last_compared_step:
            return False
        return now or step - self._last_compared_step >= self.every_steps

    def _shard_and_checksum_by_name(self, engine: Engine) -> dict[str, tuple[ShardPosition, int]]:
        """The checksum of each parameter of this rank that other ranks may hold too: {name: (shard, checksum)}.

        `shard`: which part of the parameter it is; () for the whole. Waits for the device once.
        """
        parameters = list(replicated_parameters(engine))
        if not parameters:
            return {}
        device = self.runtime.device
        checksums = torch.stack([tensor_checksum(parameter.tensor).to(device) for parameter in parameters]).tolist()
        checksum_by_name = {}
        for parameter, parameter_checksum in zip(parameters, checksums, strict=True):
            checksum_by_name[parameter.name] = (parameter.shard, parameter_checksum)
        return checksum_by_name

    def _raise_difference(
        self, checksum_by_name: dict[str, tuple[ShardPosition, int]], last_equal_step: int, step: int
    ) -> None:
        """Find out which parameters and ranks differ, after a first comparison has failed, and raise ReplicasDiffer with them.

        All ranks must call, since each sends all of its checksums. `checksum_by_name`: this rank's (shard, checksum) of each
        parameter; ranks with an equal shard should have equal checksums. `last_equal_step`: of the last comparison, in which
        all agreed.
        """
        host_and_checksums_by_rank = gather_objects((socket.gethostname(), checksum_by_name), self.runtime)
        host_by_rank = [host for host, _ in host_and_checksums_by_rank]
        deviating_ranks: set[int] = set()
        differing_parameters: list[str] = []
        for name in checksum_by_name:
            checksum_of_each_rank = [checksums[name] for _, checksums in host_and_checksums_by_rank]
            ranks_of_parameter = _deviating_ranks(checksum_of_each_rank)
            if ranks_of_parameter:
                deviating_ranks |= ranks_of_parameter
                differing_parameters.append(name)
        ranks_and_hosts = [f"rank {rank} on {host_by_rank[rank]}" for rank in sorted(deviating_ranks)]
        raise ReplicasDiffer(_difference_message(ranks_and_hosts, differing_parameters, last_equal_step, step))


def _difference_message(
    ranks_and_hosts: list[str], differing_parameters: list[str], last_equal_step: int, step: int
) -> str:
    """Write the error about ranks, such as "rank 3 on gpu07", that hold other copies of some parameters than most ranks.

    `last_equal_step`: at which all copies were equal.
    """
    parameter_names = ", ".join(differing_parameters[:MAX_NAMED_PARAMETERS])
    if len(differing_parameters) > MAX_NAMED_PARAMETERS:
        parameter_names += f" and {len(differing_parameters) - MAX_NAMED_PARAMETERS} more"
    verb = "holds" if len(ranks_and_hosts) == 1 else "hold"
    return (
        f"step {step}: {' and '.join(ranks_and_hosts)} {verb} other values of {parameter_names} than ranks that should hold the "
        f"same, and did after step {last_equal_step}: memory that flips bits, or hosts whose processors compute differently. No "
        "checkpoint was written since; the same command continues from the last one. Leave such a host out, or where hosts "
        "differ on purpose set guards.replicas_every_steps=0"
    )


def _deviating_ranks(checksum_of_each_rank: list[tuple[ShardPosition, int]]) -> set[int]:
    """Decide by majority which ranks hold a wrong copy of one parameter; all ranks of a shard if there is no majority.

    `checksum_of_each_rank`: (shard, checksum) of one parameter, by rank. A shard is a rank's position in the device mesh, as
    far as the parameter is split over it: ranks at the same position hold copies of the same part. Of [((0,), 7), ((0,), 7),
    ((0,), 9)] rank 2 deviates.
    """
    checksums_by_shard: dict[ShardPosition, dict[int, int]] = {}  # of each rank with that shard
    for rank, (shard, rank_checksum) in enumerate(checksum_of_each_rank):
        checksums_by_shard.setdefault(shard, {})[rank] = rank_checksum
    deviating_ranks: set[int] = set()
    for checksum_by_rank in checksums_by_shard.values():
        most_common_checksum, num_agreeing = Counter(checksum_by_rank.values()).most_common(1)[0]
        has_majority = 2 * num_agreeing > len(checksum_by_rank)
        all_agree = num_agreeing == len(checksum_by_rank)
        if all_agree:
            continue
        for rank, rank_checksum in checksum_by_rank.items():
            if rank_checksum != most_common_checksum or not has_majority:
                deviating_ranks.add(rank)
    return deviating_ranks


class ReplicatedParameter(NamedTuple):
    """A parameter, or a part of one, that ranks with the same `shard` hold copies of."""

    name: str
    tensor: Tensor
    """What this rank holds."""
    shard: ShardPosition


def replicated_parameters(engine: Engine) -> Iterator[ReplicatedParameter]:
    """Pick out the parameters of this rank that can be compared with other ranks: those of which others may hold a copy, too.

    - Partitioned over all ranks, by ZeRO-3 or by a DTensor that is sharded over all dimensions of its mesh: left out.
    - No DTensor: a whole copy.
    - A DTensor that is replicated over a dimension of its mesh: this rank's part. Under expert parallelism, ranks of one expert
      group hold other experts, so the rank's index in the group is part of `shard`. Experts are DTensors in all strategies that
      allow it.
    """
    for name, parameter in named_parameters(engine.step_module, include_frozen_models=True):
        if hasattr(parameter, "ds_id"):  # ZeRO-3: each rank has a part of its own
            continue
        tensor = parameter.detach()
        if not isinstance(tensor, DTensor):
            yield ReplicatedParameter(name, tensor, shard=())
            continue
        coordinate: Any = tensor.device_mesh.get_coordinate()
        shard_positions = []  # along each mesh dimension that shards the tensor
        for position, placement in zip(coordinate, tensor.placements, strict=True):
            if not isinstance(placement, Replicate):
                shard_positions.append(position)
        has_no_copies = len(shard_positions) == len(tensor.placements)  # sharded over all dimensions of the mesh
        if has_no_copies:
            continue
        expert_share = expert_share_of_parameter(engine.step_module, name)  # None for all but experts
        if expert_share is not None:  # under expert parallelism each rank of an expert group has other experts
            shard_positions.append(expert_share.group_rank)
        yield ReplicatedParameter(name, tensor.to_local(), tuple(shard_positions))


def tensor_checksum(tensor: Tensor) -> Tensor:
    """Sum a tensor's bytes as integers, to compare copies on several ranks by one number: 0-d int64, on its device.

    Any single flipped bit changes the sum. It wraps at 2**64, so its sign means nothing. The bytes are read as integers of
    eight bytes, which is fastest, if start and size are multiples of eight bytes; otherwise as integers of an element's size.
    """
    elements = tensor.contiguous().view(-1)
    element_bytes = elements.element_size()
    size_is_aligned = (elements.numel() * element_bytes) % 8 == 0
    start_is_aligned = (elements.storage_offset() * element_bytes) % 8 == 0
    integer_type = torch.int64 if size_is_aligned and start_is_aligned else INTEGER_TYPE_BY_BYTES[element_bytes]
    return elements.view(integer_type).sum(dtype=torch.int64)


def _sums_differ(sums_by_rank: list[dict[ShardPosition, int]]) -> bool:
    """Whether two ranks have different sums for the same shard. `sums_by_rank`: by rank, the sum of each shard that it holds."""
    first_sums: dict[ShardPosition, int] = {}
    for rank_sums in sums_by_rank:
        for shard, shard_sum in rank_sums.items():
            if first_sums.setdefault(shard, shard_sum) != shard_sum:
                return True
    return False
