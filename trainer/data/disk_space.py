"""Checks before the work begins that the disk has room for prepared data, judged by the first rows of each input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from strategies.errors import StorageError
from trainer.data.document import SourceRow
from trainer.data.read.json_rows import UnparsedRow
from trainer.data.shards import PreparedBlock
from trainer.data.sources import RowRange, SourceInput, row_ranges

MAX_GROWTH_FACTOR = 64
"""Most bytes of prepared data for a byte of input: compressed text in tokens of single bytes may need that many."""


def require_disk_space(
    directory: Path,
    inputs: list[SourceInput],
    make_block: Callable[[RowRange], PreparedBlock],
    max_documents: int | None,
    *,
    num_shards: int = 1,
    scratch_bytes_per_row: int = 0,
) -> None:
    """Raise StorageError before the work begins if the disk of `directory` has less room than the prepared data will take.

    How much is written for each byte of text, or row of a table, is measured on the first block of every input, which
    `make_block` prepares. Nothing is measured if there is plenty of room.

    `max_documents`: how many training rows are read; None for all.
    `num_shards`: into how many parts preparation is divided; only one of them is written here.
    `scratch_bytes_per_row`: bytes of temporary files for a row, beside the block.
    """
    # All inputs are measured, and the sum is divided by the number of shards: a shard has about an equal part of each input.
    free_bytes = _free_disk_bytes(directory)
    # Preparing a block of every input takes seconds, so it is skipped if the disk is surely large enough.
    input_bytes = sum(source_input.origin.size_bytes() for source_input in inputs)
    if MAX_GROWTH_FACTOR * input_bytes <= free_bytes * num_shards:
        return
    total_bytes = 0.0
    train_bytes = 0.0
    for source_input in inputs:
        is_train = source_input.split == "train"
        max_rows = max_documents if is_train else None
        needed_bytes = _estimate_prepared_bytes(source_input, make_block, max_rows, scratch_bytes_per_row)
        total_bytes += needed_bytes
        if is_train:
            train_bytes += needed_bytes
    if total_bytes > free_bytes * num_shards:
        by_shard = " by this shard" if num_shards > 1 else ""
        raise StorageError(
            f"data.cache_dir={directory}: about {_gib_text(total_bytes / num_shards)} GiB will be written{by_shard}, and "
            f"{_gib_text(free_bytes)} GiB are free "
            f"(judged by the first rows of each input; {_gib_text(train_bytes / num_shards)} GiB of it is training data); set "
            "data.cache_dir to a larger disk, or read fewer rows with data.max_documents"
        )


def _free_disk_bytes(directory: Path) -> int:
    """Free bytes on the disk of a directory that may not exist yet: on that of its nearest parent that does."""
    existing = directory
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def _estimate_prepared_bytes(
    source_input: SourceInput,
    make_block: Callable[[RowRange], PreparedBlock],
    max_rows: int | None,
    scratch_bytes_per_row: int,
) -> float:
    """Estimate how many bytes the prepared data of an input will take on the disk, judged by its first block.

    `max_rows`: how many of its rows are read; None for all. `scratch_bytes_per_row`: bytes of temporary files for each row.
    """
    first_block = _measure_first_block(source_input, make_block)
    written_bytes = first_block.written_bytes + first_block.num_read_rows * scratch_bytes_per_row
    written_per_byte = written_bytes / max(first_block.read_bytes, 1)
    written_per_row = written_bytes / max(first_block.num_read_rows, 1)
    # The size of text files is known in bytes, that of tables in rows.
    size = source_input.origin.estimate_size()
    needed_bytes = size.text_bytes * written_per_byte + size.table_rows * written_per_row
    if max_rows is not None:
        needed_bytes = min(needed_bytes, written_per_row * max_rows)
    return needed_bytes


class _MeasuredBlock(NamedTuple):
    """What was read for an input's first block, and how many bytes it will take in the store."""

    read_bytes: int
    num_read_rows: int
    written_bytes: int


def _measure_first_block(source_input: SourceInput, make_block: Callable[[RowRange], PreparedBlock]) -> _MeasuredBlock:
    """Prepare the block of the first rows of an input (about 4 MiB of text, at most 512 rows), to see how large it becomes.

    Nothing is written.
    """
    rows = source_input.origin.rows(source_input.needed_columns)
    first_range = next(row_ranges((source_input.id, row) for row in rows))
    block = make_block(first_range)
    assert block.sequences is not None and block.documents is not None, "`make_block` has filled the block"
    return _MeasuredBlock(
        read_bytes=sum(_row_bytes(row) for row in first_range.rows if isinstance(row, SourceRow)),
        num_read_rows=len(first_range.rows),
        written_bytes=block.documents.nbytes + block.sequences.stored_bytes(),
    )


def _row_bytes(row: SourceRow) -> int:
    """Bytes of a row in its text file; of a row of a table, those it would have as JSON."""
    if isinstance(row, UnparsedRow):
        return len(row.raw) + 1  # and its line break
    return len(json.dumps(row.fields, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass"))


def _gib_text(size_bytes: float) -> str:
    """A size as a number of GiB with three digits, for a message: 1610612736 -> "1.5"."""
    return f"{size_bytes / 2**30:,.3g}"
