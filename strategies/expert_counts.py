"""How many rows the ranks of an expert group send each other for one layer of a mixture.

A row is what one token sends to one of its experts. Routers decide how many go where, so ranks tell each other before they
exchange any (`AllToAllCounts`). In a simulation nobody answers, and a distribution is assumed in place of the routers' choice
(`AssumedCounts`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
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

    def row_counts(self, rows_by_expert: Tensor, num_rows: int) -> RowCounts:
        """How many rows of a layer this rank sends to each rank of its group, and receives from each. All of them must call.

        `rows_by_expert`: `[E]`, int64, on the device: how often this rank's router has chosen each of the layer's E experts,
        in the order of the ranks that hold them. `num_rows`: their sum, which the host knows without waiting for the device.
        """


class AllToAllCounts:
    """Counts that the ranks of an expert group send each other. `group`: over which the experts of a layer are distributed."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)

    def row_counts(self, rows_by_expert: Tensor, num_rows: int) -> RowCounts:
        """How many rows of a layer this rank sends and receives, by an all-to-all of E numbers. All ranks of the group must call.

        `rows_by_expert`: `[E]`, how many rows this rank has for each of the layer's experts. The host waits for the device.
        """
        sent_by_expert = rows_by_expert.view(self.ranks, -1)
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

    def row_counts(self, rows_by_expert: Tensor, num_rows: int) -> RowCounts:
        """The assumed counts of a layer for which this rank has `num_rows` rows. Their `by_expert` has only the right shape.

        `rows_by_expert`: `[E]`, of the layer's E experts; its values are not used.
        """
        by_expert = rows_by_expert.view(self.ranks, -1)
        if self.group is not None:
            # As a real rank does, so that a simulation records the collective and the wait for the device.
            dist.all_to_all_single(torch.empty_like(by_expert), by_expert, group=self.group)
            by_expert.sum().item()
        num_received = round(num_rows * min(self.imbalance, self.ranks))
        return RowCounts(
            sent=_split_evenly(num_rows, self.ranks),
            received=_split_evenly(num_received, self.ranks),
            by_expert=by_expert,
        )


def expert_counts_of_group(group: Any, ranks: int, *, imbalance: float | None) -> ExpertCounts:
    """The source of row counts for a group of `ranks` ranks. `imbalance`: the one a simulation assumes; None in a real run."""
    return AllToAllCounts(group) if imbalance is None else AssumedCounts(ranks, imbalance, group)


def _split_evenly(num_rows: int, num_ranks: int) -> list[int]:
    """How many of `num_rows` rows each rank gets if they are divided as evenly as possible: 7 rows, 2 ranks -> [3, 4]."""
    bounds = [num_rows * rank // num_ranks for rank in range(num_ranks + 1)]
    return [stop - start for start, stop in pairwise(bounds)]
