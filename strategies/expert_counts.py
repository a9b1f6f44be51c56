"""How many rows the ranks of an expert group send each other for one layer of a mixture.

A row is what one token sends to one of its experts. Routers decide how many go where, so ranks tell each other before they
exchange any (`AllToAllCounts`). In a simulation nobody answers, and a distribution is assumed in place of the routers' choice
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
    """The source of a layer's row counts: exchanged between ranks, or assumed in a simulation."""

    def row_counts(self, chosen: Tensor, rows: int) -> RowCounts:
        """The row counts of a layer. All ranks of the group must call.

        `chosen`: `[E]`, int64, on the device: how often this rank's router has chosen each of the layer's E experts, in the order
        of the ranks that hold them. `rows`: the sum of `chosen`, which the host knows without waiting for the device.
        """


class AllToAllCounts:
    """Counts that the ranks of an expert group send each other. `group`: over which the experts of a layer are distributed."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)

    def row_counts(self, chosen: Tensor, rows: int) -> RowCounts:
        """See `ExpertCounts.row_counts`. An all-to-all of E numbers; then the host waits for the device, to know the sizes."""
        sent_by_expert = chosen.view(self.ranks, -1)
        received_by_expert = torch.empty_like(sent_by_expert)
        dist.all_to_all_single(received_by_expert, sent_by_expert, group=self.group)
        # One copy to the host for both.
        sent_and_received = torch.stack([sent_by_expert.sum(dim=1), received_by_expert.sum(dim=1)])
        sent, received = sent_and_received.tolist()
        return RowCounts(sent, received, received_by_expert)


@dataclass(frozen=True, slots=True)
class AssumedCounts:
    """Counts of a simulated rank: it sends equally many rows to each rank, and receives `imbalance` times what it sends.

    It makes the collective and the host read of `AllToAllCounts`, so that a simulation counts them, and ignores the result.
    """

    ranks: int
    """Ranks over which the experts of a layer are distributed."""
    imbalance: float = 1.0
    """Rows that arrive at the simulated rank, divided by the mean over ranks. At most `ranks`: all rows go to one rank."""
    group: Any = None
    """The expert group; None on meta tensors, where no collectives are counted."""

    def row_counts(self, chosen: Tensor, rows: int) -> RowCounts:
        """See `ExpertCounts.row_counts`. `by_expert` has the right shape, but its values are not used."""
        by_expert = chosen.view(self.ranks, -1)
        if self.group is not None:
            dist.all_to_all_single(torch.empty_like(by_expert), by_expert, group=self.group)
            by_expert.sum().item()
        arriving = round(rows * min(self.imbalance, self.ranks))
        return RowCounts(_split_evenly(rows, self.ranks), _split_evenly(arriving, self.ranks), by_expert)


def expert_counts_of_group(group: Any, ranks: int, *, imbalance: float | None) -> ExpertCounts:
    """The source of row counts for a group of `ranks` ranks. `imbalance`: the one a simulation assumes; None in a real run."""
    return AllToAllCounts(group) if imbalance is None else AssumedCounts(ranks, imbalance, group)


def _split_evenly(rows: int, ranks: int) -> list[int]:
    """`rows` divided among `ranks` as evenly as whole numbers can be."""
    return [rows * (rank + 1) // ranks - rows * rank // ranks for rank in range(ranks)]
