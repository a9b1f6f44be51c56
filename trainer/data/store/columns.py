"""Numbers of every document kept: what the decisions about the whole data set are made from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(slots=True)
class Columns:
    """Numbers of every document kept, in input order: what the global decisions are made from."""

    split: np.ndarray
    """int16 [D], into `splits`."""
    source: np.ndarray
    """int16 [D], into `sources`."""
    pieces: np.ndarray
    """int64 [D]: sequences of each document."""
    label: np.ndarray
    """int64 [D], into `labels`; -1 where there is none."""
    signatures: dict[str, np.ndarray]
    splits: list[str]
    sources: list[str]
    labels: list[str]

    def __len__(self) -> int:
        return len(self.split)

    def of_split(self, name: str) -> np.ndarray:
        """int64: the documents that were read for a split."""
        return np.flatnonzero(self.split == self.splits.index(name)) if name in self.splits else np.zeros(0, np.int64)
