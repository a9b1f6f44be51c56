"""Experts of a mixture dealt over ranks, whole: who holds which, and how they are sharded and reduced.

`parallel.experts=e` makes expert groups of `e` neighbouring ranks (`strategies.mesh.expert_mesh`). The rank with place p holds
experts `p * E / e` to `(p + 1) * E / e` of each layer as parameters of its own, `[E / e, ...]`. The ranks with one place shard
these along their first dimension. Tokens are sent to the ranks of their experts (`trainer/model/expert_exchange.py`).
Parameters keep their names, and files hold them whole: no file knows how experts were dealt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from strategies.base import plan_of
from strategies.compat.modules import own_parameters
from strategies.expert_counts import ASSUMED_IMBALANCE, AssumedCounts, counts_within
from strategies.expert_share import ExpertShare
from strategies.mesh import expert_mesh
from strategies.runtime import Runtime


def deal_experts(
    modules: list[nn.Module], device: torch.device, runtime: Runtime, *, replicate: int, expert_ranks: int
) -> DeviceMesh:
    """Set up expert parallelism: each of `modules` keeps only this rank's share of its layer's experts. All ranks must call.

    `modules` hold the experts of one layer each, on meta. `expert_ranks`: neighbouring ranks among which a layer's experts
    are dealt. `replicate`: replicas of the model (hsdp). Returns the mesh of the ranks that hold the same experts, over which
    the shares are then sharded. A module knows its share as `expert_share`; its `num_experts` stays that of the layer, by
    which routers and counts go.
    """
    group, mesh = expert_mesh(device, runtime, replicate, expert_ranks)
    share = ExpertShare(
        expert_ranks,
        runtime.rank % expert_ranks,
        group,
        counts_within(group, expert_ranks, imbalance=runtime.expert_imbalance if runtime.simulated else None),
    )
    for module in modules:
        _keep_share(module, share)
    return mesh


def deal_on_meta(step_module: nn.Module) -> None:
    """Give a step module on meta the experts of one rank, to count the memory of a step by shapes: nothing is exchanged.

    Which modules, and among how many ranks, says the module's plan. The rank is assumed to receive `ASSUMED_IMBALANCE` times
    the mean number of tokens.
    """
    plan = plan_of(step_module)
    if plan.expert_ranks == 1:
        return
    share = ExpertShare(plan.expert_ranks, 0, None, AssumedCounts(plan.expert_ranks, ASSUMED_IMBALANCE))
    for name in plan.dealt_experts:
        _keep_share(step_module.get_submodule(name), share)


def _keep_share(module: nn.Module, share: ExpertShare) -> None:
    """Cut the parameters of a module of experts, `[experts, ...]`, to as many experts as one rank of the group holds."""
    parameters = own_parameters(module)
    for name, parameter in parameters.items():
        if parameter is None:
            continue
        assert len(parameter) % share.ranks == 0, "the config layer reports what does not divide"
        own_part = parameter.data[: len(parameter) // share.ranks].clone()
        parameters[name] = nn.Parameter(own_part, requires_grad=parameter.requires_grad)
    module.expert_share = share  # type: ignore[assignment]


def shard_experts(module: nn.Module, ranks: int, **settings: Any) -> None:
    """Shard a rank's experts over the ranks that hold the same ones: `settings` are those of `fully_shard`, with that `mesh`.

    `ranks`: all of the run. The gradient of an expert is the sum over the mesh divided by all ranks, as that of every other
    parameter: the tokens of an expert come from all ranks, though only those of the mesh hold it.
    """
    sharded: Any = fully_shard(module, **settings)
    sharded.set_gradient_divide_factor(float(ranks))
    # Another divisor than the size of the mesh would make torch ask for a product before the sum, which gloo does not have,
    # and which NCCL makes zeros of in bf16 (pytorch#190747). Where nothing is sharded, a forced sum would be divided twice.
    if settings["mesh"]["shard"].size() > 1:
        sharded.set_force_sum_reduction_for_comms(True)
