"""Blocks of prepared rows, and `DatasetWriter`, which joins them into the data set.

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
from trainer.data.document import MAX_EXAMPLES, WRONG_KIND_REASON, InputId, PersonalDataFindings, RejectedRow, Tally
from trainer.data.fields import MAX_REMEMBERED_NAMES
from trainer.data.selection.splits import DocumentColumns
from trainer.data.store.documents import DOCUMENTS_FILE, document_schema
from trainer.data.store.sequences import LABEL, MARK_PREFIX, Sequences, StoreWriter, columns_with_prefix

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(slots=True)
class PreparedBlock:
    """What became of one `RowRange` (consecutive rows of a source) in the first pass of data preparation.

    That is its documents, their sequences of tokens, and counts of what was dropped.
    """

    number: int
    split: str
    source: str
    num_rows: int
    """Rows read."""
    num_rows_by_file: dict[str, int] = field(default_factory=dict)
    """Rows read, by file."""
    rejected_rows: list[RejectedRow] = field(default_factory=list)
    """Rows in quarantine, lost although no setting asked for it (but a check's `quarantine`): unreadable, refused by the chat
    template, or with nothing left to learn."""
    tally: Tally = field(default_factory=Tally)
    """What the stages dropped (rejected rows too) and noted."""
    documents: pa.RecordBatch | None = None
    """What is kept, as rows of `documents.arrow`."""
    row_numbers: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """int32 [documents]: `Document.row_number`, which the table does not have; 0 for none."""
    num_sequences_by_document: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64 [documents], each at least 1: more where a long document was split, and 2 for a pair of answers."""
    sequences: Sequences | None = None
    """The tokens of all documents, one document after another."""
    unread_columns: list[str] = field(default_factory=list)
    """Names of columns of the rows that nothing read."""
    label_names: list[str] = field(default_factory=list)
    """By the number that a label has in this block."""
    document_hashes: dict[str, np.ndarray] = field(default_factory=dict)
    """uint64 [documents] each, by name: by these, copies and leaks are found later, see `DocumentHasher`."""


LABEL_MARK_COLUMN = MARK_PREFIX + LABEL
QUARANTINE_FILE = "quarantine.jsonl"
DROPPED_FILE = "dropped.jsonl"
GIVE_UP_ROWS = 1000
"""Rejected rows after which a run that allows none (or fewer) stops reading."""
LOST_REASONS = {
    "nothing_to_learn": "no supervised token is within data.max_length={}: the answer starts later",
    "same_answers": "both answers are the same within data.max_length={}",
}
"""Reasons for which tokenising drops a document although nobody asked for it, each with its message."""
REMEDY_BY_REASON = {
    "nothing_to_learn": "raise data.max_length",
    "same_answers": "raise data.max_length",
    "control_tokens": "set data.control_tokens=text",
    "wrong_format": "give rows of each format as a source of its own (data.sources.one.path=... data.sources.two.path=...)",
}
"""The setting that keeps rows which were lost for a reason."""
_SPLIT_REMEDY = " or set data.over_length=split"
"""Added to the remedy of `nothing_to_learn` where the objective can learn from pieces of a document."""


@dataclass(slots=True)
class PreparationTotals:
    """Sums of what all blocks counted."""

    tally: Tally = field(default_factory=Tally)
    num_rows_by_input: Counter[InputId] = field(default_factory=Counter)
    """Rows read."""
    num_kept_by_input: Counter[InputId] = field(default_factory=Counter)
    """Documents kept."""
    num_rows_by_file: Counter[str] = field(default_factory=Counter)
    """Rows read."""
    first_rejected_rows: list[RejectedRow] = field(default_factory=list)
    """At most `MAX_EXAMPLES`, for error messages."""
    num_rejected_by_reason: Counter[str] = field(default_factory=Counter)
    """All rejected rows, by code: {"not_json": 3}."""
    unread_columns_by_source: dict[str, dict[str, None]] = field(default_factory=dict)
    """Names of columns that nothing read, in order of appearance (a dict as an ordered set)."""


class DatasetWriter:
    """Joins the blocks that workers prepared into one data set: writes them into a directory, in the order of the input.

    No more blocks come after `finish_documents`.
    """

    def __init__(self, directory: Path, max_bad_share: float, rejected_file: Path, *, advise_split: bool) -> None:
        """Open the files of a data set in `directory`, into which prepared blocks are written.

        `max_bad_share`: the largest share of rows that may be rejected. `rejected_file`: where the list of rejected rows is kept
        if the data is refused. `advise_split`: whether an error may advise `data.over_length=split`.
        """
        self.directory = directory
        self.max_bad_share = max_bad_share
        self.rejected_file = rejected_file
        self.advise_split = advise_split
        self.totals = PreparationTotals()
        import pyarrow as pa

        self.store = StoreWriter(directory)
        self._documents = pa.ipc.new_stream(str(directory / DOCUMENTS_FILE), document_schema())
        # Files of rejected rows and of dropped documents, written as they are found, so that memory does not grow with them.
        self._quarantine_file = (directory / QUARANTINE_FILE).open("w", encoding="utf-8")
        self._dropped_file = (directory / DROPPED_FILE).open("w", encoding="utf-8")
        self._split_numbers: dict[str, int] = {}
        self._source_numbers: dict[str, int] = {}
        self._label_numbers: dict[str, int] = {}
        """Numbers by name, in order of appearance, as those of splits and sources are."""
        self._arrays_by_document_column: dict[str, list[np.ndarray]] = {}
        """What is known of each document, by column name: one array [documents of the block] for each block so far."""
        self._num_documents = 0
        """Documents so far."""

    def append(self, block: PreparedBlock) -> None:
        """Write one prepared block to the data set: its rejected rows, dropped documents, documents and tokens.

        Blocks come in the order of the input. Each numbers its labels and documents from 0; here these become the numbers of
        the whole data set, in place, in the columns of `block.sequences`. Raises DataError as soon as too many rows are
        rejected.
        """
        self._add_to_totals(block)
        self._log_rejected_and_dropped(block)
        self._raise_if_too_many_rejected_so_far()

        assert block.sequences is not None and block.documents is not None
        num_documents = len(block.num_sequences_by_document)
        source = self._source_numbers.setdefault(block.source, len(self._source_numbers))
        document_numbers = np.arange(self._num_documents, self._num_documents + num_documents)
        # For each sequence, its document's row in `documents.arrow`; a document may have several sequences.
        block.sequences.columns["document"] = np.repeat(document_numbers, block.num_sequences_by_document)
        block.sequences.columns["source"] = np.full(len(block.sequences.lengths), source, np.int64)
        label_of_document = self._renumber_labels(block, block.sequences)
        self._append_document_columns(block, source, label_of_document)
        self._num_documents += num_documents

        # Tokens are written once, here; splits refer to them by number.
        self.store.append(block.sequences)
        if num_documents:
            self._documents.write_batch(block.documents)

    def _log_rejected_and_dropped(self, block: PreparedBlock) -> None:
        """Write a block's rejected rows to `quarantine.jsonl`, and all its dropped documents to `dropped.jsonl`.

        Rejected rows could not be used; dropped documents are these and the ones that a setting took out, such as a filter.
        """
        for rejected_row in block.rejected_rows:
            row_fields = {"source": block.source, **asdict(rejected_row)}
            if rejected_row.row_number is None:  # nearly always: the line is enough
                del row_fields["row_number"]
            self._quarantine_file.write(json.dumps(row_fields, ensure_ascii=False) + "\n")
        for stage, reason, location in block.tally.drops:
            self.log_drop(stage, reason, location)

    def _raise_if_too_many_rejected_so_far(self) -> None:
        """Stop reading early, by a DataError, if clearly more rows are rejected than `data.max_bad_share` allows.

        Nothing is decided before `GIVE_UP_ROWS` of them. Their share is then taken of at least ten times as many rows, since a
        share of the first few rows says little about the file.
        """
        num_rejected = self.totals.num_rejected_by_reason.total()
        num_rows = max(self.totals.num_rows_by_input.total(), 10 * GIVE_UP_ROWS)
        if num_rejected > GIVE_UP_ROWS and num_rejected > self.max_bad_share * num_rows:
            # Raises, because the share of the rows that were read is above the limit too.
            self._raise_if_too_many_rejected()

    def _renumber_labels(self, block: PreparedBlock, sequences: Sequences) -> np.ndarray:
        """Replace the label numbers of a block by those of the whole data set, in place, in the columns of `sequences`.

        A worker numbers the labels that it meets in its block alone (`block.label_names`). Here each name gets the number that
        it has in all blocks, or a new one.

        Returns the label number of each document, int64 [documents]; -1 for each if the data has no labels.
        """
        if LABEL_MARK_COLUMN not in sequences.columns:
            return np.full(len(block.num_sequences_by_document), -1, np.int64)
        global_number_by_block_number = []
        for name in block.label_names:
            global_number_by_block_number.append(self._label_numbers.setdefault(name, len(self._label_numbers)))
        block_numbers = sequences.columns[LABEL_MARK_COLUMN]
        label_of_sequence = np.array(global_number_by_block_number, np.int64)[block_numbers]
        sequences.columns[LABEL_MARK_COLUMN] = label_of_sequence
        # All sequences of a document have its label, so that the first one tells it.
        first_sequence_of_document = np.cumsum(block.num_sequences_by_document) - block.num_sequences_by_document
        return label_of_sequence[first_sequence_of_document]

    def _append_document_columns(self, block: PreparedBlock, source: int, label_of_document: np.ndarray) -> None:
        """Remember what is known of a block's documents, one number a document, for decisions that need the whole data set.

        These are split, source, number of sequences, label, and hashes by which copies and leaks are found.

        `source`: the number of the block's source. `label_of_document`: int64 [documents], -1 without a label.
        """
        num_documents = len(block.num_sequences_by_document)
        split = self._split_numbers.setdefault(block.split, len(self._split_numbers))
        document_columns = {
            # int16, since these stay in memory for all documents, and there are few splits and sources.
            "split": np.full(num_documents, split, np.int16),
            "source": np.full(num_documents, source, np.int16),
            "row_number": block.row_numbers,
            "num_sequences": block.num_sequences_by_document,
            "label": label_of_document,
        }
        for name, column in block.document_hashes.items():
            document_columns[f"signature.{name}"] = column
        for name, column in document_columns.items():
            self._arrays_by_document_column.setdefault(name, []).append(column)

    def _add_to_totals(self, block: PreparedBlock) -> None:
        """Add the counts of a block to `totals`, from which the report and error messages are made.

        Raises AssertionError if the rows that were read are not those kept and those dropped: then a stage lost a document.
        """
        totals = self.totals
        input_id = InputId(block.split, block.source)
        num_documents = len(block.num_sequences_by_document)
        totals.num_rows_by_input[input_id] += block.num_rows
        totals.num_kept_by_input[input_id] += num_documents
        num_dropped = len(block.tally.drops)
        if block.num_rows != num_documents + num_dropped:
            raise AssertionError(
                f"block {block.number}: {block.num_rows} rows in, {num_documents} kept, the rest unaccounted for"
            )
        totals.num_rows_by_file.update(block.num_rows_by_file)
        totals.tally.merge(block.tally)
        unread_columns = totals.unread_columns_by_source.setdefault(block.source, {})
        if len(unread_columns) < MAX_REMEMBERED_NAMES:  # rows may have a new column each
            unread_columns.update(dict.fromkeys(block.unread_columns))
        totals.num_rejected_by_reason.update(rejected_row.reason for rejected_row in block.rejected_rows)
        # Only the first few rejected rows are kept, as examples for error messages.
        num_examples_lacking = MAX_EXAMPLES - len(totals.first_rejected_rows)
        totals.first_rejected_rows += block.rejected_rows[:num_examples_lacking]

    def log_drop(self, stage: str, reason: str, location: str) -> None:
        """Write one dropped document down in `dropped.jsonl`. `location`: its `file:line`."""
        self._dropped_file.write(json.dumps({"where": location, "stage": stage, "reason": reason}) + "\n")

    def _raise_if_too_many_rejected(self) -> None:
        """Raise DataError if more rows are rejected than `data.max_bad_share` allows, or all are of the wrong kind.

        The wrong kind is one that the objective cannot learn from, such as plain text where it compares two answers. Before it
        raises, it copies the list of rejected rows (`quarantine.jsonl`) to `rejected_file`, because the data set's directory is
        about to be removed.
        """
        num_rejected_by_reason = self.totals.num_rejected_by_reason
        num_rows = self.totals.num_rows_by_input.total()
        num_rejected = num_rejected_by_reason.total()
        if not num_rows:
            return
        is_above_limit = num_rejected / num_rows > self.max_bad_share
        are_all_of_wrong_kind = num_rejected_by_reason[WRONG_KIND_REASON] >= num_rows
        if not is_above_limit and not are_all_of_wrong_kind:
            return
        self._quarantine_file.flush()
        self.rejected_file.parent.mkdir(parents=True, exist_ok=True)
        self.rejected_file.write_bytes((self.directory / QUARANTINE_FILE).read_bytes())
        counts = ", ".join(f"{reason} {count}" for reason, count in num_rejected_by_reason.most_common())
        exceeded_limit = f", more than data.max_bad_share={self.max_bad_share:g} allows" if is_above_limit else ""
        lines = "\n".join([*self._example_lines(num_rejected), self._advice(num_rejected, num_rows)])
        raise DataError(f"{num_rejected} of {num_rows} rows cannot be used ({counts}){exceeded_limit}:\n{lines}")

    def _example_lines(self, num_rejected: int) -> list[str]:
        """Write the lines of the error that show which rows cannot be used: the first with each message, and how many more.

        Only the first few rejected rows are remembered, but all are counted by reason; `num_rejected` is their number. The last
        line is, for example, "  ... and 12 more like it".
        """
        first_row_by_message: dict[str, RejectedRow] = {}
        for rejected_row in self.totals.first_rejected_rows:
            first_row_by_message.setdefault(rejected_row.message, rejected_row)
        lines = [f"  {rejected_row}" for rejected_row in first_row_by_message.values()]
        num_more = num_rejected - len(lines)
        if num_more > 0:
            are_all_alike = len(lines) == 1 and len(self.totals.num_rejected_by_reason) == 1
            lines.append(f"  ... and {num_more:,} more{' like it' if are_all_alike else ''}")
        return lines

    def _advice(self, num_rejected: int, num_rows: int) -> str:
        """Write the last line of the error about rejected rows: where all are listed, and what can be done about them.

        For example "full list: FILE; raise data.max_length, fix the data, or continue without them with data.max_bad_share=0.02".
        `num_rejected` of the `num_rows` that were read were rejected.
        """
        remedies = []
        for reason, remedy in REMEDY_BY_REASON.items():
            if reason in self.totals.num_rejected_by_reason:
                is_split_advised = self.advise_split and reason == "nothing_to_learn"
                remedies.append(remedy + _SPLIT_REMEDY if is_split_advised else remedy)
        # Two reasons may have one remedy.
        all_remedies = ", ".join([*dict.fromkeys(remedies), "fix the data"])
        advice = f"full list: {self.rejected_file}; {all_remedies}"
        if num_rejected < num_rows:
            sufficient_share = math.ceil(100 * num_rejected / num_rows) / 100
            advice += f", or continue without them with data.max_bad_share={sufficient_share:g}"
        return advice

    def finish_documents(self) -> DocumentColumns:
        """Close `documents.arrow` after the last block, and return what is known of every document, for the second pass.

        The second pass decides what needs the whole data set, such as copies and held-out splits. Call it once. Raises
        DataError if too many rows were rejected, or if there are no rows.
        """
        self._raise_if_too_many_rejected()
        self._documents.close()
        joined = {name: np.concatenate(arrays) for name, arrays in self._arrays_by_document_column.items()}
        if not joined:
            raise DataError("data.path: holds no rows")
        return DocumentColumns(
            split_numbers=joined["split"],
            source_numbers=joined["source"],
            num_sequences_by_document=joined["num_sequences"],
            label_numbers=joined["label"],
            row_numbers=joined["row_number"],
            document_hashes=columns_with_prefix(joined, "signature."),
            split_names=list(self._split_numbers),
            source_names=list(self._source_numbers),
            label_names=list(self._label_numbers),
        )

    def finish_store(self, label_ids: np.ndarray | None) -> None:
        """Write the tables of the store (offsets and columns of all sequences), close all files, and remove empty logs.

        `label_ids` (int64 [L]): the id that training uses for each label, by the number that it has so far; None without
        labels.
        """
        replaced_columns = {}  # written by the store in place of the column that it has gathered
        if label_ids is not None:
            replaced_columns[LABEL_MARK_COLUMN] = label_ids[self.store.column(LABEL_MARK_COLUMN)]
        self.close()
        self.store.finish(**replaced_columns)
        for name in (QUARANTINE_FILE, DROPPED_FILE):
            if not (self.directory / name).stat().st_size:
                (self.directory / name).unlink()

    def close(self) -> None:
        """Close the logs."""
        self._quarantine_file.close()
        self._dropped_file.close()


def save_block(block: PreparedBlock, path: Path) -> None:
    """Write a prepared block to an `.npz` file, so that another process can add it to the data set. Raises OSError.

    Used if the jobs of an array share the first pass of preparation; `load_block` reads the file. Arrays are entries of their
    own, and all the rest is one JSON text, the entry `about`. Keys keep the names of earlier versions: "pieces" is the number
    of sequences of each document, "bad" are rejected rows.
    """
    assert block.sequences is not None and block.documents is not None, "a worker has filled the block"
    json_fields = {
        "number": block.number,
        "split": block.split,
        "source": block.source,
        "rows": block.num_rows,
        "rows_of_file": block.num_rows_by_file,
        "bad": block.rejected_rows,
        "tally": block.tally,
        "unread": block.unread_columns,
        "labels": block.label_names,
    }
    arrays: dict[str, Any] = {
        "about": np.frombuffer(orjson.dumps(json_fields), np.uint8),
        "documents": np.frombuffer(block.documents.serialize(), np.uint8),
        "row_numbers": block.row_numbers,
        "pieces": block.num_sequences_by_document,
        "tokens": block.sequences.tokens,
        "supervised": block.sequences.supervised,
        "lengths": block.sequences.lengths,
    }
    if block.sequences.weights is not None:
        arrays["weights"] = block.sequences.weights
    for name, column in block.sequences.columns.items():
        arrays[f"column.{name}"] = column
    for name, column in block.document_hashes.items():
        arrays[f"signature.{name}"] = column
    np.savez(path, **arrays)


def load_block(path: Path) -> PreparedBlock:
    """Read a prepared block from the `.npz` file that `save_block` wrote, perhaps in another job. Keys are explained there.

    Without pickles, so that a file of somebody else cannot run code.
    """
    import pyarrow as pa

    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    json_fields = orjson.loads(arrays["about"].tobytes())
    tally_fields = json_fields["tally"]
    tally_fields["findings"] = PersonalDataFindings(**tally_fields["findings"])
    sequences = Sequences(
        tokens=arrays["tokens"],
        supervised=arrays["supervised"],
        lengths=arrays["lengths"],
        columns=columns_with_prefix(arrays, "column."),
        weights=arrays.get("weights"),
    )
    # The names of keys are older than those of the fields.
    return PreparedBlock(
        number=json_fields["number"],
        split=json_fields["split"],
        source=json_fields["source"],
        num_rows=json_fields["rows"],
        num_rows_by_file=json_fields["rows_of_file"],
        rejected_rows=[RejectedRow(**rejected_fields) for rejected_fields in json_fields["bad"]],
        tally=Tally(**tally_fields),
        unread_columns=json_fields["unread"],
        label_names=json_fields["labels"],
        # Shards of earlier versions have none.
        row_numbers=arrays.get("row_numbers", np.zeros(len(arrays["pieces"]), np.int32)),
        documents=pa.ipc.read_record_batch(pa.py_buffer(arrays["documents"]), document_schema()),
        num_sequences_by_document=arrays["pieces"],
        sequences=sequences,
        document_hashes=columns_with_prefix(arrays, "signature."),
    )
