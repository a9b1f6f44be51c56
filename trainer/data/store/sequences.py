"""The prepared data on disk: flat memory-mapped arrays of tokens and supervision, and tables of sequences.

A store holds every tokenised sequence once, in the order of the input:
tokens.bin      int32, all sequences one after another
supervised.bin  uint8, the same length; 1 where the token is a training target
offsets.npy     int64 [S + 1], where each sequence begins
columns.npz     int64 [S] each: `supervised` (targets), `term.<name>` (counts of the objective), `document` (row of
                documents.arrow), `source` (its number), `ended` (1 where the last target is an end token), and `label` for
                labelled data
A split is a directory inside it with `index.npy` (int64 [N]: which sequences, in order, repeats allowed) and its
manifest. A directory with both is a store read whole.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from strategies.errors import DataError, StorageError

TERM_PREFIX = "term."
DESIRABLE, UNDESIRABLE, REPLAY = "desirable", "undesirable", "replay"
"""Counts that also tell what a sequence is: an answer with its verdict, or a document of a `replay` source."""


@dataclass(slots=True)
class Sample:
    """One tokenised sequence: a document, or a piece of one."""

    input_ids: np.ndarray
    """int32 [n]."""
    supervised: np.ndarray
    """bool [n]: token i is a training target. Position 0 never counts, since nothing predicts it."""
    label: int | None = None
    """Class number, for labelled data."""
    rejected: bool = False
    """Whether it is the answer of a pair that was not preferred; told while data is prepared."""
    reference: float | None = None
    """Log-probability of its supervised tokens under the model before training, where that was recorded."""
    desirable: bool | None = None
    """The verdict on its answer, for objectives over rated answers."""
    replay: bool | None = None
    """Whether it comes from a source marked `replay`; None where no source is."""


class TokenDataset:
    """A split of a prepared data set, opened read-only. Tokens are memory-mapped: opening costs nothing, whatever the size."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest
        is_split = (directory / "index.npy").exists()
        store = directory.parent if is_split else directory
        offsets: np.ndarray = np.load(store / "offsets.npy")
        with np.load(store / "columns.npz") as table:
            columns = {name: table[name] for name in table.files}
        self.tokens = _map(store / "tokens.bin", np.int32, int(offsets[-1]))
        self.supervised = _map(store / "supervised.bin", np.uint8, int(offsets[-1]))
        index = np.load(directory / "index.npy") if is_split else np.arange(len(offsets) - 1)
        self.starts: np.ndarray = offsets[:-1][index]
        """int64 [N]: where each sequence begins in `tokens`."""
        self.lengths: np.ndarray = np.diff(offsets)[index]
        """int64 [N], in tokens."""
        self.num_supervised: np.ndarray = columns["supervised"][index]
        self.counts: dict[str, np.ndarray] = {
            name.removeprefix(TERM_PREFIX): column[index]
            for name, column in columns.items()
            if name.startswith(TERM_PREFIX)
        }
        self.labels: np.ndarray | None = columns["label"][index] if "label" in columns else None
        self.sources: np.ndarray | None = columns["source"][index] if "source" in columns else None
        """int64 [N]: number of each sequence's source in `manifest["sources"]`."""
        self.documents: np.ndarray | None = columns["document"][index] if "document" in columns else None
        """int64 [N]: row of `documents.arrow`."""
        self.num_ended = int(columns["ended"][index].sum()) if "ended" in columns else 0
        """Sequences whose last target is an end token."""
        self.reference: np.ndarray | None = None
        """float32 [N], set by who has computed it (`trainer/objectives/reference.py`): see `Sample.reference`."""
        self.reference_mismatched: np.ndarray | None = None
        """float32 [N], the same of the sequences of `trainer/data/rated.py:mismatched`."""

    @classmethod
    def open(cls, directory: Path) -> TokenDataset:
        """Open a finished split or store. Raises DataError for one that is torn or missing."""
        directory = Path(directory)
        try:
            manifest = json.loads((directory / "manifest.json").read_text())
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
        """Sequence `index`, as views into the mapped arrays."""
        begin = int(self.starts[index])
        end = begin + int(self.lengths[index])
        label = None if self.labels is None else int(self.labels[index])
        reference = None if self.reference is None else float(self.reference[index])
        marks = {
            key: bool(self.counts[term][index])
            for key, term in (("desirable", DESIRABLE), ("replay", REPLAY))
            if term in self.counts
        }
        return Sample(
            self.tokens[begin:end],
            self.supervised[begin:end].view(np.bool_),
            label=label,
            reference=reference,
            **marks,
        )


