"""Reports what was really sharded, counted from the live tensors and not from the settings."""

from __future__ import annotations

from typing import Any

from torch import nn

from strategies.base import Engine
from strategies.parameters import element_counts, named_parameters
from strategies.runtime import Runtime, gather_objects


def held_elements(step_module: nn.Module) -> int:
    """Parameter elements that lie on this rank between steps."""
    held_total, counts = 0, element_counts(step_module)
    for name, p in named_parameters(step_module):
        if hasattr(p, "ds_tensor"):
            local_numel, full_numel = p.ds_tensor.ds_numel, int(p.ds_numel)  # type: ignore[attr-defined]
        elif hasattr(p, "to_local"):
            local_numel, full_numel = p.to_local().numel(), p.numel()
        else:
            local_numel = full_numel = p.numel()
        held_total += local_numel if counts[name] == full_numel else local_numel * counts[name] // full_numel
    return held_total


def sharding_record(engine: Engine, runtime: Runtime) -> dict[str, Any]:
    """Total, trainable and per-rank held parameter elements, and what the ranks exchange through. All ranks must call."""
    step_module = engine.step_module
    total = sum(element_counts(step_module).values())
    trainable = sum(getattr(p, "ds_numel", p.numel()) for _, p in named_parameters(step_module) if p.requires_grad)
    exchange = "nccl" if runtime.device.type == "cuda" else "gloo"
    if engine.host_memory is not None:
        exchange = "shared memory"
    return {
        "parameters": total,
        "trainable_parameters": trainable,
        "exchange": exchange,
        "held_per_rank": gather_objects(held_elements(step_module), runtime),
    }
