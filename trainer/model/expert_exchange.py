"""Experts of which each rank holds some: tokens are sent to the ranks of their experts, and back (`parallel.experts`).

No token is dropped, and none is padded. The rank that sends a token applies the router's weights, so that the gradient of the
router needs no exchange. Counts of chosen experts are taken before, of all experts of the layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from strategies.expert_counts import LayerRowCounts
from strategies.expert_share import ExpertShare
from strategies.sequence import AllToAll
from trainer.model.compat import grouped_experts
from trainer.tuning.low_rank import LoraUpdate, frozen_experts

MAX_KEPT_RATIO = 2
"""If a rank receives at most this many times the rows that it sends, it keeps the experts' activations for the backward pass.
If it receives more, it computes them again there, chunk by chunk: a rank to which all tokens go does not run out of memory."""
MIN_CHUNK_ROWS = 4096
"""So many rows are computed without chunks, however few rows a rank sends."""


class OwnExperts:
    """A view of a module of experts that counts only this rank's experts, whose parameters are all that the module has."""

    def __init__(self, module: Any, num_experts: int) -> None:
        self._module = module
        self.num_experts = num_experts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def expert_parallel_forward(
    module: Any,
    share: ExpertShare,
    hidden: Tensor,
    expert_indices: Tensor,
    weights: Tensor,
    lora_updates: dict[str, LoraUpdate] | None,
) -> Tensor:
    """The output `[T, H]` of a layer's experts that are distributed over ranks, for `hidden [T, H]`.

    All ranks of the group must call.
    1. Exchange how many rows each rank sends to each expert, then send each token's hidden state to the ranks of its experts.
    2. Compute the own experts on the rows that arrived.
    3. Send the outputs back, weight them and add up the k outputs of each token.

    `module`: the experts, of which this rank holds some (`share`). `expert_indices`, `weights`: `[T, k]`. An index that is no
    expert's, beyond the last one, adds nothing to the output. `lora_updates`: LoRA updates of the experts' weights, by the
    weight's name.
    """
    experts_per_token = expert_indices.shape[-1]
    # A row: a token for one of its experts. `order`: which choice (of all `expert_indices`, flattened) each row is.
    # Sorted by expert, and so by the rank that holds the expert.
    row_experts, order = torch.sort(expert_indices.reshape(-1), stable=True)
    all_experts = torch.arange(module.num_experts, device=row_experts.device)
    ends = torch.searchsorted(row_experts, all_experts, right=True)
    # The counts are exchanged between the ranks of the group, or assumed in a simulation. The rows of each expert have no name
    # here: it would keep their tensor alive while the experts compute.
    counts = share.row_count_source.row_counts(ends.diff(prepend=ends.new_zeros(1)), len(row_experts))

    num_sent_rows = sum(counts.sent_to_rank)
    order = order[:num_sent_rows]  # without the choices that stand for no expert, which are sorted to the end
    received_rows = exchange_rows(
        hidden[order // experts_per_token], counts.sent_to_rank, counts.received_from_rank, share
    )
    own_outputs = _forward_own_experts(module, share, received_rows, counts, lora_updates)
    returned_rows = exchange_rows(own_outputs, counts.received_from_rank, counts.sent_to_rank, share)

    # Back to the order of tokens, where the k experts of a token are added up.
    weighted_rows = returned_rows * weights.reshape(-1)[order, None]
    width = hidden.shape[-1]
    output_of_choice = weighted_rows.new_zeros(expert_indices.numel(), width)
    output_of_choice.index_copy_(0, order, weighted_rows)
    return output_of_choice.view(*expert_indices.shape, width).sum(dim=1).to(hidden.dtype)


def exchange_rows(rows: Tensor, sent_to_rank: list[int], received_from_rank: list[int], share: ExpertShare) -> Tensor:
    """Exchange rows all-to-all, with gradients; returns the received rows `[N', H]` in the order of the senders.

    `rows [N, H]` go to the ranks in their order: `sent_to_rank[r]` of them to rank r, from which `received_from_rank[r]` come.
    All ranks of the group must call.
    """
    width = rows.shape[-1]
    sent_elements = [num_rows * width for num_rows in sent_to_rank]
    received_elements = [num_rows * width for num_rows in received_from_rank]
    flat: Tensor = AllToAll.apply(rows.reshape(-1), sent_elements, received_elements, share.group)
    return flat.view(-1, width)


def _forward_own_experts(
    module: Any, share: ExpertShare, rows: Tensor, counts: LayerRowCounts, lora_updates: dict[str, LoraUpdate] | None
) -> Tensor:
    """Compute the experts that this rank holds on the hidden states `rows [N, H]` that arrived from its group: `[N, H]`.

    If more rows arrive than `MAX_KEPT_RATIO` times those that this rank sent (its fair part, with room to spare), they are
    computed in chunks, whose activations are computed again in the backward pass.

    `share`: which experts of the layer are its own. `counts`: how many rows came from each rank for each expert. `lora_updates`:
    LoRA updates of the weights of all experts, by the weight's name.
    """
    num_own = module.num_experts // share.group_size
    own_experts = OwnExperts(module, num_own)
    own_updates = None
    if lora_updates is not None:
        first_own = share.group_rank * num_own
        own_updates = {
            name: update.slice_of_experts(first_own, first_own + num_own) for name, update in lora_updates.items()
        }

    def compute(rows: Tensor, expert_of_row: Tensor) -> Tensor:
        routing_weights = rows.new_ones(len(rows), 1)  # the rank that sent a row applies its weight
        if own_updates is not None or hasattr(module, "packed_experts"):
            return frozen_experts(own_experts, rows, expert_of_row[:, None], routing_weights, own_updates)
        return grouped_experts(own_experts, rows, expert_of_row[:, None], routing_weights)

    if len(rows) == 0:
        # One row of zeros: without it, the parameters would not be in the graph, and other ranks would wait for their
        # gradients.
        zero_row = rows.sum(dim=0, keepdim=True)
        first_expert = torch.zeros(1, dtype=torch.int64, device=rows.device)
        return compute(zero_row, first_expert)[:0]

    # Rows come rank by rank, and those of a rank expert by expert.
    expert_of_count = torch.arange(num_own, device=rows.device).repeat(share.group_size)
    expert_of_row = expert_of_count.repeat_interleave(counts.received_by_expert.reshape(-1), output_size=len(rows))
    max_kept_rows = max(MIN_CHUNK_ROWS, MAX_KEPT_RATIO * sum(counts.sent_to_rank))
    if len(rows) <= max_kept_rows:
        return compute(rows, expert_of_row)
    outputs = []
    for chunk in zip(rows.split(max_kept_rows), expert_of_row.split(max_kept_rows), strict=True):
        outputs.append(
            torch.utils.checkpoint.checkpoint(compute, *chunk, use_reentrant=False, preserve_rng_state=False)
        )
    return torch.cat(outputs)
