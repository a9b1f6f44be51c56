"""Experts of which each rank holds some: tokens are sent to the ranks of their experts, and back (`parallel.experts`).

No token is dropped, and none is padded. The rank that sends a token applies the router's weights, so that the gradient of the
router needs no exchange. Counts of chosen experts are taken before, of all experts of the layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from strategies.expert_counts import RowCounts
from strategies.expert_share import ExpertShare
from strategies.sequence import AllToAll
from trainer.model.compat import grouped_experts
from trainer.tuning.low_rank import LowRank, frozen_experts

MAX_KEPT_RATIO = 2
"""Rows that a rank computes at once, over those that it sends: of twice the mean, what experts make is kept for the backward
pass. Of more it is computed again there, chunk by chunk, so that a rank to which all tokens go does not run out of memory."""
MIN_CHUNK_ROWS = 4096
"""Rows that are computed at once however few a rank sends."""


class OwnExperts:
    """A module of experts as that of the experts of this rank alone, whose parameters it has already."""

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
    low_rank: dict[str, LowRank] | None,
) -> Tensor:
    """What `experts_forward` returns, `[T, H]`, of experts dealt over ranks. All ranks of the share's group must call.

    `expert_indices` count the experts of the layer. Those beyond them compute nothing and add nothing.
    """
    experts_per_token = expert_indices.shape[-1]
    # Rows of one expert stand together, and experts in the order of the ranks that hold them.
    row_experts, order = torch.sort(expert_indices.reshape(-1), stable=True)
    all_experts = torch.arange(module.num_experts, device=row_experts.device)
    ends = torch.searchsorted(row_experts, all_experts, right=True)
    counts = share.counts.row_counts(ends.diff(prepend=ends.new_zeros(1)), len(row_experts))

    order = order[: sum(counts.sent)]
    arrived = send_rows(hidden[order // experts_per_token], counts.sent, counts.received, share)
    made = _forward_own_experts(module, share, arrived, counts, low_rank)
    returned = send_rows(made, counts.received, counts.sent, share)

    # Back to the order of tokens, where the k experts of a token are added up.
    weighted = returned * weights.reshape(-1)[order, None]
    width = hidden.shape[-1]
    by_choice = weighted.new_zeros(expert_indices.numel(), width)
    by_choice.index_copy_(0, order, weighted)
    return by_choice.view(*expert_indices.shape, width).sum(dim=1).to(hidden.dtype)


def send_rows(rows: Tensor, sent: list[int], received: list[int], share: ExpertShare) -> Tensor:
    """The rows that ranks of the group send to this one, in rank order; with gradients. All ranks of the group must call.

    `rows [sum(sent), H]` go to the ranks in their order, `sent[r]` of them to rank r.
    """
    width = rows.shape[-1]
    sent_elements = [number * width for number in sent]
    received_elements = [number * width for number in received]
    flat: Tensor = AllToAll.apply(rows.reshape(-1), sent_elements, received_elements, share.group)
    return flat.view(-1, width)


def _forward_own_experts(
    module: Any, share: ExpertShare, rows: Tensor, counts: RowCounts, low_rank: dict[str, LowRank] | None
) -> Tensor:
    """Compute the experts that this rank holds on the hidden states `rows [N, H]` that arrived from its group: `[N, H]`.

    `share`: which experts of the layer are its own. `counts`: how many rows came from each rank for each expert. `low_rank`:
    LoRA updates of the experts' weights, by the weight's name.
    """
    num_own = module.num_experts // share.group_size
    own_experts = OwnExperts(module, num_own)
    first = share.group_rank * num_own
    own_low_rank = None
    if low_rank is not None:
        own_low_rank = {name: update.of_experts(first, first + num_own) for name, update in low_rank.items()}

    def compute(rows: Tensor, ids: Tensor) -> Tensor:
        ones = rows.new_ones(len(rows), 1)
        if own_low_rank is not None or hasattr(module, "packed_experts"):
            return frozen_experts(own_experts, rows, ids[:, None], ones, own_low_rank)
        return grouped_experts(own_experts, rows, ids[:, None], ones)

    if len(rows) == 0:
        # A row of zeros: without one, the parameters would have no part in the graph, and other ranks wait for their gradients.
        no_expert = torch.zeros(1, dtype=torch.int64, device=rows.device)
        return compute(rows.sum(dim=0, keepdim=True), no_expert)[:0]
    # The expert of each row: rows come rank by rank, and within a rank expert by expert.
    ids = torch.arange(num_own, device=rows.device).repeat(share.group_size)
    ids = ids.repeat_interleave(counts.by_expert.reshape(-1), output_size=len(rows))
    most_rows = max(MIN_CHUNK_ROWS, MAX_KEPT_RATIO * sum(counts.sent))
    if len(rows) <= most_rows:
        return compute(rows, ids)
    chunks = zip(rows.split(most_rows), ids.split(most_rows), strict=True)
    made = []
    for chunk in chunks:
        made.append(torch.utils.checkpoint.checkpoint(compute, *chunk, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(made)
