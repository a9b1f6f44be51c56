"""Expert parallelism: which rank holds which experts of a mixture, and how these are sharded and reduced.

`parallel.experts=e` makes expert groups of `e` neighbouring ranks (`strategies.mesh.expert_mesh`). The rank with index p in
its group holds experts `p * E / e` to `(p + 1) * E / e` of each layer as parameters of its own, `[E / e, ...]`. The ranks with
one index shard these along their first dimension. Tokens are sent to the ranks of their experts
(`trainer/model/expert_exchange.py`). Parameters keep their names, and files hold them in full: no file depends on
`parallel.experts`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from strategies.base import plan_of
from strategies.compat.modules import own_parameters
from strategies.expert_counts import ASSUMED_IMBALANCE, AssumedRowCounts, row_count_source
from strategies.expert_share import ExpertShare
from strategies.mesh import expert_mesh
from strategies.runtime import Runtime


def distribute_experts(
    modules: list[nn.Module], device: torch.device, runtime: Runtime, *, num_replicas: int, expert_ranks: int
) -> DeviceMesh:
    """Set up expert parallelism: let this rank keep only its share of each layer's experts, to which other ranks send tokens.

    `modules`: each holds the experts of one layer, on meta. `expert_ranks`: neighbouring ranks over which a layer's experts are
    distributed. `num_replicas`: replicas of the model (hsdp). Each module gets its share as the attribute `expert_share`; its
    `num_experts` stays that of the layer, which routers and counts need.

    Returns the mesh of the ranks that hold the same experts, over which the shares are then sharded. All ranks must call.
    """
    group, mesh = expert_mesh(device, runtime, num_replicas, expert_ranks)
    assumed_imbalance = runtime.expert_imbalance if runtime.simulated else None
    share = ExpertShare(
        group_size=expert_ranks,
        group_rank=runtime.rank % expert_ranks,
        group=group,
        # How many tokens ranks send each other: exchanged by the ranks, or assumed in a simulation.
        row_count_source=row_count_source(group, expert_ranks, imbalance=assumed_imbalance),
    )
    for module in modules:
        _keep_own_experts(module, share)
    return mesh


def keep_one_rank_of_experts_on_meta(step_module: nn.Module) -> None:
    """Let a model on meta keep the experts of one rank, so that the memory of its step can be counted. Nothing is exchanged.

    Does nothing without expert parallelism. The module's plan names the modules and the number of ranks. The rank is assumed to
    receive `ASSUMED_IMBALANCE` times the mean number of tokens.
    """
    plan = plan_of(step_module)
    if plan.expert_ranks == 1:
        return
    assumed_row_counts = AssumedRowCounts(plan.expert_ranks, ASSUMED_IMBALANCE)  # how many tokens arrive
    share = ExpertShare(group_size=plan.expert_ranks, group_rank=0, group=None, row_count_source=assumed_row_counts)
    for name in plan.expert_parallel_modules:
        _keep_own_experts(step_module.get_submodule(name), share)


def _keep_own_experts(module: nn.Module, share: ExpertShare) -> None:
    """Cut the parameters of a module of experts, `[experts, ...]`, to as many experts as one rank of the group holds.

    `share`: which part that is; it becomes the module's `expert_share`. The parameters are on meta, so that the first experts
    stand for this rank's own, whose values are read later.
    """
    # The module's own dict: what is set in it is in the module.
    parameters = own_parameters(module)
    for name, parameter in parameters.items():
        if parameter is None:
            continue
        assert len(parameter) % share.group_size == 0, "the config layer reports what does not divide"
        own_part = parameter.data[: len(parameter) // share.group_size].clone()
        parameters[name] = nn.Parameter(own_part, requires_grad=parameter.requires_grad)
    module.expert_share = share  # type: ignore[assignment]


def shard_experts(module: nn.Module, world_size: int, *, mesh: DeviceMesh, **fully_shard_settings: Any) -> None:
    """Let FSDP2 shard a rank's experts of one layer (`module`) over the ranks that hold the same ones, those of `mesh`.

    `world_size`: all ranks of the run, by which summed gradients are divided. The tokens of an expert come from all of them,
    though only the ranks of the mesh hold it. `fully_shard_settings`: further arguments of torch's `fully_shard`. All ranks of
    the mesh must call.
    """
    sharded: Any = fully_shard(module, mesh=mesh, **fully_shard_settings)
    sharded.set_gradient_divide_factor(float(world_size))
    # With a divisor that is not the size of the mesh, torch would use a reduction that multiplies before it sums. gloo does not
    # have it, and NCCL returns zeros in bf16 (pytorch#190747). If nothing is sharded, a forced sum would be divided twice.
    if mesh["shard"].size() > 1:
        sharded.set_force_sum_reduction_for_comms(True)
