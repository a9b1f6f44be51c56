"""`documents.arrow`: the cleaned documents as an Arrow table that `datasets.Dataset.from_file` opens, memory-mapped."""

from __future__ import annotations

import json
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
    """The columns; what a document does not have is null. Tools and calls of tools are JSON texts."""
    import pyarrow as pa

    said = [(name, pa.string()) for name in ("reasoning_content", "tool_calls", "name", "tool_call_id")]
    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("train", pa.bool_()), *said]))
    text = [(name, pa.string()) for name in ("prompt", "completion", "text", "label", "separator", "tools")]
    place = [("source", pa.string()), ("file", pa.string()), ("line", pa.int64())]
    lists = [("messages", turns), ("chosen", turns), ("rejected", turns)]
    return pa.schema([*place, *lists, *text, ("desirable", pa.bool_())])


def to_batch(documents: list[Document]) -> pa.RecordBatch:
    """Documents as rows, in order.

    Put together from buffers, because `pa.array` imports pandas to see whether it is given pandas' own values.
    """
    import pyarrow as pa

    columns = []
    for field in schema():
        values = [getattr(document, field.name) for document in documents]
        columns.append(_column(field.type, values))
    return pa.RecordBatch.from_arrays(columns, schema=schema())


def _column(kind: pa.DataType, values: list[Any]) -> pa.Array:
    """Values of one type, None where there is none, as an array."""
    import pyarrow as pa

    if pa.types.is_list(kind):
        turns = [turn for value in values if value is not None for turn in value]
        fields = [kind.value_type.field(number) for number in range(kind.value_type.num_fields)]
        parts = [_column(field.type, [turn.get(field.name) for turn in turns]) for field in fields]
        inner = pa.StructArray.from_arrays(parts, fields=fields)
        lengths = [0 if value is None else len(value) for value in values]
        return pa.Array.from_buffers(kind, len(values), [_validity(values), _offsets(lengths)], children=[inner])
    if pa.types.is_string(kind):
        texts = [b"" if v is None else (v if isinstance(v, str) else _json(v)).encode("utf-8") for v in values]
        buffers = [_validity(values), _offsets([len(text) for text in texts]), pa.py_buffer(b"".join(texts))]
        return pa.Array.from_buffers(kind, len(values), buffers)
    if pa.types.is_boolean(kind):
        data = _bits([value is True for value in values])
    else:
        data = np.array([0 if value is None else value for value in values], kind.to_pandas_dtype())
    return pa.Array.from_buffers(kind, len(values), [_validity(values), pa.py_buffer(data)])


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _offsets(lengths: list[int]) -> pa.Buffer:
    import pyarrow as pa

    total = np.cumsum([0, *lengths], dtype=np.int64)
    if total[-1] > np.iinfo(np.int32).max:
        raise AssertionError(f"{total[-1]} bytes of one column are too much for one batch")
    return pa.py_buffer(total.astype(np.int32))


def _validity(values: list[Any]) -> pa.Buffer | None:
    """One bit for each value that is there; None where all are."""
    import pyarrow as pa

    there = [value is not None for value in values]
    return None if all(there) else pa.py_buffer(_bits(there))


def _bits(values: list[bool]) -> np.ndarray:
    return np.packbits(np.array(values, dtype=np.bool_), bitorder="little")


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
                fields[name] = [_turn(turn) for turn in fields[name]]
        tools = fields["tools"] and json.loads(fields["tools"])
        return Document(**{**fields, "separator": fields["separator"] or "", "tools": tools})


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    there = {name: value for name, value in turn.items() if value is not None}
    return {**there, "tool_calls": json.loads(there["tool_calls"])} if "tool_calls" in there else there


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
