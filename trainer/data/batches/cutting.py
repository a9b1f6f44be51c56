"""Cuts a row of documents into slices of tokens, one for each rank of a sequence-parallel group (`parallel.sequence`).

A row of T tokens is cut at `T * j // n`, also in the middle of a document. Nothing is padded, and no length is refused. The
slices are even because attention exchanges them for heads: after that every rank attends over the whole row.

Targets are shifted within their document before the cut, so a slice's last token keeps its target, and no border needs care.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from strategies.runtime import Runtime

IGNORED_TARGET = -100
"""Target of a position that is not supervised."""


class Axis(StrEnum):
    """What an entry of a batch goes by, and so what becomes of it when the row is cut."""

    token = "token"
    """One number for each token, in the last dimension: this rank keeps those of its slice."""
    position = "position"
    """Positions in the row, ascending: this rank keeps those in its slice, counted from where the slice begins."""
    supervised_row = "supervised row"
    """One number for each supervised row: this rank keeps those of its own."""
    supervised_row_index = "index of a supervised row"
    """Indices of supervised rows, ascending: this rank keeps its own, counted from its first one."""
    sequence = "sequence"
    """One number for each sequence: all ranks keep them all, since a sequence may lie on several."""
    whole = "whole"
    """About the whole row: all ranks keep it."""
    batch = "batch"
    """A batch of its own, which is cut by itself."""


AXES: dict[str, Axis] = {
    "input_ids": Axis.token,
    "position_ids": Axis.token,
    "targets": Axis.token,
    "is_token": Axis.token,
    "target_rows": Axis.position,
    "row_sequence": Axis.supervised_row,
    "target_weights": Axis.supervised_row,
    "reference_logps": Axis.sequence,
    "num_sequences": Axis.whole,
    "cu_seq_lens_q": Axis.whole,
    "cu_seq_lens_k": Axis.whole,
    "max_length_q": Axis.whole,
    "max_length_k": Axis.whole,
    "document_bounds": Axis.whole,
}
"""What the entries of every batch go by. A collator adds those of its own objective (`Collator.axes`)."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Which of the slices of a row a rank takes."""

    sequence_rank: int
    sequence_size: int

    def borders(self, num_tokens: int) -> list[int]:
        """Where the slices of a row begin and the last one ends, `[sequence_size + 1]`."""
        return [num_tokens * rank // self.sequence_size for rank in range(self.sequence_size + 1)]

    def span(self, num_tokens: int) -> tuple[int, int]:
        """Where this rank's slice of a row begins and ends."""
        borders = self.borders(num_tokens)
        return borders[self.sequence_rank], borders[self.sequence_rank + 1]


def sequence_cut(runtime: Runtime) -> Cut | None:
    """The cut of this rank; None if it shares its rows with nobody."""
    return None if runtime.sequence_size == 1 else Cut(runtime.sequence_rank, runtime.sequence_size)


def cut_batch(
    batch: Mapping[str, Any], cut: Cut, axes: Mapping[str, Axis], *, keep_row_ids: bool = False
) -> dict[str, Any]:
    """This rank's slice of a micro-batch that is one row without padding, for sequence parallelism.

    `axes`: by entry, what its numbers are about (tokens, supervised rows, whole sequences), and so how it is cut. Supervised
    rows are the positions that have a target. Added are `row_slices` (offsets in tokens of all n slices, n + 1 numbers),
    `row_span` (the first and last of this slice), and `owner`: 1.0 on the first rank of the group, else 0.0. What belongs to a
    whole sequence, such as the loss of a pair, is computed alike by all ranks of the group, and counts on the owner alone. With
    `keep_row_ids` there is also `row_input_ids`, the token ids of the whole row.

    Errors: ValueError for padded rows, and for an entry of which `axes` says nothing. Kept whole by mistake, it would count
    once for each rank.
    """
    if "document_bounds" not in batch:
        raise ValueError("rows with padding are not cut along the sequence; set data.layout=padding_free")
    batch = with_enough_tokens(batch, cut.sequence_size)
    num_tokens = batch["input_ids"].shape[-1]
    start, stop = cut.span(num_tokens)
    first_row, end_row = num_rows_before(batch["target_rows"], [start, stop])

    slices: dict[str, Any] = {}
    for name, entry in batch.items():
        # How the entry is cut follows from what its numbers are about.
        axis = axes.get(name)
        if axis is None:
            raise ValueError(
                f"the batch's entry {name!r} does not say what it goes by; add it to the collator's `axes`"
            )
        if axis is Axis.token:
            slices[name] = entry[..., start:stop].contiguous()
        elif axis is Axis.position:
            slices[name] = entry[first_row:end_row] - start
        elif axis is Axis.supervised_row:
            slices[name] = entry[first_row:end_row]
        elif axis is Axis.supervised_row_index:
            slices[name] = entry[(entry >= first_row) & (entry < end_row)] - first_row
        elif axis is Axis.batch:
            slices[name] = cut_batch(entry, cut, axes)
        else:
            slices[name] = entry
    if keep_row_ids:
        slices["row_input_ids"] = batch["input_ids"]
    slices["row_slices"] = cut.borders(num_tokens)
    slices["row_span"] = (start, stop)
    slices["owner"] = float(cut.sequence_rank == 0)
    return slices


def num_rows_before(rows: Tensor, borders: list[int]) -> list[int]:
    """How many of `rows`, positions in ascending order, lie before each border."""
    return torch.searchsorted(rows, torch.tensor(borders, dtype=rows.dtype)).tolist()


def with_enough_tokens(batch: Mapping[str, Any], sequence_size: int) -> Mapping[str, Any]:
    """The batch with at least one token for each of `sequence_size` ranks: models fail on an empty slice.

    A shorter row gets one more document of filler tokens without targets. `is_token` (bool `[1, T]`) is then False for them, so
    that the routers of a mixture of experts do not count them.
    """
    num_tokens = batch["input_ids"].shape[-1]
    missing = sequence_size - num_tokens
    if missing <= 0:
        return batch
    # The filler tokens.
    changed = dict(batch)
    filler_id = batch["input_ids"][0, 0]  # an id that the model knows
    changed["input_ids"] = torch.cat([batch["input_ids"], filler_id.expand(1, missing)], dim=1)
    changed["position_ids"] = torch.cat([batch["position_ids"], torch.arange(missing)[None]], dim=1)
    changed["targets"] = torch.cat([batch["targets"], torch.full((1, missing), IGNORED_TARGET)], dim=1)
    changed["is_token"] = (torch.arange(sequence_size) < num_tokens)[None]
    # The boundaries of the documents, the filler document being the last.
    bounds = [*batch["document_bounds"], sequence_size]
    longest = max(stop - start for start, stop in pairwise(bounds))
    changed["document_bounds"] = bounds
    for side in ("q", "k"):
        changed[f"cu_seq_lens_{side}"] = torch.tensor(bounds, dtype=torch.int32)
        changed[f"max_length_{side}"] = longest
    return changed


def all_to_all_row_counts(before: list[int], after: list[int], rank: int) -> tuple[list[int], list[int]]:
    """Counts for an all-to-all that redistributes rows from one cut of them to another: (sent, received), each by rank.

    Example: borders [0, 4, 8] before and [0, 2, 8] after; rank 0 sends [2, 2] and receives [2, 0].

    `before` and `after`, `[n + 1]`: the row offsets at which the ranks' slices begin, and the last one ends, in the old and the
    new cut. `rank` sends `sent[r]` rows to rank r and gets `received[r]` from it.
    """
    sent = []
    received = []
    for other in range(len(before) - 1):
        sent.append(_overlap(before, rank, after, other))
        received.append(_overlap(before, other, after, rank))
    return sent, received


def _overlap(before: list[int], holder: int, after: list[int], taker: int) -> int:
    """Rows that `holder` has by the one cut, and `taker` by the other."""
    first = max(before[holder], after[taker])
    last = min(before[holder + 1], after[taker + 1])
    return max(0, last - first)
