"""The prepared data on disk: flat memory-mapped arrays of tokens and supervision, and tables of sequences.

A store holds every tokenised sequence once, in the order of the input:
tokens.bin      int32, all sequences one after another
supervised.bin  uint8, the same length; 1 where the token is a training target
weights.bin     float32, the same length, only where some target weighs less than 1: what each token counts for in the loss
offsets.npy     int64 [S + 1], where each sequence begins
columns.npz     int64 [S] each: `supervised` (targets), `term.<name>` (counts of the objective; float64 sums of weights where
                there are some), `mark.<name>` (what else the objective must know of a sequence, such as its label),
                `document` (row of documents.arrow), `source` (its number), `ended` (1 where the last target is an end token)
A split is a directory inside it with `index.npy` (int64 [N]: which sequences, in order, repeats allowed) and its
manifest. A directory with both is a store read whole.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from mmap import mmap
from pathlib import Path
from typing import IO, Any

import numpy as np

from strategies.errors import DataError

WEIGHTS_FILE = "weights.bin"
WEIGHTS_PER_WRITE = 1 << 22
"""Tokens whose weights are written at a time."""
BYTES_PER_NUMBER = 8
"""Of a number in a column of a store."""
TERM_PREFIX = "term."
MARK_PREFIX = "mark."
LABEL = "label"
"""Mark: the number of a labelled text's label."""
REPLAY = "replay"
"""Mark: whether the source is marked `replay`."""
REFERENCE = "reference"
"""Mark: the log-probability of a sequence's targets under the model before training. It is attached to an open data set."""


@dataclass(slots=True)
class Sample:
    """One tokenised sequence: a document, or a piece of one."""

    input_ids: np.ndarray
    """int32 [n]."""
    supervised: np.ndarray
    """bool [n]: token i is a training target. Position 0 never counts, since nothing predicts it."""
    marks: dict[str, float] = field(default_factory=dict)
    """Numbers that the objective must know of the sequence beside its tokens, such as {"label": 2}; whole where they come from
    the prepared data."""
    weights: np.ndarray | None = None
    """float32 [n], above 0 where a token is a target: what it counts for in the loss. None: each target counts as 1."""

    def target_weights(self) -> np.ndarray | None:
        """What each target of the sequence counts for in the loss, float32 [targets]; None if each counts as 1.

        Unlike `weights`, which has a number for each token, it has one for each token that is a target.
        """
        if self.weights is None:
            return None
        # The first token is never a target.
        weights: np.ndarray = self.weights[1:][self.supervised[1:]]
        if (weights == 1).all():
            return None
        return weights

    def total_target_weight(self) -> float:
        """What the targets of the sequence count for in the loss, together: their number, or the sum of their weights.

        `math.fsum` rounds once, so that the sum is the same in any order.
        """
        weights = self.target_weights()
        if weights is None:
            return int(np.count_nonzero(self.supervised[1:]))
        return math.fsum(weights.tolist())

    def keep_spans(self, *spans: slice) -> Sample:
        """Make a shorter copy of the sequence: only these spans of its tokens, one after another, with the same marks.

        Tokens [5, 6, 7, 8] with the spans 0:1 and 2:4 become [5, 7, 8]. `marks` are numbers for the objective, such as a label.
        """

        def join_spans(values: np.ndarray) -> np.ndarray:
            return np.concatenate([values[span] for span in spans])

        supervised = join_spans(self.supervised)
        supervised[:1] = False  # nothing predicts the first token of what is left
        weights = None if self.weights is None else join_spans(self.weights)
        return Sample(join_spans(self.input_ids), supervised, dict(self.marks), weights)

    def answer_begin(self) -> int:
        """Position of the first learned token; the length of the sequence if none is learned (a filler)."""
        supervised_positions = np.flatnonzero(self.supervised)
        return int(supervised_positions[0]) if len(supervised_positions) else len(self.input_ids)


