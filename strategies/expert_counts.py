"""How many rows the ranks of an expert group send each other for one layer of a mixture.

A row is what one token sends to one of its experts. Routers decide how many go where, so ranks tell each other before they
exchange any (`ExchangedCounts`). In a simulation nobody answers, and a distribution is assumed in place of the routers' choice
(`AssumedCounts`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

ASSUMED_IMBALANCE = 2.0
"""Rows that arrive at the busiest rank over the mean of its group, in every layer: what plans assume if no run measured it."""


@dataclass(frozen=True, slots=True)
class RowCounts:
    """The rows of one layer that a rank sends, and those that arrive."""

    sent: list[int]
    """Rows to each rank of the group, in rank order."""
    received: list[int]
    """Rows from each rank of the group, in rank order."""
    by_expert: Tensor
    """int64 `[ranks, experts of this rank]`, on the device: of the rows from each rank, how many are for each expert."""


class ExpertCounts(Protocol):
    """Where the counts of a layer come from."""

    def of_layer(self, chosen: Tensor, rows: int) -> RowCounts:
        """The counts of a layer whose router has chosen each expert `chosen [E]` times (int64), `rows` times in all.

        `E` counts the experts of the whole layer, in the order of the ranks that hold them. `rows` is known to the host. All
        ranks of the group must call.
        """


class ExchangedCounts:
    """Counts that ranks tell each other. `group`: the ranks over which the experts of a layer are dealt."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)

    def of_layer(self, chosen: Tensor, rows: int) -> RowCounts:
        """See `ExpertCounts.of_layer`. Exchanges E numbers, and waits for the device once: the host must know the sizes."""
        sent_by_expert = chosen.view(self.ranks, -1)
        received_by_expert = torch.empty_like(sent_by_expert)
        dist.all_to_all_single(received_by_expert, sent_by_expert, group=self.group)
        both = torch.stack([sent_by_expert.sum(dim=1), received_by_expert.sum(dim=1)])
        sent, received = both.tolist()
        return RowCounts(sent, received, received_by_expert)


@dataclass(frozen=True, slots=True)
class AssumedCounts:
    """Counts of a simulated rank: it sends as many rows to each rank, and gets `imbalance` times what it sends.

    The collective and the wait of `ExchangedCounts` are there for those who count them. What they answer is not used.
    """

    ranks: int
    """Ranks over which the experts of a layer are dealt."""
    imbalance: float = 1.0
    """Rows that arrive at the simulated rank over the mean of all ranks. No more than `ranks`, where all rows go to one."""
    group: Any = None
    """The ranks that tell each other; None where tensors have shapes alone and nobody counts exchanges."""

    def of_layer(self, chosen: Tensor, rows: int) -> RowCounts:
        """See `ExpertCounts.of_layer`. `by_expert` has the right shape, and values that mean nothing."""
        by_expert = chosen.view(self.ranks, -1)
        if self.group is not None:
            dist.all_to_all_single(torch.empty_like(by_expert), by_expert, group=self.group)
            by_expert.sum().item()
        arriving = round(rows * min(self.imbalance, self.ranks))
        return RowCounts(_even(rows, self.ranks), _even(arriving, self.ranks), by_expert)


def counts_within(group: Any, ranks: int, *, imbalance: float | None) -> ExpertCounts:
    """Where the counts of a group of `ranks` ranks come from. `imbalance`: what a simulation assumes; None outside of one."""
    return ExchangedCounts(group) if imbalance is None else AssumedCounts(ranks, imbalance, group)


def _even(rows: int, ranks: int) -> list[int]:
    """`rows` divided among `ranks` as evenly as whole numbers can be."""
    return [rows * (rank + 1) // ranks - rows * rank // ranks for rank in range(ranks)]
