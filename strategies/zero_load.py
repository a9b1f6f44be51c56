"""Initial values under ZeRO-3: each rank holds a part of every parameter and reads no more than that."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from strategies.base import ParameterSource, plan_of, units_gathered_one_at_a_time
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
    """Load the weights of a model on meta under ZeRO-3, block by block, so that a rank never holds more than one full block.

    For each block: allocate it, let DeepSpeed's `zero.Init` partition it over the ranks, and read this rank's part from `source`.
    With `offload_to_nvme`, `zero.Init` moves each parameter to a drive at once; so full parameters are filled before, of which
    each rank reads a part. `settings`: DeepSpeed's own. `dtype`: the type that the run computes in. All ranks must call.
    """
    import deepspeed

    name_by_id = {id(parameter): name for name, parameter in named_parameters(step_module, include_frozen_models=True)}
    # The root comes last: what is still on meta then (embeddings, norm, head) belongs to no block.
    for module in [*units_gathered_one_at_a_time(step_module), step_module]:
        parameter_by_name = _allocate_meta_parameters(module, name_by_id, runtime.device)
        if offload_to_nvme:
            for name, parameter in parameter_by_name.items():
                load_parameter_cooperatively(parameter.data, name, source, runtime)
        if parameter_by_name:
            deepspeed.zero.Init(module=module, config_dict_or_path=settings, dtype=dtype)
        if not offload_to_nvme:
            for name, parameter in parameter_by_name.items():
                _read_own_part(parameter, name, source, runtime.rank)
    replace_buffers(step_module, lambda buffer: buffer.to(runtime.device))


def _allocate_meta_parameters(
    module: nn.Module, name_by_id: dict[int, str], device: torch.device
) -> dict[str, nn.Parameter]:
    """Give the parameters of `module` that are on meta memory on `device`, without values yet. Returns them by plain name.

    `name_by_id`: the plain names of the meta parameters, by their `id()`. Parameters that several modules share stay shared.
    Those of an earlier block, which DeepSpeed has partitioned already, are left alone.
    """
    allocated: dict[int, nn.Parameter] = {}  # by the id of the meta parameter
    for owner in module.modules():
        parameters = own_parameters(owner)  # the module's own dict: what is set in it is in the module
        for key, meta_parameter in list(parameters.items()):
            is_partitioned = hasattr(meta_parameter, "ds_id")  # DeepSpeed gives its parameters attributes `ds_...`
            if meta_parameter is None or not meta_parameter.is_meta or is_partitioned:
                continue
            meta_id = id(meta_parameter)
            if meta_id not in allocated:
                values = torch.empty_like(meta_parameter.data, device=device)
                allocated[meta_id] = nn.Parameter(values, meta_parameter.requires_grad)
            parameters[key] = allocated[meta_id]
    return {name_by_id[meta_id]: parameter for meta_id, parameter in allocated.items()}


def gather_modules_of_plan_as_one(step_module: nn.Module) -> None:
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
