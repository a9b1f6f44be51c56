"""Decides by memory whether an evaluation gathers sharded weights once, or block by block in each pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from strategies.runtime import Runtime, free_host_memory_bytes, gather_objects
from trainer.model.architecture import text_model_config
from trainer.model.layer_settings import layer_values

if TYPE_CHECKING:
    from strategies.base import Engine

USABLE_MEMORY_SHARE = 0.8
"""Share of the free memory that weights and the KV cache may take. The rest is for activations and the allocator."""
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
    sends_tokens_to_experts: bool = False
    """Whether forward passes send tokens to experts on other ranks (expert parallelism), even if all weights are gathered."""

    @property
    def forward_is_collective(self) -> bool:
        """Whether each forward pass is a collective, so that every rank must take as many passes as the rank with the most."""
        return self.sends_tokens_to_experts or not self.gathered_once


def decide_weight_gathering(engine: Engine, runtime: Runtime, kv_cache_bytes: int) -> GatherDecision:
    """Decide how sharded weights are gathered for many forward passes: once for all, or block by block in each.

    Once is faster, but every rank then holds the whole model.

    - Weights are not sharded: every rank has them, and there is nothing to gather.
    - Parameters are offloaded to NVMe: block by block.
    - All weights and the KV cache fit into the free memory of the rank that has the least: once.
    - They do not fit: block by block.

    `kv_cache_bytes`: memory of the KV cache of the largest batch on this rank. All ranks must call.
    """
    # With expert parallelism, each pass is a collective even if all other weights are gathered.
    sends_tokens_to_experts = engine.full_parameters.forward_is_collective
    if not engine.full_parameters.sharded:
        return GatherDecision(sharded=False, gathered_once=True, description="every rank holds all weights")
    # Bytes of all gathered weights, the same on every rank; None if parameters are offloaded to NVMe.
    weight_bytes = engine.full_parameters.gather_bytes()
    free_bytes = min(gather_objects(free_memory_bytes(runtime), runtime))
    block_by_block = "weights gathered block by block in each pass"
    if weight_bytes is None:
        description = f"{block_by_block}: they lie on a drive"
        return GatherDecision(
            sharded=True,
            gathered_once=False,
            description=description,
            sends_tokens_to_experts=sends_tokens_to_experts,
        )
    sizes = (
        f"all weights take {weight_bytes / GIB:.2f} GiB a rank and keys {kv_cache_bytes / GIB:.2f}, "
        f"{free_bytes / GIB:.2f} are free"
    )
    fits = weight_bytes + kv_cache_bytes <= USABLE_MEMORY_SHARE * free_bytes
    choice = "weights gathered once for all answers" if fits else block_by_block
    return GatherDecision(
        sharded=True,
        gathered_once=fits,
        description=f"{choice}: {sizes}",
        sends_tokens_to_experts=sends_tokens_to_experts,
    )


def free_memory_bytes(runtime: Runtime) -> int:
    """Bytes of device memory that this rank can still use; 0 if unknown. On the CPU, the ranks of a host share what is free."""
    if runtime.device.type == "cuda":
        driver_free_bytes, _ = torch.cuda.mem_get_info(runtime.device)
        # Memory that torch's allocator has reserved and does not use can be used too.
        return (
            driver_free_bytes + torch.cuda.memory_reserved(runtime.device) - torch.cuda.memory_allocated(runtime.device)
        )
    return (free_host_memory_bytes() or 0) // runtime.local_world_size


def bytes_per_parameter(model: Any) -> int:
    """Bytes of one number of the model's smallest float type, in which it caches keys and values."""
    return int(min(p.element_size() for p in model.parameters() if p.is_floating_point()))


def kv_cache_bytes_upper_bound(config: Any, rows: int, tokens: int, bytes_per_number: int) -> int:
    """The most memory that the keys and values of `rows` rows of `tokens` tokens each can take, in all layers, in bytes.

    An upper bound, for planning: MLA and sliding windows need less. `config`: the transformers configuration of the model.
    """
    text_config = text_model_config(config)
    num_heads = getattr(text_config, "num_attention_heads", 1) or 1
    default_head_width = getattr(text_config, "hidden_size", 0) // num_heads
    # Layers may differ; the widest counts.
    head_width = max(filter(None, layer_values(text_config, "head_dim")), default=default_head_width)
    num_key_heads = max(filter(None, layer_values(text_config, "num_key_value_heads")), default=num_heads)
    num_layers = getattr(text_config, "num_hidden_layers", 0)
    numbers_per_token = 2 * num_layers * num_key_heads * head_width  # keys and values
    return numbers_per_token * rows * tokens * bytes_per_number
