"""What FSDP2 keeps for itself (`torch.distributed.fsdp._fully_shard`).

Read in torch 2.13.0 and 2.15.0. `FSDPModule` shows neither its parameter groups nor its hooks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllocMixin
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

__all__ = ["AllGather", "DefaultAllocMixin", "ReduceScatter", "compute_local_shape_and_global_offset"]
"""`AllGather`, `ReduceScatter` and `DefaultAllocMixin`: what the public `set_custom_all_gather` and `set_custom_reduce_scatter`
take, which torch exports nowhere. `compute_local_shape_and_global_offset`: where a shard of a `DTensor` begins."""


def finish_sharding(root: nn.Module) -> None:
    """Let FSDP2 do now what it would do in the first forward pass: pad uneven shards, and pin those on the host. No collective.

    `FSDPState._lazy_init`, which has no public caller, replaces the sharded tensors; so code that keeps references to them, such
    as an optimizer, must come after it.
    """
    root._get_fsdp_state()._lazy_init()  # type: ignore[operator]


def _parameter_groups(root: nn.Module) -> Iterator[Any]:
    """The groups of parameters that FSDP2 gathers together, of `root` and all modules in it."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            yield from module._get_fsdp_state()._fsdp_param_groups  # type: ignore[operator,attr-defined]


def gather_on(root: nn.Module, device: torch.device) -> None:
    """Let FSDP2 gather parameters on `device`. By default it gathers on the CPU if the process group is not for GPUs."""
    for group in _parameter_groups(root):
        group.device = device
        for parameter in group.fsdp_params:
            parameter.device = device


def fsdp_internal_tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """List the tensors that FSDP2 keeps beside the parameters of the modules as (kind, tensor), to count memory by kind.

    `kind` is `parameters`, `gradients`, `gathered` or `communication`. `root`: the module that was sharded.
    """
    for group in _parameter_groups(root):
        for reduced in getattr(group.comm_ctx, "reduce_scatter_states", ()):  # none before the first pass
            yield "communication", reduced.reduce_scatter_input
        for parameter in group.fsdp_params:
            for gathered in parameter.all_gather_outputs:
                yield "gathered", gathered
            yield "parameters", parameter._sharded_param_data
            unsharded = getattr(parameter, "_unsharded_param", None)
            if unsharded is not None:
                yield "gathered", unsharded
                if unsharded.grad is not None:
                    yield "gradients", unsharded.grad
            if parameter.unsharded_accumulated_grad is not None:
                yield "gradients", parameter.unsharded_accumulated_grad
            if parameter.sharded_param.grad is not None:
                yield "gradients", parameter.sharded_param.grad


@contextmanager
def without_fsdp_hooks(modules: Sequence[Any]) -> Iterator[None]:
    """A context in which the forward passes of `modules` run without FSDP2's own hooks, to generate text faster.

    Without gradients, with all weights gathered and no types to cast (`cast_forward_inputs=False`), those hooks do nothing, but
    take a tenth of the time of a small block's pass for one token. Other hooks stay. FSDP2 has no public handles of its hooks.
    """
    all_hooks = [(module._forward_pre_hooks, module._forward_hooks) for module in modules]
    try:
        for module, (pre_hooks, hooks) in zip(modules, all_hooks, strict=True):
            state: Any = module._get_fsdp_state()
            module._forward_pre_hooks = _hooks_except(pre_hooks, state._pre_forward_hook_handle)
            module._forward_hooks = _hooks_except(hooks, state._post_forward_hook_handle)
        yield
    finally:
        for module, (pre_hooks, hooks) in zip(modules, all_hooks, strict=True):
            module._forward_pre_hooks = pre_hooks
            module._forward_hooks = hooks


def _hooks_except(hooks: Any, handle: Any) -> OrderedDict[int, Any]:
    """The hooks without the one of this handle; all of them if there is no handle, as when several modules share a hook."""
    left_out = getattr(handle, "id", None)
    return OrderedDict((number, hook) for number, hook in hooks.items() if number != left_out)
