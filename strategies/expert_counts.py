"""How many rows the ranks of an expert group send each other for one layer of a mixture.

A row is what one token sends to one of its experts. Routers decide how many go where, so ranks tell each other before they
exchange any (`ExchangedRowCounts`). In a simulation nobody answers, and a distribution is assumed in place of the routers' choice
(`AssumedRowCounts`).
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
class LayerRowCounts:
    """The rows of one layer that a rank sends, and those that arrive."""

    sent_to_rank: list[int]
    """Number of rows to each rank of the group, in rank order."""
    received_from_rank: list[int]
    """Number of rows from each rank of the group, in rank order."""
    received_by_expert: Tensor
    """int64 `[ranks, experts of this rank]`, on the device: of the rows from each rank, how many are for each expert."""


class RowCountSource(Protocol):
    """The source of a layer's row counts: exchanged between ranks, or assumed in a simulation."""

    def row_counts(self, rows_by_expert: Tensor, num_rows: int) -> LayerRowCounts:
        """How many rows of a layer this rank sends to each rank of its group, and receives from each. All of them must call.

        `rows_by_expert`: `[E]`, int64, on the device: how often this rank's router has chosen each of the layer's E experts,
        in the order of the ranks that hold them. `num_rows`: their sum, which the host knows without waiting for the device.
        """


class ExchangedRowCounts:
    """Counts that the ranks of an expert group send each other. `group`: over which the experts of a layer are distributed."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.num_ranks = dist.get_world_size(group)

    def row_counts(self, rows_by_expert: Tensor, num_rows: int) -> LayerRowCounts:
        """Tell the other ranks how many rows they will get from this one in a layer, and learn how many arrive here.

        A row is what one token sends to one of its experts. `rows_by_expert`: int64 `[E]`, how many rows this rank has for each
        of the layer's E experts. An all-to-all, after which the host waits for the device. All ranks of the group must call.
        """
        sent_by_expert = rows_by_expert.view(self.num_ranks, -1)
        received_by_expert = torch.empty_like(sent_by_expert)
        dist.all_to_all_single(received_by_expert, sent_by_expert, group=self.group)
        # One copy to the host for both.
        sent_and_received = torch.stack([sent_by_expert.sum(dim=1), received_by_expert.sum(dim=1)])
        sent_to_rank, received_from_rank = sent_and_received.tolist()
        return LayerRowCounts(sent_to_rank, received_from_rank, received_by_expert)


@dataclass(frozen=True, slots=True)
class AssumedRowCounts:
    """Counts of a simulated rank: it sends equally many rows to each rank, and receives `imbalance` times what it sends.

    It makes the collective and the host read of `ExchangedRowCounts`, so that a simulation counts them, and ignores the result.
    """

    num_ranks: int
    """Ranks over which the experts of a layer are distributed."""
    imbalance: float = 1.0
    """Rows that arrive at the simulated rank, divided by the mean over ranks. At most `num_ranks`: all rows go to one rank."""
    group: Any = None
    """The expert group; None on meta tensors, where no collectives are counted."""

    def row_counts(self, rows_by_expert: Tensor, num_rows: int) -> LayerRowCounts:
        """Assume, in a simulation, that this rank sends `num_rows` rows evenly, and that `imbalance` times as many arrive.

        A row is what one token sends to one of its experts. `rows_by_expert`: `[E]`, of the layer's E experts; its values are not
        used. Of the result, `received_by_expert` has the right shape, but values without a meaning.
        """
        received_by_expert = rows_by_expert.view(self.num_ranks, -1)  # stands in for the counts of other ranks
        if self.group is not None:
            # What `ExchangedRowCounts` does, so that a simulation records it: the collective, whose result is not used, ...
            dist.all_to_all_single(torch.empty_like(received_by_expert), received_by_expert, group=self.group)
            # ... and a read on the host, which waits for the device.
            received_by_expert.sum().item()
        num_received = round(num_rows * min(self.imbalance, self.num_ranks))
        return LayerRowCounts(
            sent_to_rank=_split_evenly(num_rows, self.num_ranks),
            received_from_rank=_split_evenly(num_received, self.num_ranks),
            received_by_expert=received_by_expert,
        )


def row_count_source(group: Any, num_ranks: int, *, imbalance: float | None) -> RowCountSource:
    """The source of row counts for a group of ranks. `imbalance`: the one that a simulation assumes; None in a real run."""
    if imbalance is None:
        return ExchangedRowCounts(group)
    return AssumedRowCounts(num_ranks, imbalance, group)


def _split_evenly(num_rows: int, num_ranks: int) -> list[int]:
    """How many of `num_rows` rows each rank gets if they are divided as evenly as possible: 7 rows, 2 ranks -> [3, 4]."""
    bounds = [num_rows * rank // num_ranks for rank in range(num_ranks + 1)]
    return [stop - start for start, stop in pairwise(bounds)]
