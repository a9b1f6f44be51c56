"""Initial values under ZeRO-3: each rank holds a part of every parameter and reads no more than that."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from strategies.base import ParameterSource, plan_of
from strategies.compat.modules import own_parameters, replace_buffers
from strategies.parameters import load_parameter_cooperatively, named_parameters
from strategies.runtime import Runtime


def load_partitioned(
    step_module: nn.Module,
    source: ParameterSource,
    settings: dict[str, Any],
    dtype: torch.dtype,
    runtime: Runtime,
    *,
    offload_to_nvme: bool,
) -> None:
    """Load a model on meta under ZeRO-3, so that a rank never holds more than one full block. All ranks must call.

    Block by block: allocate it, let DeepSpeed's `zero.Init` partition it, and read this rank's part from `source`. With
    `offload_to_nvme`, `zero.Init` moves each parameter to a drive at once; so full parameters are filled before, of which each
    rank reads a part. `settings`: DeepSpeed's own. `dtype`: the type that the run computes in.
    """
    import deepspeed

    names = {id(parameter): name for name, parameter in named_parameters(step_module, include_frozen_models=True)}
    # The root comes last: what is still on meta then (embeddings, norm, head) belongs to no block.
    units = [*step_module.shard_units(), *plan_of(step_module).further_units]  # type: ignore[operator]
    for module in [*units, step_module]:
        allocated: dict[int, nn.Parameter] = {}  # by the id of the meta parameter, so that ties are kept
        for owner, key, meta_parameter in _own_parameters_below(module):
            if not meta_parameter.is_meta or hasattr(
                meta_parameter, "ds_id"
            ):  # an earlier block's, partitioned already
                continue
            if id(meta_parameter) not in allocated:
                full = nn.Parameter(
                    torch.empty_like(meta_parameter.data, device=runtime.device), meta_parameter.requires_grad
                )
                allocated[id(meta_parameter)] = full
                if offload_to_nvme:
                    load_parameter_cooperatively(full.data, names[id(meta_parameter)], source, runtime)
            own_parameters(owner)[key] = allocated[id(meta_parameter)]
        if allocated:
            deepspeed.zero.Init(module=module, config_dict_or_path=settings, dtype=dtype)
        if not offload_to_nvme:
            for meta_id, parameter in allocated.items():
                _read_own_part(parameter, names[meta_id], source, runtime.rank)
    replace_buffers(step_module, lambda buffer: buffer.to(runtime.device))


def _own_parameters_below(module: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """(owner, name in the owner, parameter) for `module` and everything in it. A list: the caller replaces parameters."""
    parameters = []
    for owner in module.modules():
        for key, parameter in own_parameters(owner).items():
            if parameter is not None:
                parameters.append((owner, key, parameter))
    return parameters


def gather_listed_modules_as_one(step_module: nn.Module) -> None:
    """Let DeepSpeed gather modules of the classes in `StepPlan.gathered_as_one` together with their submodules."""
    from deepspeed.utils import set_z3_leaf_module

    classes = plan_of(step_module).gathered_as_one
    for module in step_module.modules():
        if type(module).__name__ in classes:
            set_z3_leaf_module(module, True)


@torch.no_grad()
def _read_own_part(parameter: Any, name: str, source: ParameterSource, rank: int) -> None:
    """Read this rank's part of a partitioned parameter. Parts of the last ranks may end in padding, or be only padding."""
    part = parameter.ds_tensor
    start = part.ds_numel * rank
    stop = min(start + part.ds_numel, parameter.ds_numel)
    if start < stop:
        values = source.read_slice(name, parameter.ds_shape, start, stop)
        part.data.view(-1)[: stop - start].copy_(values)