def _map(path: Path, dtype: type, count: int) -> np.ndarray:
    wanted = count * np.dtype(dtype).itemsize
    if path.stat().st_size != wanted:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {wanted}")
    return np.memmap(path, dtype=dtype, mode="r") if wanted else np.zeros(0, dtype=dtype)


@dataclass(slots=True)
class Sequences:
    """Tokenised sequences of a block, flat, as workers hand them on."""

    tokens: np.ndarray
    """int32 [T]."""
    supervised: np.ndarray
    """uint8 [T]."""
    lengths: np.ndarray
    """int64 [s]."""
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    """int64 [s] each, as in `columns.npz`."""

    @classmethod
    def of(cls, samples: list[Sample], counts: Callable[[Sample], dict[str, int]]) -> Sequences:
        """Samples, one after another, with the counts of the objective; the first token of none is a target."""
        for sample in samples:
            sample.supervised[:1] = False
        terms: dict[str, np.ndarray] = {}
        for number, sample in enumerate(samples):
            for term, count in counts(sample).items():
                terms.setdefault(TERM_PREFIX + term, np.zeros(len(samples), np.int64))[number] = count
        labels = [sample.label for sample in samples]
        if any(label is not None for label in labels):
            if None in labels:
                raise ValueError("some samples have a label and some have none")
            terms["label"] = np.array(labels, np.int64)
        return cls(
            tokens=_joined([sample.input_ids for sample in samples], np.int32),
            supervised=_joined([sample.supervised for sample in samples], np.uint8),
            lengths=np.array([len(sample.input_ids) for sample in samples], np.int64),
            columns={"supervised": np.array([int(s.supervised.sum()) for s in samples], np.int64), **terms},
        )


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)


class StoreWriter:
    """Appends blocks of sequences to a store directory, which must exist. Raises StorageError where the disk fails."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lengths = array("q")
        self.columns: dict[str, array[int]] = {}
        self._tokens: IO[bytes] = (directory / "tokens.bin").open("wb")
        self._mask: IO[bytes] = (directory / "supervised.bin").open("wb")

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self._tokens.close()
            self._mask.close()
        except OSError as failure:
            if error is None:
                raise storage_error(self.directory, failure) from failure

    def append(self, sequences: Sequences) -> None:
        """Write one block; a column that first appears late is zero before."""
        before = len(self.lengths)
        try:
            self._tokens.write(np.ascontiguousarray(sequences.tokens, dtype=np.int32).tobytes())
            self._mask.write(np.ascontiguousarray(sequences.supervised, dtype=np.uint8).tobytes())
        except OSError as error:
            raise storage_error(self.directory, error) from error
        self.lengths.frombytes(sequences.lengths.astype(np.int64).tobytes())
        for name, values in sequences.columns.items():
            column = self.columns.setdefault(name, array("q", bytes(8 * before)))
            column.frombytes(bytes(8 * (before - len(column))) + values.astype(np.int64).tobytes())

    def column(self, name: str) -> np.ndarray:
        """int64 [S] of what was appended so far; zeros where no block had it."""
        made = np.frombuffer(self.columns.get(name, array("q")), dtype=np.int64)
        return np.concatenate([made, np.zeros(len(self.lengths) - len(made), np.int64)])

    def finish(self, **replaced: np.ndarray) -> None:
        """Write the tables; `replaced` columns (int64 [S]) take the place of those appended."""
        columns = {name: self.column(name) for name in self.columns} | replaced
        offsets = np.concatenate([[0], np.cumsum(np.frombuffer(self.lengths, dtype=np.int64))])
        try:
            self._tokens.flush()
            self._mask.flush()
            np.save(self.directory / "offsets.npy", offsets.astype(np.int64))
            np.savez(self.directory / "columns.npz", **columns)  # type: ignore[arg-type]
        except OSError as error:
            raise storage_error(self.directory, error) from error


def storage_error(directory: Path, error: OSError) -> StorageError:
    """The error of a cache directory that cannot be written."""
    return StorageError(
        f"{directory}: cannot write the prepared data: {error.strerror or error}; free space or set data.cache_dir"
    )


def write(
    directory: Path,
    samples: Iterable[Sample],
    counts: Callable[[Sample], dict[str, int]],
    manifest: dict[str, Any],
) -> None:
    """Write samples as a store of their own into `directory`, which must not exist. Raises StorageError."""
    try:
        directory.mkdir(parents=True)
        with StoreWriter(directory) as store:
            store.append(Sequences.of(list(samples), counts))
            store.finish()
            count = len(store.lengths)
        (directory / "manifest.json").write_text(json.dumps({**manifest, "documents": count}, indent=1, default=str))
    except OSError as error:
        raise storage_error(directory, error) from error
