"""`documents.arrow`: the cleaned documents as an Arrow table that `datasets.Dataset.from_file` opens, memory-mapped."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.data.document import Document

if TYPE_CHECKING:
    import pyarrow as pa

NAME = "documents.arrow"


@cache
def schema() -> pa.Schema:
    """The columns; what a document does not have is null."""
    import pyarrow as pa

    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("train", pa.bool_())]))
    text = [(name, pa.string()) for name in ("prompt", "completion", "text", "label", "separator")]
    place = [("source", pa.string()), ("file", pa.string()), ("line", pa.int64())]
    lists = [("messages", turns), ("chosen", turns), ("rejected", turns)]
    return pa.schema([*place, *lists, *text, ("desirable", pa.bool_())])


def to_batch(documents: list[Document]) -> pa.RecordBatch:
    """Documents as rows, in order."""
    import pyarrow as pa

    names = schema().names
    columns = {name: [getattr(document, name) for document in documents] for name in names}
    return pa.RecordBatch.from_pydict(columns, schema=schema())


class TableWriter:
    """Appends batches to `documents.arrow` in a directory. Raises OSError."""

    def __init__(self, directory: Path) -> None:
        import pyarrow as pa

        self._sink = pa.OSFile(str(directory / NAME), "wb")
        self._writer = pa.ipc.new_stream(self._sink, schema())

    def append(self, batch: pa.RecordBatch) -> None:
        """Write one batch; an empty one leaves no trace."""
        if batch.num_rows:
            self._writer.write_batch(batch)

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()
        self._sink.close()


class DocumentTable:
    """The documents of a prepared data set by row number; of the file, only what is asked for is read."""

    def __init__(self, directory: Path) -> None:
        import pyarrow as pa

        self._file = pa.memory_map(str(directory / NAME))
        self._batches = list(pa.ipc.open_stream(self._file))
        sizes = [batch.num_rows for batch in self._batches]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, index: int) -> dict[str, Any]:
        """Row `index` as plain Python values."""
        batch = int(np.searchsorted(self._starts, index, side="right")) - 1
        (found,) = self._batches[batch].slice(index - int(self._starts[batch]), 1).to_pylist()
        return dict(found)

    def document(self, index: int) -> Document:
        """Row `index` as a document."""
        fields = self.row(index)
        for name in ("messages", "chosen", "rejected"):
            if fields[name] is not None:
                fields[name] = [{k: v for k, v in turn.items() if v is not None} for turn in fields[name]]
        return Document(**{**fields, "separator": fields["separator"] or ""})


def batch_to_bytes(batch: pa.RecordBatch) -> bytes:
    """One batch as an IPC stream."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema()) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())


def batch_from_bytes(data: bytes) -> pa.RecordBatch:
    """The batch that `batch_to_bytes` wrote."""
    import pyarrow as pa

    return pa.ipc.open_stream(data).read_next_batch()
