"""`documents.arrow`: the cleaned documents as an Arrow table that `datasets.Dataset.from_file` opens, memory-mapped."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from trainer.data.document import Document

if TYPE_CHECKING:
    import pyarrow as pa

DOCUMENTS_FILE = "documents.arrow"
TURNS = ("messages", "chosen", "rejected")


@cache
def schema() -> pa.Schema:
    """The columns; what a document does not have is null. Tools and calls of tools are JSON texts."""
    import pyarrow as pa

    def texts(*names: str) -> list[tuple[str, pa.DataType]]:
        return [(name, pa.string()) for name in names]

    turn = pa.struct(
        [
            *texts("role", "content"),
            ("train", pa.bool_()),
            ("weight", pa.float64()),
            *texts("reasoning_content", "tool_calls", "name", "tool_call_id"),
        ]
    )
    return pa.schema(
        [
            *texts("source", "file"),
            ("line", pa.int64()),
            *((name, pa.list_(turn)) for name in TURNS),
            *texts("prompt", "completion", "text", "label", "separator", "tools"),
            ("desirable", pa.bool_()),
        ]
    )


def to_batch(documents: list[Document]) -> pa.RecordBatch:
    """Documents as rows, in order.

    By way of JSON, because `pa.array` imports pandas to see whether it is given pandas' own values.
    """
    from pyarrow import json as reader

    json_lines = b"\n".join(orjson.dumps(_row(document)) for document in documents) or b"{}"
    read = reader.ReadOptions(use_threads=False, block_size=len(json_lines) + 1)  # one block is one batch
    parse = reader.ParseOptions(explicit_schema=schema(), unexpected_field_behavior="error")
    (batch,) = reader.read_json(io.BytesIO(json_lines), read, parse).to_batches()
    return batch.slice(0, len(documents))


def _row(document: Document) -> dict[str, Any]:
    """A document as a row of the table."""
    row: dict[str, Any] = {}
    for name in schema().names:
        field = getattr(document, name)
        if field is not None:
            row[name] = field
    for name in TURNS:
        if name in row:
            row[name] = [_with_json_text(turn, "tool_calls") for turn in row[name]]
    return _with_json_text(row, "tools")


def _with_json_text(part: dict[str, Any], name: str) -> dict[str, Any]:
    """A row or a turn with its `name`, if it has that, as a JSON text."""
    if name not in part:
        return part
    return {**part, name: json.dumps(part[name], ensure_ascii=False)}


@dataclass
class DocumentTable:
    """The documents of a prepared data set by row number. The file is mapped: only the rows that are used are read."""

    directory: Path

    @cached_property
    def _batches(self) -> tuple[list[pa.RecordBatch], np.ndarray]:
        """The batches, mapped, and the row that each begins with."""
        import pyarrow as pa

        batches = list(pa.ipc.open_stream(pa.memory_map(str(self.directory / DOCUMENTS_FILE))))
        sizes = np.array([batch.num_rows for batch in batches], np.int64)
        return batches, np.cumsum(sizes) - sizes

    @property
    def batches(self) -> list[pa.RecordBatch]:
        """All rows in order, mapped."""
        return self._batches[0]

    def row(self, index: int) -> dict[str, Any]:
        """Row `index` as plain Python values."""
        batches, starts = self._batches
        batch = int(np.searchsorted(starts, index, side="right")) - 1
        # A slice of one row: the rest of the batch is not turned into Python values.
        (row,) = batches[batch].slice(index - int(starts[batch]), 1).to_pylist()
        return dict(row)

    def document(self, index: int) -> Document:
        """Row `index` as a document."""
        fields = self.row(index)
        for name in TURNS:
            if fields[name] is not None:
                fields[name] = [_turn(turn) for turn in fields[name]]
        # Texts of JSON in the table, see `schema`.
        tools = fields["tools"] and json.loads(fields["tools"])
        return Document(**{**fields, "separator": fields["separator"] or "", "tools": tools})


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn of the table as a document has it: nulls left out, calls parsed."""
    message = {name: field for name, field in turn.items() if field is not None}
    if "tool_calls" in message:
        message["tool_calls"] = json.loads(message["tool_calls"])
    return message
