"""Blocks of prepared rows, and `Assembly`, which joins them into the data set.

The result for a block depends on its rows and the settings alone, so any number of workers makes the same data set. Blocks
arrive in input order. Documents and their origins are written to disk once. Memory holds only columns of numbers, so the data
may be larger than memory.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from strategies.errors import DataError
from trainer.data.document import MAX_EXAMPLES, WRONG_KIND_REASON, Findings, RejectedRow, Tally
from trainer.data.fields import MAX_REMEMBERED_NAMES
from trainer.data.selection.splits import DocumentColumns
from trainer.data.store.documents import DOCUMENTS_FILE, schema
from trainer.data.store.sequences import LABEL, MARK_PREFIX, Sequences, StoreWriter, columns_with_prefix

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(slots=True)
class PreparedBlock:
    """What became of one `RowRange`: its documents, their sequences, and counts of what was dropped."""

    number: int
    split: str
    source: str
    rows: int
    """Rows read."""
    rows_of_file: dict[str, int] = field(default_factory=dict)
    """Rows read, by file."""
    bad: list[RejectedRow] = field(default_factory=list)
    """Rows in quarantine, lost although no setting asked for it (but a check's `quarantine`): unreadable, refused by the chat
    template, or with nothing left to learn."""
    tally: Tally = field(default_factory=Tally)
    documents: pa.RecordBatch | None = None
    """What is kept, as rows of `documents.arrow`, with `pieces[i]` sequences of document i."""
    pieces: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    sequences: Sequences | None = None
    unread: list[str] = field(default_factory=list)
    """Columns that nothing read."""
    labels: list[str] = field(default_factory=list)
    """Label names in the block's own numbering."""
    signatures: dict[str, np.ndarray] = field(default_factory=dict)
    """Columns by document, see `trainer.data.selection.signatures.Signer`."""


LABEL_COLUMN = MARK_PREFIX + LABEL
QUARANTINE = "quarantine.jsonl"
DROPPED = "dropped.jsonl"
GIVE_UP_ROWS = 1000
"""Bad rows after which a run that allows none (or fewer) stops reading."""
LOST_REASONS = {
    "nothing_to_learn": "no supervised token is within data.max_length={}: the answer starts later",
    "same_answers": "both answers are the same within data.max_length={}",
}
"""Reasons for which tokenising drops a document although nobody asked for it, each with its message."""
REMEDIES = {
    "nothing_to_learn": "raise data.max_length or set data.over_length=split",
    "same_answers": "raise data.max_length",
    "control_tokens": "set data.control_tokens=text",
    "wrong_format": "give rows of each format as a source of its own (data.sources.one.path=... data.sources.two.path=...)",
}
"""The setting that keeps rows which were lost for a reason."""


@dataclass(slots=True)
class PreparationTotals:
    """Sums of what all blocks counted."""

    tally: Tally = field(default_factory=Tally)
    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Rows read, by (split, source)."""
    kept: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Documents kept, by (split, source)."""
    rows_of_file: Counter[str] = field(default_factory=Counter)
    bad: list[RejectedRow] = field(default_factory=list)
    """The first few bad rows."""
    bad_reasons: Counter[str] = field(default_factory=Counter)
    """How many rows were bad, by reason."""
    unread: dict[str, dict[str, None]] = field(default_factory=dict)
    """Columns that nothing read, by source, in order of appearance."""


class Assembly:
    """Writes blocks into a directory, in input order. `columns` gives what was kept; no more blocks after it.

    `rejected_file`: where the list of bad rows is kept if the data is refused. `advise_split`: whether an error may advise
    `data.over_length=split`.
    """

    def __init__(self, directory: Path, max_bad_share: float, rejected_file: Path, *, advise_split: bool) -> None:
        self.directory = directory
        self.max_bad_share = max_bad_share
        self.rejected_file = rejected_file
        self.advise_split = advise_split
        self.totals = PreparationTotals()
        import pyarrow as pa

        self.store = StoreWriter(directory)
        self._documents = pa.ipc.new_stream(str(directory / DOCUMENTS_FILE), schema())
        # Written as rows are found, so that memory does not grow with bad rows.
        self._quarantine = (directory / QUARANTINE).open("w", encoding="utf-8")
        self._dropped = (directory / DROPPED).open("w", encoding="utf-8")
        self._split_numbers: dict[str, int] = {}
        self._source_numbers: dict[str, int] = {}
        self._label_numbers: dict[str, int] = {}
        """Numbers by name, in order of appearance, as those of splits and sources are."""
        self._columns: dict[str, list[np.ndarray]] = {}
        """Columns of documents by name, in one array a block."""
        self._num_documents = 0
        """Documents so far."""

    def append(self, block: PreparedBlock) -> None:
        """Write one block: its bad rows, dropped documents, documents and tokens. Changes columns of `block.sequences` in place.

        Blocks number labels and documents from 0; here these become the numbers of the whole data set. Raises DataError as soon
        as too many rows are bad.
        """
        self._add_to_totals(block)
        for bad_row in block.bad:
            self._quarantine.write(json.dumps({"source": block.source, **asdict(bad_row)}, ensure_ascii=False) + "\n")
        for drop in block.tally.drops:
            self.log_drop(*drop)
        self._raise_if_too_many_bad_so_far()

        assert block.sequences is not None and block.documents is not None
        num_documents = len(block.pieces)
        source = self._source_numbers.setdefault(block.source, len(self._source_numbers))
        labels = self._renumber_labels(block, block.sequences)
        sequence_columns = block.sequences.columns
        document_numbers = np.arange(self._num_documents, self._num_documents + num_documents)
        sequence_columns["document"] = np.repeat(document_numbers, block.pieces)
        sequence_columns["source"] = np.full(len(block.sequences.lengths), source, np.int64)
        self._num_documents += num_documents
        self._append_document_columns(block, source, labels)

        # Tokens are written once, here; splits refer to them by number.
        self.store.append(block.sequences)
        if num_documents:
            self._documents.write_batch(block.documents)

    def _raise_if_too_many_bad_so_far(self) -> None:
        """Raise DataError if clearly more rows are bad than the run allows, although not all rows are read yet.

        Nothing is decided before there are `GIVE_UP_ROWS` bad rows. The share of bad ones is then taken of at least ten times as
        many rows, since a share of the first few rows says little about the file.
        """
        num_bad = self.totals.bad_reasons.total()
        num_rows = max(self.totals.rows.total(), 10 * GIVE_UP_ROWS)
        if num_bad > GIVE_UP_ROWS and num_bad > self.max_bad_share * num_rows:
            self._raise_if_too_many_bad()

    def _renumber_labels(self, block: PreparedBlock, sequences: Sequences) -> np.ndarray:
        """Give a block's labels their numbers in the whole data set, in place. Returns them: int64 [documents], -1 for none."""
        if LABEL_COLUMN not in sequences.columns:
            return np.full(len(block.pieces), -1, np.int64)
        # By the block's own number of a label, its number in the whole data set.
        global_numbers = []
        for name in block.labels:
            global_numbers.append(self._label_numbers.setdefault(name, len(self._label_numbers)))
        label_of_sequence = np.array(global_numbers, np.int64)[sequences.columns[LABEL_COLUMN]]
        sequences.columns[LABEL_COLUMN] = label_of_sequence
        # All sequences of a document have its label, so that the first one tells it.
        first_sequence_of_document = np.cumsum(block.pieces) - block.pieces
        return label_of_sequence[first_sequence_of_document]

    def _append_document_columns(self, block: PreparedBlock, source: int, labels: np.ndarray) -> None:
        """Add the columns of a block's documents, one entry a document, to those of earlier blocks."""
        num_documents = len(block.pieces)
        split = self._split_numbers.setdefault(block.split, len(self._split_numbers))
        document_columns = {
            "split": np.full(num_documents, split, np.int16),
            "source": np.full(num_documents, source, np.int16),
            "pieces": block.pieces,
            "label": labels,
        }
        for name, column in block.signatures.items():
            document_columns[f"signature.{name}"] = column
        for name, column in document_columns.items():
            self._columns.setdefault(name, []).append(column)

    def _add_to_totals(self, block: PreparedBlock) -> None:
        """Add the counts of a block to `totals`, which are for the report.

        Raises AssertionError if the rows read are not those kept and those dropped.
        """
        totals = self.totals
        input_id = (block.split, block.source)
        num_documents = len(block.pieces)
        totals.rows[input_id] += block.rows
        totals.kept[input_id] += num_documents
        if block.rows != num_documents + len(block.tally.drops):
            raise AssertionError(
                f"block {block.number}: {block.rows} rows in, {num_documents} kept, the rest unaccounted for"
            )
        totals.rows_of_file.update(block.rows_of_file)
        totals.tally.merge(block.tally)
        unread_names = totals.unread.setdefault(block.source, {})
        if len(unread_names) < MAX_REMEMBERED_NAMES:
            unread_names.update(dict.fromkeys(block.unread))
        totals.bad_reasons.update(bad_row.reason for bad_row in block.bad)
        num_examples_lacking = MAX_EXAMPLES - len(totals.bad)
        totals.bad += block.bad[:num_examples_lacking]

    def log_drop(self, stage: str, reason: str, location: str) -> None:
        """Write one dropped document down in `dropped.jsonl`."""
        self._dropped.write(json.dumps({"where": location, "stage": stage, "reason": reason}) + "\n")

    def _raise_if_too_many_bad(self) -> None:
        """Raise DataError if too many rows are bad, or all are of a kind that the objective cannot learn from.

        Writes the list of bad rows to `rejected_file` first, because the data set's directory is about to be removed.
        """
        reasons = self.totals.bad_reasons
        num_rows = self.totals.rows.total()
        num_bad = reasons.total()
        if not num_rows:
            return
        is_above_limit = num_bad / num_rows > self.max_bad_share
        are_all_of_wrong_kind = reasons[WRONG_KIND_REASON] >= num_rows
        if not is_above_limit and not are_all_of_wrong_kind:
            return
        self._quarantine.flush()
        self.rejected_file.parent.mkdir(parents=True, exist_ok=True)
        self.rejected_file.write_bytes((self.directory / QUARANTINE).read_bytes())
        counts = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        allowed = f", more than data.max_bad_share={self.max_bad_share:g} allows" if is_above_limit else ""
        lines = "\n".join([*self._example_lines(num_bad), self._advice(num_bad, num_rows)])
        raise DataError(f"{num_bad} of {num_rows} rows cannot be used ({counts}){allowed}:\n{lines}")

    def _example_lines(self, num_bad: int) -> list[str]:
        """Lines of the error: the first bad row of each message, and how many more there are of all `num_bad`."""
        reasons = self.totals.bad_reasons
        first_row_by_message: dict[str, RejectedRow] = {}
        for bad_row in self.totals.bad:
            first_row_by_message.setdefault(bad_row.message, bad_row)
        lines = [f"  {bad_row}" for bad_row in first_row_by_message.values()]
        num_more = num_bad - len(lines)
        if num_more > 0:
            are_all_alike = len(lines) == len(reasons) == 1
            lines.append(f"  ... and {num_more:,} more{' like it' if are_all_alike else ''}")
        return lines

    def _advice(self, num_bad: int, num_rows: int) -> str:
        """The last line of the error: where all bad rows are listed, and what can be done about them."""
        remedies = [remedy for reason, remedy in REMEDIES.items() if reason in self.totals.bad_reasons]
        if not self.advise_split:
            remedies = [remedy.removesuffix(" or set data.over_length=split") for remedy in remedies]
        steps = ", ".join([*dict.fromkeys(remedies), "fix the data"])
        advice = f"full list: {self.rejected_file}; {steps}"
        if num_bad < num_rows:
            sufficient_share = math.ceil(100 * num_bad / num_rows) / 100
            advice += f", or continue without them with data.max_bad_share={sufficient_share:g}"
        return advice

    def columns(self) -> DocumentColumns:
        """What is known of every document, once the last block is written. Closes `documents.arrow`: call it once.

        Raises DataError if too many rows were bad, or if there are no rows.
        """
        self._raise_if_too_many_bad()
        self._documents.close()
        joined = {name: np.concatenate(arrays) for name, arrays in self._columns.items()}
        if not joined:
            raise DataError("data.path: holds no rows")
        return DocumentColumns(
            split=joined["split"],
            source=joined["source"],
            pieces=joined["pieces"],
            label=joined["label"],
            signatures=columns_with_prefix(joined, "signature."),
            splits=list(self._split_numbers),
            sources=list(self._source_numbers),
            labels=list(self._label_numbers),
        )

    def finish(self, label_ids: np.ndarray | None) -> None:
        """Write the tables of the store and close all files. Removes logs that are empty.

        `label_ids` (int64 [L]): the final id of each label, by the number that it has so far; None without labels.
        """
        replaced_columns = {}
        if label_ids is not None:
            replaced_columns[LABEL_COLUMN] = label_ids[self.store.column(LABEL_COLUMN)]
        self.close()
        self.store.finish(**replaced_columns)
        for name in (QUARANTINE, DROPPED):
            if not (self.directory / name).stat().st_size:
                (self.directory / name).unlink()

    def close(self) -> None:
        """Close the logs."""
        self._quarantine.close()
        self._dropped.close()


_JSON_FIELDS = ("number", "split", "source", "rows", "rows_of_file", "unread", "labels")
"""Fields of a block that JSON can hold as they are."""


def save_block(block: PreparedBlock, path: Path) -> None:
    """Write a block to an `.npz` file, for another job, which reads it with `load_block`. Raises OSError."""
    assert block.sequences is not None and block.documents is not None, "a worker has filled the block"
    json_fields = {name: getattr(block, name) for name in (*_JSON_FIELDS, "bad", "tally")}
    arrays: dict[str, Any] = {
        "about": np.frombuffer(orjson.dumps(json_fields), np.uint8),
        "documents": np.frombuffer(block.documents.serialize(), np.uint8),
        "pieces": block.pieces,
        "tokens": block.sequences.tokens,
        "supervised": block.sequences.supervised,
        "lengths": block.sequences.lengths,
    }
    if block.sequences.weights is not None:
        arrays["weights"] = block.sequences.weights
    for name, column in block.sequences.columns.items():
        arrays[f"column.{name}"] = column
    for name, column in block.signatures.items():
        arrays[f"signature.{name}"] = column
    np.savez(path, **arrays)


def load_block(path: Path) -> PreparedBlock:
    """Read a block that `save_block` wrote."""
    import pyarrow as pa

    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    json_fields = orjson.loads(arrays["about"].tobytes())
    tally_fields = json_fields["tally"]
    tally_fields["findings"] = Findings(**tally_fields["findings"])
    sequences = Sequences(
        tokens=arrays["tokens"],
        supervised=arrays["supervised"],
        lengths=arrays["lengths"],
        columns=columns_with_prefix(arrays, "column."),
        weights=arrays.get("weights"),
    )
    return PreparedBlock(
        **{name: json_fields[name] for name in _JSON_FIELDS},
        bad=[RejectedRow(**rejected_fields) for rejected_fields in json_fields["bad"]],
        tally=Tally(**tally_fields),
        documents=pa.ipc.read_record_batch(pa.py_buffer(arrays["documents"]), schema()),
        pieces=arrays["pieces"],
        sequences=sequences,
        signatures=columns_with_prefix(arrays, "signature."),
    )