class TokenDataset:
    """A split of a prepared data set, opened read-only. Tokens are memory-mapped: opening costs nothing, whatever the size."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        """Open a split of a prepared data set, whose tokens are mapped from files that all splits share.

        `directory`: that of the split, or of a store, which is read whole. `manifest`: its facts, such as the fingerprint.
        """
        self.directory = directory
        self.manifest = manifest
        is_split = (directory / "index.npy").exists()
        store = directory.parent if is_split else directory
        # Where each sequence of the store begins, in tokens.
        offsets: np.ndarray = np.load(store / "offsets.npy")
        with np.load(store / "columns.npz") as table:
            columns = {name: table[name] for name in table.files}
        # All splits map the same files; a split has its own list of sequences only.
        self.tokens = _open_mapped(store / "tokens.bin", np.int32, int(offsets[-1]))
        self.supervised = _open_mapped(store / "supervised.bin", np.uint8, int(offsets[-1]))
        self.weights: np.ndarray | None = None
        if (store / WEIGHTS_FILE).exists():
            self.weights = _open_mapped(store / WEIGHTS_FILE, np.float32, int(offsets[-1]))
        # Read into memory: a few numbers for each sequence, while tokens stay on the disk.
        if is_split:
            # The numbers of the split's sequences, in the order in which it has them; some perhaps twice.
            index = np.load(directory / "index.npy")
        else:
            index = np.arange(len(offsets) - 1)
        self.starts: np.ndarray = offsets[:-1][index]
        """int64 [N]: where each sequence begins in `tokens`."""
        self.lengths: np.ndarray = np.diff(offsets)[index]
        """int64 [N], in tokens."""
        split_columns = {name: column[index] for name, column in columns.items()}
        self.num_supervised = split_columns["supervised"]
        self.counts = columns_with_prefix(split_columns, TERM_PREFIX)
        """[N] each, by term: int64, or float64 where they are sums of weights."""
        self.marks = columns_with_prefix(split_columns, MARK_PREFIX)
        """[N] each, by name: int64 as prepared, float32 if they were attached since (`attach_mark`)."""
        self.sources = split_columns["source"]
        """int64 [N]: number of each sequence's source in `manifest["sources"]`."""
        self.documents = split_columns["document"]
        """int64 [N]: row of `documents.arrow`."""
        self.num_ended = int(split_columns["ended"].sum())
        """Sequences whose last target is an end token."""

    @classmethod
    def open(cls, directory: Path) -> TokenDataset:
        """Open a finished split or store of prepared data. Raises DataError for one that is torn or missing.

        `directory`: that of a split, such as `train`, or one that is a store and a split at once.
        """
        directory = Path(directory)
        try:
            manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
            return cls(directory, manifest)
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise DataError(
                f"{directory} is no complete prepared data set ({error}); delete it to prepare it again"
            ) from error

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def fingerprint(self) -> str:
        """Identity of the content: sources, tokenizer, template, options and code version."""
        return str(self.manifest["fingerprint"])

    @property
    def source_names(self) -> list[str]:
        """Names of the sources, by number."""
        return list(self.manifest.get("sources", ()))

    def sample(self, index: int) -> Sample:
        """Tokens, targets, weights and marks of the tokenised sequence at position `index` (from 0) of this split.

        No token is copied: `input_ids` (int32 [n]), `supervised` (bool [n], True where a token is a training target) and
        `weights` (float32 [n], what a token counts for in the loss) are read-only views into the memory-mapped files. `weights`
        is None if the data set has none: each target counts as 1. `marks` are the sequence's numbers for the objective, such as
        {"label": 2}.

        Raises DataError if a mapped file has become shorter than when it was opened.
        """
        # To read a mapped page beyond the end of its file would kill the process with SIGBUS, which no `except` can catch.
        for mapped in (self.tokens, self.supervised):
            _check_not_cut_off(mapped)
        # All sequences lie one after another in the flat files; `starts` and `lengths` are in tokens.
        begin = int(self.starts[index])
        end = begin + int(self.lengths[index])
        marks = {name: column[index].item() for name, column in self.marks.items()}
        weights = None
        if self.weights is not None:
            weights = self.weights[begin:end]
        # Stored as uint8 of 0 and 1: the view as bool costs nothing.
        return Sample(self.tokens[begin:end], self.supervised[begin:end].view(np.bool_), marks, weights)

    def attach_mark(self, name: str, column: np.ndarray) -> None:
        """Give every sequence a further mark, float32 [N], that was computed since the data was prepared."""
        assert column.shape == self.lengths.shape, f"{name}: {column.shape} for {len(self)} sequences"
        self.marks[name] = column

    @property
    def labels(self) -> np.ndarray | None:
        """int64 [N]: number of each sequence's label; None where the data has none."""
        return self.marks.get(LABEL)


