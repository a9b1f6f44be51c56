"""Whether the disk has room for a preparation: estimated from the inputs and a sample of them, before the work begins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from strategies.errors import StorageError
from trainer.data.block import Block, Job, jobs
from trainer.data.inputs import Input
from trainer.data.read.columnar import count_rows
from trainer.data.read.hub import check_name, load
from trainer.data.read.opening import expansion, local
from trainer.data.read.origin import Origin
from trainer.data.read.paths import COLUMN_KINDS, is_hub, kind_of
from trainer.data.read.row import Row

PLENTY = 64
"""Bytes of room for each byte of input with which nothing is estimated; compressed text in single bytes may need so much."""
NUMBERS = 8
"""Bytes of a number in a column of the store."""


def require_room(
    directory: Path,
    inputs: list[Input],
    maker: Callable[[], Callable[[Job], Block]],
    *,
    max_documents: int | None,
    parts: int = 1,
) -> None:
    """Raise StorageError where the disk of `directory` has less room than 1/`parts` of the data is going to take.

    What is written for each byte (of tables: each row) is measured on the first block of every input, made by `maker()`.
    Nothing is measured where there is plenty of room.
    """
    place = directory
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if PLENTY * sum(item.origin.size() for item in inputs) <= free * parts:
        return
    make, total, train = maker(), 0.0, 0.0
    for item in inputs:
        read, rows, written = _measured(item, make)
        size, num_rows = extent(item.origin)
        need = written * (size / max(read, 1) + num_rows / max(rows, 1))
        if item.split == "train" and max_documents is not None:
            need = min(need, written / max(rows, 1) * max_documents)
        total, train = total + need, train + need * (item.split == "train")
    if total > free * parts:
        whose = " by this shard" if parts > 1 else ""
        raise StorageError(
            f"data.cache_dir={directory}: about {_gib(total / parts)} GiB will be written{whose}, and {_gib(free)} GiB are free "
            f"(judged by the first rows of each input; {_gib(train / parts)} GiB of it is training data); set "
            "data.cache_dir to a larger disk, or read fewer rows with data.max_documents"
        )


def extent(origin: Origin) -> tuple[float, int]:
    """How much there is to read: bytes of text, decompressed (an estimate), and rows of tables, whose bytes tell little."""
    size, rows = 0.0, 0
    for path in origin.paths:
        if is_hub(path):
            rows += load(check_name(str(path), origin.key), origin.subset, origin.split, origin.revision).num_rows
        elif (here := local(path)) is None:
            size += Origin(origin.key, [path]).size()
        elif kind_of(here) in COLUMN_KINDS:
            rows += count_rows(here)
        else:
            size += here.stat().st_size * expansion(here)
    return size, rows


def _measured(item: Input, make: Callable[[Job], Block]) -> tuple[int, int, int]:
    """(bytes read, rows read, bytes that are written of them), of an input's first block."""
    first = next(jobs((item.id, row) for row in item.origin.rows(item.wanted)), None)
    if first is None:
        return 0, 0, 0
    read = sum(_size(row) for row in first.rows if isinstance(row, Row))
    block = make(first)
    assert block.sequences is not None and block.documents is not None
    made = block.sequences
    numbers = len(made.lengths) * (len(made.columns) + 3) * NUMBERS
    a_token = 5 if made.weights is None else 9
    return read, len(first.rows), block.documents.nbytes + a_token * len(made.tokens) + numbers


def _size(row: Row) -> int:
    if row.raw is not None:
        return len(row.raw) + 1
    return len(json.dumps(row.fields, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass"))


def _gib(size: float) -> str:
    return f"{size / 2**30:,.3g}"
