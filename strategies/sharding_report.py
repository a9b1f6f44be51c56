"""Reports what was really sharded, counted from the live tensors and not from the settings."""

from __future__ import annotations

from typing import Any

from torch import nn

from strategies.base import Engine
from strategies.expert_share import expert_share_of_parameter
from strategies.parameters import named_parameters, num_elements_by_name
from strategies.runtime import Runtime, gather_objects


def num_held_elements(step_module: nn.Module) -> int:
    """Count the parameter elements that this rank holds between steps, from its live tensors: the record shows what is sharded.

    Elements are those of the model: a packed (quantised) weight counts with the elements that it encodes. Experts distributed
    over ranks count on each rank that holds them.
    """
    local_total = 0
    # By name, of the full parameters; of packed ones, the elements that they encode.
    full_counts = num_elements_by_name(step_module)
    for name, parameter in named_parameters(step_module):
        local_numel, full_numel = _local_and_full_numel(parameter)
        share = expert_share_of_parameter(step_module, name)
        if share is not None:  # this rank has its own experts, the full parameter those of all ranks of its group
            full_numel *= share.group_size
        if full_counts[name] == full_numel:
            local_total += local_numel
        else:  # packed: each byte stands for several elements
            local_total += local_numel * full_counts[name] // full_numel
    return local_total


def _local_and_full_numel(parameter: Any) -> tuple[int, int]:
    """(elements on this rank, elements of the full parameter) as they are stored, whoever has sharded the parameter.

    Of packed weights, which are bytes, the bytes are counted; of distributed experts, those of one rank count as the full ones.
    """
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3
        return parameter.ds_tensor.ds_numel, int(parameter.ds_numel)
    if hasattr(parameter, "to_local"):  # FSDP2
        return parameter.to_local().numel(), parameter.numel()
    return parameter.numel(), parameter.numel()


def sharding_record(engine: Engine, runtime: Runtime) -> dict[str, Any]:
    """Count from the live tensors, and not from the settings, what is really sharded: what `run.json` records of it.

    `{"parameters": 1200, "trainable_parameters": 40, "exchange": "nccl", "held_per_rank": [600, 600]}`: numbers of elements, and
    under `exchange` the backend of collectives: nccl, gloo, or shared memory. All ranks must call.
    """
    step_module = engine.step_module
    counts = num_elements_by_name(step_module)
    num_parameters = sum(counts.values())
    num_trainable = sum(counts[name] for name, parameter in named_parameters(step_module) if parameter.requires_grad)
    if engine.host_memory is not None:  # CPU ranks of one host, which need no network
        backend = "shared memory"
    else:
        backend = "nccl" if runtime.device.type == "cuda" else "gloo"
    return {
        "parameters": num_parameters,
        "trainable_parameters": num_trainable,
        "exchange": backend,
        "held_per_rank": gather_objects(num_held_elements(step_module), runtime),
    }
