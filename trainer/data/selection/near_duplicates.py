"""Finds texts that are nearly the same: candidates from rensa's MinHash index, each verified by its true similarity.

The result is a function of the texts and their order. One process computes it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from trainer.data.selection.signatures import normalize

NGRAM = 5
"""Words in a run, as Lee et al. (2022, arXiv:2107.06499) compare documents."""


def ngrams(normalized: bytes, partition: int = 0) -> list[bytes]:
    """The runs of 5 words of a normalised text, in order; a text of fewer words is a single run.

    Short texts are therefore similar only when their words are the same. Texts of different partitions share no run.
    """
    words = normalized.split()
    if not words:
        return []
    prefix = b"%d " % partition if partition else b""
    num_runs = max(1, len(words) - NGRAM + 1)
    runs = []
    for begin in range(num_runs):
        runs.append(prefix + b" ".join(words[begin : begin + NGRAM]))
    return runs


MINHASH_SEED = 1
MAX_MINHASH_VALUES = 128
"""Most MinHash values of a document."""
MIN_RECALL = 0.97
"""Share of the pairs exactly at the threshold that the bands must find, in theory."""
ESTIMATE_MARGIN = 0.15
"""How far below the threshold an estimate may lie for a candidate to be verified: four standard deviations of it."""
MAX_CHECKED = 64
"""Documents that one document is truly compared with at most, the most similar by estimate first."""
MAX_SKETCHES = 4096
"""Sketches kept in memory, 0.6 kB each; others are made anew of their text where they are compared."""
MAX_CANDIDATES = 512
"""A document that shares a band with as many is not kept for later ones: text that thousands share costs their square."""


class NearIndex:
    """A MinHash index of documents that others may be near copies of. `text_of(row)` gives the text of one that was added.

    A document takes about 1.6 kB, most of it for its entry in each band.
    """

    def __init__(self, text_of: Callable[[int], str], threshold: float) -> None:
        from rensa import RMinHash, RMinHashLSH

        bands, rows = choose_bands(threshold)
        self._threshold = threshold
        self._text_of = text_of
        self._empty_sketch: Callable[[], Any] = lambda: RMinHash(bands * rows, MINHASH_SEED)
        self._index = RMinHashLSH(threshold, bands * rows, bands)
        # The index keeps bands only, so a candidate's sketch is made again from its text; common candidates come
        # often.
        self._sketch_of = lru_cache(MAX_SKETCHES)(lambda row, partition: self._sketch(text_of(row), partition)[1])
        self.report = {"comparisons": 0, "incomplete": 0}
        """True comparisons, and documents whose comparisons were cut short: among them, copies may be left."""

    def find(self, text: str, partition: int = 0) -> int | None:
        """The most similar document with a Jaccard similarity of `threshold` or more over word n-grams; None if there is none.

        Documents of another `partition` (a label, a source) are never near copies, nor are those without words.
        """
        runs, sketch = self._sketch(text, partition)
        return self._find(runs, sketch, partition)

    def add(self, row: int, text: str, partition: int = 0, *, unless_found: bool = False) -> int | None:
        """Keep the document `row` for later ones. With `unless_found`, only if no near copy of it is kept: that one is returned.

        `partition`: see `find`.
        """
        runs, sketch = self._sketch(text, partition)
        near_copy = self._find(runs, sketch, partition) if unless_found else None
        if near_copy is None and runs:
            # Text that thousands of documents share (a licence, a template) would make each search compare with all
            # of them.
            if len(self._index.query(sketch)) < MAX_CANDIDATES:
                self._index.insert(row, sketch)
            else:
                self.report["incomplete"] += 1
        return near_copy

    def _sketch(self, text: str, partition: int) -> tuple[list[bytes], Any]:
        """(runs of words, their MinHash sketch)."""
        runs = ngrams(normalize(text), partition)
        sketch = self._empty_sketch()
        sketch.update(runs)  # one document at a time: batches start threads, and processes forked after those hang
        return runs, sketch

    def _find(self, runs: list[bytes], sketch: Any, partition: int) -> int | None:
        """The kept document that a text with these runs is a near copy of; None if there is none.

        Compares the text with the candidates that share a band, the most similar by estimate first.
        """
        if not runs:
            return None
        # (minus the estimated similarity, row), so that the most similar comes first.
        candidates: list[tuple[float, int]] = []
        for row in self._index.query(sketch):
            estimate = sketch.jaccard(self._sketch_of(row, partition))
            if estimate >= self._threshold - ESTIMATE_MARGIN:
                candidates.append((-estimate, row))
        for _, row in sorted(candidates)[:MAX_CHECKED]:
            candidate_runs = ngrams(normalize(self._text_of(row)), partition)
            self.report["comparisons"] += 1
            if jaccard(set(runs), set(candidate_runs)) >= self._threshold:
                return row
        if len(candidates) > MAX_CHECKED:
            self.report["incomplete"] += 1
        return None


def near_copies(
    alive: np.ndarray, text_of: Callable[[int], str], partition: np.ndarray, threshold: float
) -> tuple[np.ndarray, dict[str, int]]:
    """(int64[n]: the document that stands for each, report): itself, or the earlier document that it is a near copy of.

    A document that is itself a copy stands for no other. Only rows that are `alive` (bool[n]) and equal in `partition`
    (uint64[n]) are compared.
    """
    index = NearIndex(text_of, threshold)
    representative = np.arange(len(alive), dtype=np.int64)
    for row in np.flatnonzero(alive).tolist():
        earlier = index.add(row, text_of(row), int(partition[row]), unless_found=True)
        if earlier is not None:
            representative[row] = earlier
    return representative, index.report


def jaccard(first: set[bytes], second: set[bytes]) -> float:
    """Jaccard similarity of two sets: shared elements over all elements; 0 if both are empty."""
    num_shared = len(first & second)
    num_all = len(first) + len(second) - num_shared
    return num_shared / max(num_all, 1)


def recall(similarity: float, bands: int, rows: int) -> float:
    """Probability that two texts of this Jaccard similarity share at least one band: 1 - (1 - s**rows)**bands."""
    return 1 - (1 - similarity**rows) ** bands


def choose_bands(threshold: float) -> tuple[int, int]:
    """(bands, rows of a band) with the most rows, so the fewest useless candidates, that still find enough.

    A MinHash value agrees with probability equal to the Jaccard similarity s (Broder 1997); a pair becomes a candidate
    with probability 1 - (1 - s**r)**b (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4). The
    rows are the largest number for which that is at least 0.97 at s = threshold. For a threshold of 0.8: 18 bands of 7
    rows, which find 0.985 of the pairs at 0.8, 0.999 at 0.85, 0.79 at 0.7, 0.40 at 0.6, 0.13 at 0.5 and 0.03 at 0.4.
    """
    for rows in range(MAX_MINHASH_VALUES, 0, -1):
        bands = MAX_MINHASH_VALUES // rows
        if recall(threshold, bands, rows) >= MIN_RECALL:
            return bands, rows
    raise AssertionError(f"no bands for a threshold of {threshold}: one row a band finds enough of any above 0.03")
