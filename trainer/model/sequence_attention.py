"""Attention over a row of which each rank holds a slice: slices are exchanged for heads, and back (`parallel.sequence`).

Between the two exchanges a rank has the whole row for some of the heads, so every kernel computes what it always does, with
the same documents, windows, chunks, soft caps and sinks. Nothing depends on how heads or tokens divide: any degree up to the
number of query heads, and any number of key-value heads.

What a row is cut into travels with the batch (`row_slices`), as the borders of documents do. Neither a global nor a context
variable would do: activation recomputation calls the layers again in the backward pass, outside of any context.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from strategies.runtime import device_kind
from strategies.sequence import AllToAll, sequence_group_of
from trainer.model.compat import flash_attention_function

FLASH_ATTENTION = "flash_attention_2"
"""What transformers calls its function of FlashAttention 2."""
SINK_NAMES = ("s_aux", "sinks")
"""What models call the parameters of which each query head has one."""
UNSUPPORTED_INPUTS = ("head_mask", "position_bias")
"""Inputs for each head and position, which no architecture without padding passes today."""

Attention = Callable[..., tuple[Tensor, Any]]


def register_flash() -> None:
    """Let transformers' own FlashAttention 2 take slices, under the name it has: models ask for it by that. Idempotent."""
    from transformers import AttentionInterface

    AttentionInterface.register(FLASH_ATTENTION, over_slices(flash_attention_function()))


HeadRange = tuple[int, int]
"""The heads of a rank: the first, and the one after the last."""


@dataclass(frozen=True, slots=True)
class HeadShares:
    """Which heads each rank of a sequence-parallel group attends with."""

    query_heads: list[HeadRange]
    """The query heads of each rank."""
    key_value_heads: list[HeadRange]
    """For each rank the key-value heads that its query heads use. Several ranks may use the same one."""


