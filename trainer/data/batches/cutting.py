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
class RowCut:
    """Which of the slices of a row a rank takes, where the ranks of a sequence-parallel group share each row."""

    sequence_rank: int
    sequence_size: int

    def borders(self, num_tokens: int) -> list[int]:
        """Where each slice of a row of `num_tokens` begins, and where the last one ends: 8 tokens for 3 ranks -> [0, 2, 5, 8]."""
        return [num_tokens * rank // self.sequence_size for rank in range(self.sequence_size + 1)]

    def span(self, num_tokens: int) -> tuple[int, int]:
        """(begin, end) of this rank's slice of a row of `num_tokens`, in tokens."""
        borders = self.borders(num_tokens)
        return borders[self.sequence_rank], borders[self.sequence_rank + 1]


def sequence_cut(runtime: Runtime) -> RowCut | None:
    """Which slice of its rows this rank takes under sequence parallelism; None without, when each rank has rows of its own."""
    return None if runtime.sequence_size == 1 else RowCut(runtime.sequence_rank, runtime.sequence_size)


def cut_batch(
    batch: Mapping[str, Any], cut: RowCut, axes: Mapping[str, Axis], *, keep_row_ids: bool = False
) -> dict[str, Any]:
    """Take this rank's slice of a micro-batch that is one row without padding, for sequence parallelism.

    `axes`: by entry of the batch, what its numbers go by (tokens, supervised rows, sequences), and so how it is cut. Supervised
    rows are the positions that have a target. The slice also has:
    - `row_slices`: where all n slices begin and the last one ends, in tokens (n + 1 numbers);
    - `row_span`: (begin, end) of this slice in tokens;
    - `owner`: 1.0 on the first rank of the group, else 0.0. What belongs to a whole sequence, such as the loss of a pair, is
      computed alike by all ranks of the group, and counts on the owner alone;
    - with `keep_row_ids`, `row_input_ids`: the token ids of the whole row.

    Raises ValueError for padded rows, and for an entry that `axes` lacks. Kept whole by mistake, it would count once for each
    rank.
    """
    if "document_bounds" not in batch:
        raise ValueError("rows with padding are not cut along the sequence; set data.layout=padding_free")
    batch = with_enough_tokens(batch, cut.sequence_size)
    num_tokens = batch["input_ids"].shape[-1]
    begin, end = cut.span(num_tokens)
    first_row, end_row = num_rows_before(batch["target_rows"], [begin, end])

    slices: dict[str, Any] = {}
    for name, entry in batch.items():
        axis = axes.get(name)
        if axis is None:
            raise ValueError(
                f"the batch's entry {name!r} does not say what it goes by; add it to the collator's `axes`"
            )
        if axis is Axis.token:
            slices[name] = entry[..., begin:end].contiguous()
        elif axis is Axis.position:
            slices[name] = entry[first_row:end_row] - begin
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
    slices["row_span"] = (begin, end)
    slices["owner"] = float(cut.sequence_rank == 0)
    return slices


def num_rows_before(row_positions: Tensor, borders: list[int]) -> list[int]:
    """Count how many of the ascending `row_positions` lie before each border: positions [1, 4, 6], borders [0, 5] -> [0, 2]."""
    return torch.searchsorted(row_positions, torch.tensor(borders, dtype=row_positions.dtype)).tolist()


def with_enough_tokens(batch: Mapping[str, Any], sequence_size: int) -> Mapping[str, Any]:
    """Make sure that a row has at least one token for each of `sequence_size` ranks, since models fail on an empty slice.

    Returns the batch itself if it has. Otherwise a copy whose row has `sequence_size` tokens: one more document of filler tokens
    without targets is appended. `is_token` (bool [1, sequence_size]) is then False for them, so that the routers of a mixture of
    experts do not count them.
    """
    num_tokens = batch["input_ids"].shape[-1]
    num_fillers = sequence_size - num_tokens
    if num_fillers <= 0:
        return batch
    filled = dict(batch)
    filler_id = batch["input_ids"][0, 0]  # any id that the model knows
    filled["input_ids"] = torch.cat([batch["input_ids"], filler_id.expand(1, num_fillers)], dim=1)
    filled["position_ids"] = torch.cat([batch["position_ids"], torch.arange(num_fillers)[None]], dim=1)
    filled["targets"] = torch.cat([batch["targets"], torch.full((1, num_fillers), IGNORED_TARGET)], dim=1)
    filled["is_token"] = (torch.arange(sequence_size) < num_tokens)[None]
    # The last document is the one of fillers. The bounds begin with 0 and end with the length of the row.
    document_bounds = [*batch["document_bounds"], sequence_size]
    longest = max(end - begin for begin, end in pairwise(document_bounds))
    filled["document_bounds"] = document_bounds
    for side in ("q", "k"):
        filled[f"cu_seq_lens_{side}"] = torch.tensor(document_bounds, dtype=torch.int32)
        filled[f"max_length_{side}"] = longest
    return filled


def all_to_all_row_counts(old_borders: list[int], new_borders: list[int], rank: int) -> tuple[list[int], list[int]]:
    """Count how many rows a rank sends to and receives from each peer in an all-to-all that moves rows to another division.

    `old_borders` and `new_borders` ([n + 1]) divide the rows among n ranks: at which row each rank's slice begins, and where the
    last one ends. Example: old borders [0, 4, 8], new borders [0, 2, 8]; rank 0 sends [2, 2] and receives [2, 0].
    """
    sent = []
    received = []
    for peer in range(len(old_borders) - 1):
        sent.append(_num_moved_rows(old_borders, rank, new_borders, peer))
        received.append(_num_moved_rows(old_borders, peer, new_borders, rank))
    return sent, received


def _num_moved_rows(old_borders: list[int], sender: int, new_borders: list[int], receiver: int) -> int:
    """How many rows lie both in the old slice of `sender` and in the new slice of `receiver`."""
    begin = max(old_borders[sender], new_borders[receiver])
    end = min(old_borders[sender + 1], new_borders[receiver + 1])
    return max(0, end - begin)
