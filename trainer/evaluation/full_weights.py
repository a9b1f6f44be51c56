"""Decides by memory whether an evaluation gathers sharded weights once, or block by block in each pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from strategies.runtime import Runtime, free_host_memory, gather_objects
from trainer.model.architecture import text_settings
from trainer.model.layer_settings import layer_values

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
    """Whether every rank has all weights while it computes."""
    description: str
    """The decision with its numbers."""
    forward_is_collective: bool = False
    """Whether passes send tokens to experts on other ranks, whatever is gathered."""

    @property
    def in_step(self) -> bool:
        """Whether each forward pass is a collective: ranks take as many passes as the one that needs most."""
        return self.forward_is_collective or not self.gathered_once


def decide_gathering(engine: Engine, runtime: Runtime, cache_bytes: int) -> GatherDecision:
    """Decide whether every rank gathers all sharded weights once, or each pass gathers them block by block.

    They are gathered once if they and the cache fit into the free memory of the rank that has the least. `cache_bytes`: memory of
    the keys and values of the largest batch. A collective: all ranks must call.
    """
    forward_is_collective = engine.full_parameters.forward_is_collective
    if not engine.full_parameters.sharded:
        return GatherDecision(sharded=False, gathered_once=True, description="every rank holds all weights")
    weight_bytes = engine.full_parameters.gather_bytes()  # None if parameters are offloaded to NVMe
    free_bytes = min(gather_objects(free_memory(runtime), runtime))
    block_by_block = "weights gathered block by block in each pass"
    if weight_bytes is None:
        description = f"{block_by_block}: they lie on a drive"
        return GatherDecision(
            sharded=True, gathered_once=False, description=description, forward_is_collective=forward_is_collective
        )
    sizes = (
        f"all weights take {weight_bytes / GIB:.2f} GiB a rank and keys {cache_bytes / GIB:.2f}, "
        f"{free_bytes / GIB:.2f} are free"
    )
    fits = weight_bytes + cache_bytes <= USABLE_SHARE * free_bytes
    choice = "weights gathered once for all answers" if fits else block_by_block
    return GatherDecision(
        sharded=True, gathered_once=fits, description=f"{choice}: {sizes}", forward_is_collective=forward_is_collective
    )


def free_memory(runtime: Runtime) -> int:
    """Bytes of the device that this rank can still use; 0 if unknown. On the CPU, the ranks of a host share its free memory."""
    if runtime.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(runtime.device)
        # What torch's allocator holds and does not use is free for us too.
        return free + torch.cuda.memory_reserved(runtime.device) - torch.cuda.memory_allocated(runtime.device)
    return (free_host_memory() or 0) // runtime.local_world_size


def cache_bytes(config: Any, rows: int, tokens: int, itemsize: int) -> int:
    """Bytes of the cached keys and values of `rows` rows of `tokens` tokens in all layers.

    `config`: of the transformers model. `itemsize`: bytes of a number. An upper bound: MLA and sliding windows need less.
    """
    text_config = text_settings(config)
    num_heads = getattr(text_config, "num_attention_heads", 1) or 1
    width_of_equal_heads = getattr(text_config, "hidden_size", 0) // num_heads
    head_width = max(filter(None, layer_values(text_config, "head_dim")), default=width_of_equal_heads)
    num_key_heads = max(filter(None, layer_values(text_config, "num_key_value_heads")), default=num_heads)
    num_layers = getattr(text_config, "num_hidden_layers", 0)
    numbers_per_token = 2 * num_layers * num_key_heads * head_width  # keys and values
    return numbers_per_token * rows * tokens * itemsize