def head_shares(query_heads: int, key_value_heads: int, ranks: int) -> HeadShares:
    """Decide which heads each rank of a sequence-parallel group attends with.

    Query heads are divided as evenly as possible; a rank has the key-value heads that its query heads use. 4 query heads and 2
    key-value heads on 2 ranks: query heads (0, 2) and (2, 4), key-value heads (0, 1) and (1, 2).
    """
    queries_per_key = query_heads // key_value_heads
    query_shares = []
    key_value_shares = []
    for rank in range(ranks):
        # Rounded down: of 9 heads, 4 ranks get 2, 2, 2 and 3.
        first = query_heads * rank // ranks
        end = query_heads * (rank + 1) // ranks
        query_shares.append((first, end))
        key_value_shares.append((first // queries_per_key, math.ceil(end / queries_per_key)))
    return HeadShares(query_shares, key_value_shares)


def over_slices(attend: Attention) -> Attention:
    """Make `attend`, an attention function of transformers, work on rows of which each rank of a group holds a slice.

    The function that is returned passes a call without `row_slices` through. With them, q is `[1, H, t, D]`, k and v are `[1,
    G, t, D]` for the t tokens of this rank's slice, and the result is `[1, t, H, D]`. All ranks of the group must call, forward
    and backward.
    """

    @wraps(attend)
    def attend_over_slices(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        *args: Any,
        row_slices: list[int] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """q `[1, H, t, D]`, k and v `[1, G, t, D]` of this rank's slice -> (its attention output `[1, t, H, D]`, None).

        `row_slices`: the token borders of all ranks' slices, [0, 5, 16] for two; None: rows are whole. `attention_mask`, like
        all other arguments, is that of the whole row, over which `attend` computes.
        """
        if row_slices is None:
            return attend(module, query, key, value, attention_mask, *args, **kwargs)
        for name in UNSUPPORTED_INPUTS:
            if kwargs.get(name) is not None:
                raise ValueError(f"parallel.sequence: attention with {name} is not exchanged; set parallel.sequence=1")
        # Rotary embeddings leave queries and keys wider than values under autocast. Kernels of GPUs take them narrow, so
        # the exchange need not carry what is cast away after it.
        if device_kind(value.device) == "cuda":
            query = query.to(value.dtype)
            key = key.to(value.dtype)

        # Exchange: from a slice of the row with all heads to the whole row with a share of the heads.
        group = sequence_group_of(row_slices)
        rank = dist.get_rank(group)
        shares = head_shares(query.shape[1], key.shape[1], len(row_slices) - 1)
        own_heads = shares.query_heads[rank]
        row_query = exchange_slices_for_heads(query, shares.query_heads, row_slices, rank, group)
        row_key = exchange_slices_for_heads(key, shares.key_value_heads, row_slices, rank, group)
        row_value = exchange_slices_for_heads(value, shares.key_value_heads, row_slices, rank, group)
        queries_per_key = query.shape[1] // key.shape[1]
        key_of_query = _key_head_of_each_query(own_heads, shares.key_value_heads[rank], queries_per_key)
        # The kernels cannot group this rank's query heads evenly, so each gets a copy of its key-value head.
        if key_of_query is not None:
            indices = torch.tensor(key_of_query).to(row_key.device, non_blocking=True)
            row_key = row_key.index_select(1, indices)
            row_value = row_value.index_select(1, indices)
        for name in SINK_NAMES:
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name][slice(*own_heads)]

        # Attention over the whole row, then back to this rank's slice with all heads.
        row_output, _ = attend(module, row_query, row_key, row_value, attention_mask, *args, **kwargs)
        # Attention weights, which some functions return, are those of this rank's heads: nobody asks for them in training.
        return exchange_heads_for_slices(row_output, shares.query_heads, row_slices, rank, group), None

    return attend_over_slices


def _key_head_of_each_query(query_heads: HeadRange, key_heads: HeadRange, queries_per_key: int) -> list[int] | None:
    """For each query head of a rank, the index of its key-value head among the rank's own: [0, 1, 1]; None if kernels find it.

    Kernels take equally many query heads, in a row, for each key-value head (grouped-query attention). A rank's share of the
    heads may be divided in another way. `query_heads`, `key_heads`: the rank's own. `queries_per_key`: query heads of the layer
    for each key-value head.
    """
    first_key, end_key = key_heads
    key_of_query = [head // queries_per_key - first_key for head in range(*query_heads)]
    num_own_queries = len(key_of_query)
    num_own_keys = end_key - first_key
    if num_own_queries % num_own_keys:
        return key_of_query
    own_queries_per_key = num_own_queries // num_own_keys
    assumed_by_kernels = [index // own_queries_per_key for index in range(num_own_queries)]
    return None if key_of_query == assumed_by_kernels else key_of_query


def exchange_slices_for_heads(
    local: Tensor, heads_by_rank: list[HeadRange], row_slices: list[int], rank: int, group: Any
) -> Tensor:
    """Exchange tokens for heads: `[1, heads, t, D]` of this rank's slice -> `[1, own heads, T, D]` of the whole row.

    The first all-to-all of sequence-parallel attention. `heads_by_rank`: the heads that each rank gets, as (first, one after
    the last). `row_slices`: token borders of the ranks' slices, [0, 5, 16] for two. All ranks of the group must call.
    """
    head_size = local.shape[-1]
    # Token by token within what a rank is sent, so that what arrives from all ranks is the row itself.
    pieces = [local[0, first:end].transpose(0, 1).reshape(-1) for first, end in heads_by_rank]
    first_own_head, end_own_head = heads_by_rank[rank]
    num_own_heads = end_own_head - first_own_head
    received_from_rank = [(stop - start) * num_own_heads * head_size for start, stop in pairwise(row_slices)]
    sent_to_rank = [piece.numel() for piece in pieces]
    row = AllToAll.apply(torch.cat(pieces), sent_to_rank, received_from_rank, group)
    return row.view(row_slices[-1], num_own_heads, head_size).transpose(0, 1)[None]


def exchange_heads_for_slices(
    row_output: Tensor, heads_by_rank: list[HeadRange], row_slices: list[int], rank: int, group: Any
) -> Tensor:
    """Exchange heads for tokens: `[1, T, own heads, D]` of the whole row -> `[1, t, heads, D]` of this rank's slice.

    The way back of `exchange_slices_for_heads`, with the same arguments. All ranks of the group must call.
    """
    num_own_heads, head_size = row_output.shape[2:]
    num_own_tokens = row_slices[rank + 1] - row_slices[rank]
    sent_to_rank = [(stop - start) * num_own_heads * head_size for start, stop in pairwise(row_slices)]
    received_from_rank = [num_own_tokens * (end - first) * head_size for first, end in heads_by_rank]
    flat = AllToAll.apply(row_output.reshape(-1), sent_to_rank, received_from_rank, group)
    by_rank = []
    for piece, (first, end) in zip(flat.split(received_from_rank), heads_by_rank, strict=True):
        by_rank.append(piece.view(num_own_tokens, end - first, head_size))
    return torch.cat(by_rank, dim=1)[None]