def columns_with_prefix(columns: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The columns whose names begin with `prefix`, by their names without it."""
    return {name.removeprefix(prefix): column for name, column in columns.items() if name.startswith(prefix)}


def exact_sum(counts: np.ndarray) -> float:
    """Sum the counts of sequences, such as their targets, by which a loss is divided.

    Counts are whole, or sums of weights. Floats are rounded once, so that their sum is the same in any order.
    """
    if counts.dtype.kind == "i":
        return int(counts.sum())
    return math.fsum(counts.tolist())


def sequence_numbers(documents: np.ndarray, num_sequences_by_document: np.ndarray) -> np.ndarray:
    """Find the sequences of documents, in the documents' order: int64; those of one document follow one another.

    `documents`: document numbers. `num_sequences_by_document`: int64 [D], of all documents. Documents [1, 0] have the sequences
    [1, 2, 0] if the three documents have 1, 2 and 1 sequences.
    """
    first_sequences = np.cumsum(num_sequences_by_document) - num_sequences_by_document
    return concatenated_ranges(first_sequences[documents], num_sequences_by_document[documents])


def concatenated_ranges(begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """int64: the ranges [begin, begin + size), one after another: begins [5, 0] with sizes [2, 3] give [5, 6, 0, 1, 2]."""
    # Where each range begins in the result.
    result_begins = np.cumsum(sizes) - sizes
    offsets_in_range = np.arange(sizes.sum()) - np.repeat(result_begins, sizes)
    return (np.repeat(begins, sizes) + offsets_in_range).astype(np.int64)


def _open_mapped(path: Path, dtype: type, count: int) -> np.ndarray:
    """Map a file of `count` numbers of type `dtype`, read-only. Raises ValueError if the file has another size: it is torn."""
    expected_bytes = count * np.dtype(dtype).itemsize
    if path.stat().st_size != expected_bytes:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {expected_bytes}")
    # An empty file cannot be mapped.
    if not expected_bytes:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def _check_not_cut_off(mapped: np.ndarray) -> None:
    """Raise DataError if the file behind a mapped array became shorter: reading there would kill the process (SIGBUS).

    `mapped`: an array that may be mapped; others, such as an empty one, pass.
    """
    if not isinstance(mapped, np.memmap) or not isinstance(mapped.base, mmap):
        return
    file_bytes = mapped.base.size()
    if file_bytes < mapped.nbytes:
        raise DataError(
            f"{mapped.filename}: was cut off from {mapped.nbytes} to {file_bytes} bytes while the run reads it; delete its "
            "directory, and the same command prepares the data again and continues"
        )


@dataclass(slots=True)
class Sequences:
    """The tokenised sequences of a block of documents, one after another in flat arrays, as workers hand them on."""

    tokens: np.ndarray
    """int32 [T]."""
    supervised: np.ndarray
    """uint8 [T]."""
    lengths: np.ndarray
    """int64 [s]."""
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    """int64 [s] each (counts may be float64), as in `columns.npz`."""
    weights: np.ndarray | None = None
    """float32 [T]; None if each target weighs 1."""

    @classmethod
    def from_samples(cls, samples: list[Sample], counts_of: Callable[[Sample], dict[str, float]]) -> Sequences:
        """Concatenate tokenised sequences into the flat arrays that are written to disk.

        `counts_of`: gives, for each term of the objective's loss, what a sequence adds to its denominator, such as {"loss": 12}.
        Columns of the result, one number a sequence: "supervised" (number of targets), "term.NAME" (these counts), "mark.NAME"
        (its marks, such as the number of its label).

        Changes the samples: the first token, which nothing predicts, becomes no target.
        """
        for sample in samples:
            sample.supervised[:1] = False
        columns = {"supervised": np.array([np.count_nonzero(sample.supervised) for sample in samples], np.int64)}
        counts_by_term: dict[str, list[float]] = {}
        for number, sample in enumerate(samples):
            for term, count in counts_of(sample).items():
                # A sequence whose counts lack a term adds 0 to it.
                counts_by_term.setdefault(term, [0] * len(samples))[number] = count
        for term, counts in counts_by_term.items():
            # Counts are whole unless turns have weights of their own. Whole numbers are summed without rounding.
            are_whole = all(isinstance(count, int) for count in counts)
            columns[TERM_PREFIX + term] = np.array(counts, np.int64 if are_whole else np.float64)

        mark_names: set[str] = set()
        for sample in samples:
            mark_names.update(sample.marks)
        for name in mark_names:
            columns[MARK_PREFIX + name] = np.array([sample.marks[name] for sample in samples], np.int64)
        return cls(
            tokens=_concatenate([sample.input_ids for sample in samples], np.int32),
            supervised=_concatenate([sample.supervised for sample in samples], np.uint8),
            lengths=np.array([len(sample.input_ids) for sample in samples], np.int64),
            columns=columns,
            weights=_token_weights(samples),
        )

    def stored_bytes(self) -> int:
        """How many bytes a store takes for these sequences, by which the room on the disk is checked before preparation."""
        bytes_per_token = 5 if self.weights is None else 9  # the id, the mask, and perhaps the weight
        # The writer adds three numbers for each sequence: its offset, its document and its source.
        bytes_per_sequence = (len(self.columns) + 3) * BYTES_PER_NUMBER
        return bytes_per_token * len(self.tokens) + bytes_per_sequence * len(self.lengths)


def _token_weights(samples: list[Sample]) -> np.ndarray | None:
    """What each token of the samples counts for in the loss, float32 [tokens of all], 0 where it is no target.

    None if each target counts as 1: then no weights are stored.
    """
    if all(sample.target_weights() is None for sample in samples):
        return None
    weights = []
    for sample in samples:
        if sample.weights is None:
            weights.append(sample.supervised)
        else:
            weights.append(sample.supervised * sample.weights)
    return _concatenate(weights, np.float32)


def _concatenate(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    """Arrays one after another, as `dtype`; empty if there are none, which numpy refuses."""
    if not arrays:
        return np.zeros(0, dtype)
    return np.concatenate(arrays).astype(dtype, copy=False)


class StoreWriter:
    """Appends blocks of sequences to a store directory, which must exist. Raises OSError where the disk fails."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lengths = array("q")
        self.columns: dict[str, array[int] | array[float]] = {}
        self._tokens_file: IO[bytes] = (directory / "tokens.bin").open("wb")
        self._mask_file: IO[bytes] = (directory / "supervised.bin").open("wb")
        self._weights_file: IO[bytes] | None = None

    def append(self, sequences: Sequences) -> None:
        """Write one block of sequences: their tokens and masks into files, their counts and marks into the columns.

        A column that first appears in a later block is 0 in earlier ones.
        """
        sequences_before = len(self.lengths)
        self._tokens_file.write(np.ascontiguousarray(sequences.tokens, dtype=np.int32).tobytes())
        self._mask_file.write(np.ascontiguousarray(sequences.supervised, dtype=np.uint8).tobytes())
        self._write_weights(sequences)
        self.lengths.frombytes(sequences.lengths.astype(np.int64).tobytes())
        for name, numbers in sequences.columns.items():
            column = self._prepare_column(name, numbers, sequences_before)
            dtype = np.int64 if column.typecode == "q" else np.float64  # the codes of `array`
            column.frombytes(numbers.astype(dtype).tobytes())

    def _prepare_column(self, name: str, numbers: np.ndarray, sequences_before: int) -> array[int] | array[float]:
        """Make a column ready for the numbers of a block: with a number for each of the `sequences_before` it.

        It is created if it is new, filled up with zeros for blocks that did not have it, and turned into floats if it was whole
        numbers and `numbers` are floats. The array codes: `q` is int64, `d` is float64.
        """
        column: array[int] | array[float] = self.columns.setdefault(name, array("q"))
        if numbers.dtype.kind == "f" and column.typecode == "q":
            column = self.columns[name] = array("d", column)
        num_missing = sequences_before - len(column)
        column.frombytes(bytes(8 * num_missing))  # 8 zero bytes are 0 in both types
        return column

    def _write_weights(self, sequences: Sequences) -> None:
        """Write what a block's tokens count for in the loss to `weights.bin`. Most data has no weights, and no such file.

        - Neither this block nor one before it has weights: nothing is written.
        - This is the first block that has some: the weights of all tokens before it are written too (targets weigh 1, others 0).
        - A block without weights after that: its targets weigh 1.
        """
        if self._weights_file is None:
            if sequences.weights is None:
                return
            self._weights_file = (self.directory / WEIGHTS_FILE).open("wb")
            self._write_weights_before(self._weights_file)
        weights = sequences.weights
        if weights is None:
            weights = sequences.supervised
        self._weights_file.write(weights.astype(np.float32).tobytes())

    def _write_weights_before(self, weights_file: IO[bytes]) -> None:
        """Write the weights of all tokens so far, whose blocks have none: 1 for a target, else 0, as `supervised.bin` has it."""
        self._mask_file.flush()
        num_tokens = int(sum(self.lengths))
        if not num_tokens:  # an empty file cannot be mapped
            return
        mask = np.memmap(self._mask_file.name, np.uint8, "r")[:num_tokens]
        for start in range(0, num_tokens, WEIGHTS_PER_WRITE):
            weights_file.write(mask[start : start + WEIGHTS_PER_WRITE].astype(np.float32).tobytes())

    def column(self, name: str) -> np.ndarray:
        """A column of all sequences appended so far, int64 or float64 [S]; 0 for sequences of blocks that did not have it."""
        numbers = np.array(self.columns.get(name, array("q")))
        num_missing = len(self.lengths) - len(numbers)
        return np.concatenate([numbers, np.zeros(num_missing, numbers.dtype)])

    def finish(self, **replaced_columns: np.ndarray) -> None:
        """Complete the store after the last block: write `offsets.npy` and `columns.npz` beside the tokens, and close all files.

        `replaced_columns` (int64 [S]) take the place of the columns of these names that were appended, such as final label ids.
        """
        columns = {name: self.column(name) for name in self.columns} | replaced_columns
        lengths = np.frombuffer(self.lengths, dtype=np.int64)
        # One more than there are sequences: the last offset is the end of all tokens.
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        for file in (self._tokens_file, self._mask_file, self._weights_file):
            if file is not None:
                file.close()
        np.save(self.directory / "offsets.npy", offsets.astype(np.int64))
        np.savez(self.directory / "columns.npz", **columns)  # type: ignore[arg-type]
