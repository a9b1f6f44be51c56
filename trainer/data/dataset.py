"""The prepared data set on disk: flat memory-mapped arrays of tokens and supervision, and per-document tables.

tokens.bin      int32, all documents one after another
supervised.bin  uint8, the same length; 1 where the token is a training target
offsets.npy     int64 [N + 1], where each document begins
counts.npz      int64 [N] for each term of the objective, and `supervised` for the number of targets
labels.npy      int64 [N], only for labelled data
manifest.json   fingerprint, versions, report
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from strategies.errors import DataError, StorageError

COUNT_PREFIX = "term."


@dataclass(slots=True)
class Sample:
    """One tokenised document."""

    input_ids: np.ndarray
    """int32 [n]."""
    supervised: np.ndarray
    """bool [n]: token i is a training target. Position 0 never counts, since nothing predicts it."""
    label: int | None = None
    """Class number, for labelled data."""


class TokenDataset:
    """A prepared data set, opened read-only. Arrays are memory-mapped: opening costs nothing, whatever the size."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest
        self.offsets: np.ndarray = np.load(directory / "offsets.npy")
        self.lengths: np.ndarray = np.diff(self.offsets)
        with np.load(directory / "counts.npz") as table:
            self.num_supervised: np.ndarray = table["supervised"]
            self.counts: dict[str, np.ndarray] = {
                name.removeprefix(COUNT_PREFIX): table[name] for name in table.files if name.startswith(COUNT_PREFIX)
            }
        labels = directory / "labels.npy"
        self.labels: np.ndarray | None = np.load(labels) if labels.exists() else None
        self.tokens = self._map("tokens.bin", np.int32)
        self.supervised = self._map("supervised.bin", np.uint8)

    @classmethod
    def open(cls, directory: Path) -> TokenDataset:
        """Open a finished data set. Raises DataError for one that is torn or missing."""
        directory = Path(directory)
        try:
            manifest = json.loads((directory / "manifest.json").read_text())
            return cls(directory, manifest)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{directory} is no complete prepared data set ({error}); delete it to prepare it again"
            ) from error

    def _map(self, name: str, dtype: type) -> np.ndarray:
        path = self.directory / name
        wanted = int(self.offsets[-1]) * np.dtype(dtype).itemsize
        if path.stat().st_size != wanted:
            raise ValueError(f"{name} has {path.stat().st_size} bytes, not {wanted}")
        return np.memmap(path, dtype=dtype, mode="r") if wanted else np.zeros(0, dtype=dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def fingerprint(self) -> str:
        """Identity of the content: sources, tokenizer, template, options and code version."""
        return str(self.manifest["fingerprint"])

    def sample(self, index: int) -> Sample:
        """Document `index`, as views into the mapped arrays."""
        begin, end = int(self.offsets[index]), int(self.offsets[index + 1])
        label = None if self.labels is None else int(self.labels[index])
        return Sample(self.tokens[begin:end], self.supervised[begin:end].view(np.bool_), label)


def write(
    directory: Path,
    samples: Iterable[Sample],
    counts_fn: Callable[[Sample], dict[str, int]],
    manifest: dict[str, Any],
) -> None:
    """Stream samples into `directory`, which must not exist. Raises StorageError; the caller removes what was begun."""
    offsets = array("q", [0])
    supervised = array("q")
    labels = array("q")
    counts: dict[str, array[int]] = {}
    try:
        directory.mkdir(parents=True)
        with (
            (directory / "tokens.bin").open("wb") as tokens_file,
            (directory / "supervised.bin").open("wb") as mask_file,
        ):
            for number, sample in enumerate(samples):
                sample.supervised[:1] = False
                tokens_file.write(np.ascontiguousarray(sample.input_ids, dtype=np.int32).tobytes())
                mask_file.write(np.ascontiguousarray(sample.supervised, dtype=np.uint8).tobytes())
                offsets.append(offsets[-1] + len(sample.input_ids))
                supervised.append(int(sample.supervised.sum()))
                if sample.label is not None:
                    labels.append(sample.label)
                for term, count in counts_fn(sample).items():
                    column = counts.setdefault(term, array("q", bytes(8 * number)))  # a term may first appear late
                    column.extend([0] * (number - len(column)))
                    column.append(count)
        num = len(supervised)
        for column in counts.values():
            column.extend([0] * (num - len(column)))
        tables = {COUNT_PREFIX + term: np.array(column, dtype=np.int64) for term, column in counts.items()}
        np.save(directory / "offsets.npy", np.array(offsets, dtype=np.int64))
        np.savez(directory / "counts.npz", supervised=np.array(supervised, dtype=np.int64), **tables)  # type: ignore[arg-type]
        if labels:
            if len(labels) != num:
                raise ValueError("some samples have a label and some have none")
            np.save(directory / "labels.npy", np.array(labels, dtype=np.int64))
        (directory / "manifest.json").write_text(json.dumps({**manifest, "documents": num}, indent=1, default=str))
    except OSError as error:
        raise StorageError(
            f"{directory}: cannot write the prepared data: {error.strerror}; free space or set data.cache_dir"
        ) from error
