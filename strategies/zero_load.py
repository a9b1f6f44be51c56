"""Initial values under ZeRO-3: each rank holds a part of every parameter and reads no more than that."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from strategies.base import ParameterSource, plan_of
from strategies.compat.modules import own_parameters, replace_buffers
from strategies.parameters import named_parameters
from strategies.runtime import Runtime


def load_partitioned(
    step_module: nn.Module,
    source: ParameterSource,
    settings: dict[str, Any],
    dtype: torch.dtype,
    runtime: Runtime,
    *,
    to_drive: bool,
) -> None:
    """Block by block: allocate, let `zero.Init` partition, and read what this rank holds. All ranks must call.

    What moves to a drive while it is partitioned (`to_drive`) is filled before, on rank 0, and broadcast. `settings` are
    DeepSpeed's, `dtype` is the type of the run.
    """
    import deepspeed

    names = {id(p): name for name, p in named_parameters(step_module, teacher=True)}
    for module in [*step_module.shard_units(), step_module]:  # type: ignore[operator]
        names_of_allocated: dict[int, str] = {}
        owners = [(o, key, p) for o in module.modules() for key, p in own_parameters(o).items() if p is not None]
        allocated: dict[int, nn.Parameter] = {}
        for owner, key, p in owners:
            if not p.is_meta or hasattr(p, "ds_id"):
                continue
            if id(p) not in allocated:
                full = nn.Parameter(torch.empty_like(p.data, device=runtime.device), p.requires_grad)
                allocated[id(p)], names_of_allocated[id(p)] = full, names[id(p)]
                if to_drive and runtime.is_main:
                    full.data.view(-1).copy_(source.run(names[id(p)], p.shape, 0, p.numel()))
            own_parameters(owner)[key] = allocated[id(p)]
        if allocated:
            deepspeed.zero.Init(module=module, config_dict_or_path=settings, dtype=dtype)
        for identity, parameter in allocated.items() if not to_drive else ():
            _fill(parameter, names_of_allocated[identity], source, runtime.rank)
    replace_buffers(step_module, lambda buffer: buffer.to(runtime.device))


def keep_together(step_module: nn.Module) -> None:
    """Let modules of the classes in the plan's `gathered_as_one` be gathered with all their parts, once a call."""
    from deepspeed.utils import set_z3_leaf_module

    classes = plan_of(step_module).gathered_as_one
    for module in step_module.modules():
        if type(module).__name__ in classes:
            set_z3_leaf_module(module, True)


@torch.no_grad()
def _fill(parameter: Any, name: str, source: ParameterSource, rank: int) -> None:
    """Read this rank's part of a partitioned parameter; the last part may end in padding."""
    part = parameter.ds_tensor
    start = part.ds_numel * rank
    stop = min(start + part.ds_numel, parameter.ds_numel)
    if start < stop:
        part.data.view(-1)[: stop - start].copy_(source.run(name, parameter.ds_shape, start, stop))
