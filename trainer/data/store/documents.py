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
TURN_COLUMNS = ("messages", "chosen", "rejected")
"""Columns that hold turns of conversations."""
JSON_COLUMNS = ("tools", "columns")
"""Columns that hold JSON texts, because their form differs from row to row."""


@cache
def document_schema() -> pa.Schema:
    """Make the Arrow schema of the table of documents, one row each; what a document does not have is null.

    Tools, tool calls and kept columns are JSON texts, because their form differs from row to row.
    """
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
            *((name, pa.list_(turn)) for name in TURN_COLUMNS),
            *texts("prompt", "completion", "text", "label", "separator", "tools", "columns"),
            ("desirable", pa.bool_()),
        ]
    )


def to_record_batch(documents: list[Document]) -> pa.RecordBatch:
    """Turn documents into rows of the table `documents.arrow`, in order, for reports and for comparisons of texts.

    By way of JSON, because `pa.array` imports pandas to see whether it is given pandas' own values.
    """
    from pyarrow import json as pyarrow_json

    # The reader refuses an empty text: without documents it reads one row, which is left out below.
    column_names = document_schema().names
    json_lines = b"\n".join(orjson.dumps(_as_table_row(document, column_names)) for document in documents) or b"{}"
    # One block, and so one batch.
    read_options = pyarrow_json.ReadOptions(use_threads=False, block_size=len(json_lines) + 1)
    parse_options = pyarrow_json.ParseOptions(explicit_schema=document_schema(), unexpected_field_behavior="error")
    (batch,) = pyarrow_json.read_json(io.BytesIO(json_lines), read_options, parse_options).to_batches()
    return batch.slice(0, len(documents))


def _as_table_row(document: Document, column_names: list[str]) -> dict[str, Any]:
    """Give a document the form of a row of `documents.arrow`: what it does not have is left out, nested fields are JSON texts.

    Nested are tools, tool calls and kept columns, whose form differs from row to row. `column_names`: the table's columns, which
    are attributes of a document.
    """
    row: dict[str, Any] = {}
    for name in column_names:
        value = getattr(document, name)
        if value is not None:
            row[name] = value
    for name in TURN_COLUMNS:
        if name in row:
            row[name] = [_with_json_text(turn, "tool_calls") for turn in row[name]]
    for name in JSON_COLUMNS:
        row = _with_json_text(row, name)  # as it is if it lacks the column
    return row


def _with_json_text(fields: dict[str, Any], name: str) -> dict[str, Any]:
    """A row or a turn, in which the field `name` is a JSON text: {"tools": [1]} -> {"tools": "[1]"}.

    A row or turn without such a field stays as it is.
    """
    if name not in fields:
        return fields
    return {**fields, name: json.dumps(fields[name], ensure_ascii=False)}


@dataclass
class DocumentTable:
    """The documents of a prepared data set by row number. The file is mapped: only the rows that are used are read."""

    directory: Path

    @cached_property
    def batches(self) -> list[pa.RecordBatch]:
        """All rows in order, mapped."""
        import pyarrow as pa

        return list(pa.ipc.open_stream(pa.memory_map(str(self.directory / DOCUMENTS_FILE))))

    @cached_property
    def _first_rows(self) -> np.ndarray:
        """int64 [batches]: the row that each batch begins with."""
        sizes = np.array([batch.num_rows for batch in self.batches], np.int64)
        return np.cumsum(sizes) - sizes

    def row(self, index: int) -> dict[str, Any]:
        """Read row `index` of the table as plain Python values, by column: null is None, and nested fields are still JSON texts.

        So {"file": "faq.jsonl", "line": 3, "messages": [...], "tools": "[...]", "text": None, ...}.
        """
        batch_index = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        index_in_batch = index - int(self._first_rows[batch_index])
        # A slice of one row: the rest of the batch is not turned into Python values.
        (row,) = self.batches[batch_index].slice(index_in_batch, 1).to_pylist()
        return dict(row)

    def document(self, index: int) -> Document:
        """Read row `index` of the table as the document that was written there, its nested fields parsed from JSON texts."""
        fields = self.row(index)
        for name in TURN_COLUMNS:
            if fields[name] is not None:
                fields[name] = [_turn_from_table(turn) for turn in fields[name]]
        for name in JSON_COLUMNS:
            if fields.get(name):  # data that an earlier version prepared has no kept columns
                fields[name] = json.loads(fields[name])
        fields["separator"] = fields["separator"] or ""  # null if the reader left the empty text out
        return Document(**fields)


def _turn_from_table(turn: dict[str, Any]) -> dict[str, Any]:
    """Give a turn of the table the form that documents have: nulls left out, the JSON text of its tool calls parsed."""
    message = {name: value for name, value in turn.items() if value is not None}
    if "tool_calls" in message:
        message["tool_calls"] = json.loads(message["tool_calls"])
    return message
