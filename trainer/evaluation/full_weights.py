"""Decides by memory whether an evaluation gathers sharded weights once, or block by block in each pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from strategies.runtime import Runtime, free_host_memory, gather_objects
from trainer.model.architecture import text_settings

if TYPE_CHECKING:
    from strategies.base import Engine

USABLE_SHARE = 0.8
"""Share of the free memory that weights and cached keys may take. The rest is for activations and the allocator."""
GIB = 2**30


@dataclass(frozen=True, slots=True)
class GatherDecision:
    """Whether sharded weights are gathered once or block by block; the same on all ranks."""

    sharded: bool
    """Whether weights are sharded, so that there was something to decide."""
    gathered_once: bool
    """Whether every rank has all weights, so that its passes wait for no other rank."""
    description: str
    """The decision with its numbers."""


def decide_gathering(engine: Engine, runtime: Runtime, cache_bytes: int) -> GatherDecision:
    """Decide by the rank with the least free memory. A collective: all ranks must call.

    `cache_bytes`: memory of the keys and values of the largest batch.
    """
    if not engine.full_parameters.sharded:
        return GatherDecision(False, True, "every rank holds all weights")
    weights = engine.full_parameters.gather_bytes()
    free = min(gather_objects(free_memory(runtime), runtime))
    if weights is None:
        return GatherDecision(True, False, "weights gathered block by block in each pass: they lie on a drive")
    sizes = (
        f"all weights take {weights / GIB:.2f} GiB a rank and keys {cache_bytes / GIB:.2f}, {free / GIB:.2f} are free"
    )
    fits = weights + cache_bytes <= USABLE_SHARE * free
    how = "weights gathered once for all answers" if fits else "weights gathered block by block in each pass"
    return GatherDecision(True, fits, f"{how}: {sizes}")


def free_memory(runtime: Runtime) -> int:
    """Bytes of the device that this rank can still use; 0 if unknown. On the CPU, the ranks of a host share its free memory."""
    if runtime.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(runtime.device)
        # What torch's allocator holds and does not use is free for us too.
        return free + torch.cuda.memory_reserved(runtime.device) - torch.cuda.memory_allocated(runtime.device)
    return (free_host_memory() or 0) // runtime.local_world_size


def cache_bytes(config: Any, rows: int, tokens: int, itemsize: int) -> int:
    """Bytes of the keys and values of `rows` rows of `tokens` tokens in all layers. An upper bound: MLA and windows need less."""
    text = text_settings(config)
    heads = getattr(text, "num_attention_heads", 1) or 1
    head_width = getattr(text, "head_dim", None) or getattr(text, "hidden_size", 0) // heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    layers = getattr(text, "num_hidden_layers", 0)
    return 2 * layers * rows * tokens * key_heads * head_width * itemsize
