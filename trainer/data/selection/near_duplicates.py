"""Finds texts that are nearly the same: candidates by rensa's MinHash sketches, each verified by its true similarity.

The result is a function of the texts and their order. One process computes it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.data.selection.bands import BYTES_PER_BAND, BandIndex
from trainer.data.selection.document_hashes import normalize

WORDS_PER_NGRAM = 5
"""Words in a run, as Lee et al. (2022, arXiv:2107.06499) compare documents."""


def ngrams(normalised_text: bytes, label_hash: int = 0) -> list[bytes]:
    """Cut a normalised text into its runs of 5 words, in order: b"a b c d e f" -> [b"a b c d e", b"b c d e f"].

    Two texts are compared by the sets of these n-grams. A text of fewer words is a single n-gram, so that short texts are similar
    only when their words are the same. Texts with different labels, and so different `label_hash`, share no n-gram; 0 for none.
    """
    words = normalised_text.split()
    if not words:
        return []
    prefix = b"%d " % label_hash if label_hash else b""  # one more word before each n-gram
    num_ngrams = max(1, len(words) - WORDS_PER_NGRAM + 1)
    found_ngrams = []
    for begin in range(num_ngrams):
        found_ngrams.append(prefix + b" ".join(words[begin : begin + WORDS_PER_NGRAM]))
    return found_ngrams


MINHASH_SEED = 1
MAX_MINHASH_VALUES = 128
"""Most MinHash values of a document."""
MIN_RECALL = 0.97
"""Share of the pairs exactly at the threshold that the bands must find, in theory."""
ESTIMATE_MARGIN = 0.15
"""How far below the threshold an estimate may lie for a candidate to be verified: four standard deviations of it."""
MAX_COMPARISONS = 64
"""Documents that one document is truly compared with at most, the most similar by estimate first."""
MAX_SKETCHES = 4096
"""Sketches kept in memory, 0.6 kB each; others are made anew of their text where they are compared."""
MAX_CANDIDATES = 512
"""A document that shares a band with as many is not kept for later ones: text that thousands share costs their square."""


class _SketchedTexts:
    """The documents of a `NearIndex` by position, with their runs of words and MinHash sketches, made anew at each call."""

    def __init__(
        self,
        rows: np.ndarray,
        text_of: Callable[[int], str],
        label_hashes: np.ndarray,
        empty_sketch: Callable[[], Any],
    ) -> None:
        self._rows = rows
        self._text_of = text_of
        self._label_hashes = label_hashes
        self._empty_sketch = empty_sketch

    def ngrams(self, position: int) -> list[bytes]:
        """The n-grams of words of a document."""
        return ngrams(normalize(self._text_of(int(self._rows[position]))), int(self._label_hashes[position]))

    def ngrams_and_sketch(self, position: int) -> tuple[list[bytes], Any]:
        """(n-grams of words of a document, their MinHash sketch)."""
        document_ngrams = self.ngrams(position)
        sketch = self._empty_sketch()
        # One document at a time: batches start threads, and processes forked after those hang.
        sketch.update(document_ngrams)
        return document_ngrams, sketch

    def sketch(self, position: int) -> Any:
        """The MinHash sketch of a document."""
        _, sketch = self.ngrams_and_sketch(position)
        return sketch

    def digest(self, position: int) -> list[int] | None:
        """The MinHash values of a document; None for one without words."""
        document_ngrams, sketch = self.ngrams_and_sketch(position)
        return sketch.digest() if document_ngrams else None


class NearIndex:
    """Finds which of some documents are near copies of each other, in the order in which they are added.

    Documents are called by their position in `rows`. Memory: 40 bytes a document at its peak, and 4,096 sketches.
    """

    def __init__(
        self,
        rows: np.ndarray,
        text_of: Callable[[int], str],
        label_hashes: np.ndarray,
        threshold: float,
        directory: Path | None = None,
    ) -> None:
        """Make sketches of documents, by which near copies are found; none is found before it is added.

        `rows` (int64 [n]) names the documents, and `text_of(row)` gives the text of one.
        `label_hashes` (uint64 [n]): only documents with equal labels are compared.
        `threshold`: the Jaccard similarity from which on a document is a near copy.
        `directory`: where files without names lie, of 144 to 360 bytes a document.
        """
        from rensa import RMinHash

        bands, band_rows = choose_bands(threshold)
        self._threshold = threshold
        self._texts = _SketchedTexts(rows, text_of, label_hashes, lambda: RMinHash(bands * band_rows, MINHASH_SEED))
        self._index = BandIndex(map(self._texts.digest, range(len(rows))), len(rows), bands, directory)
        # The index keeps bands only, so a candidate's sketch is made again from its text; common candidates come
        # often. Nothing in here refers back to this object: its files must go with it, not with the next collection.
        self._sketch_of = lru_cache(MAX_SKETCHES)(self._texts.sketch)
        self.may_be_near = self._index.shares_band
        """bool [n]: which documents may be near another one at all. The others need neither be added nor looked for."""
        self.report = {"comparisons": 0, "incomplete": 0}
        """True comparisons, and documents whose comparisons were cut short: among them, copies may be left."""

    def find_most_similar(self, position: int) -> int | None:
        """Find the most similar document that was added, if their Jaccard similarity is `threshold` or more; else None.

        Documents are named by their positions. The similarity is that of their n-grams of words. It is estimated for all
        candidates, and computed from the texts for the most similar ones. `report` counts these comparisons, and the searches
        that `MAX_COMPARISONS` cut short.
        """
        document_ngrams, sketch = self._texts.ngrams_and_sketch(position)
        # (minus the estimated similarity, position), so that the most similar comes first.
        candidates: list[tuple[float, int]] = []
        for candidate in self._index.find_candidates(position):
            estimate = sketch.jaccard(self._sketch_of(candidate))
            if estimate >= self._threshold - ESTIMATE_MARGIN:
                candidates.append((-estimate, candidate))
        for _, candidate in sorted(candidates)[:MAX_COMPARISONS]:
            self.report["comparisons"] += 1
            if jaccard_similarity(set(document_ngrams), set(self._texts.ngrams(candidate))) >= self._threshold:
                return candidate
        if len(candidates) > MAX_COMPARISONS:
            self.report["incomplete"] += 1
        return None

    def add(self, position: int) -> None:
        """Let a document be found by later searches, unless too many earlier ones share a band with it.

        Text that thousands of documents share (a licence, a template) would make each search compare with all of them.
        """
        if len(self._index.find_candidates(position)) < MAX_CANDIDATES:
            self._index.add_kept(position)
        else:
            self.report["incomplete"] += 1


class NearCopies(NamedTuple):
    """Which of n documents are near copies of an earlier one."""

    representatives: np.ndarray
    """int64 [n]: the number of that earlier document; the document's own number if it is no copy."""
    report: dict[str, int]
    """What the search did, see `NearIndex.report`."""


def find_near_copies(
    is_compared: np.ndarray,
    text_of: Callable[[int], str],
    label_hashes: np.ndarray,
    threshold: float,
    directory: Path | None = None,
) -> NearCopies:
    """Find the documents that are near copies of an earlier one. A copy represents no other document.

    `is_compared` (bool [n]): False for documents that are known as copies already. `text_of`: gives the text of a document.
    `label_hashes` (uint64 [n]): only documents with equal labels can be copies. `threshold`: the Jaccard similarity from which
    on a document is a near copy. `directory`: see `NearIndex`.
    """
    rows = np.flatnonzero(is_compared)
    index = NearIndex(rows, text_of, label_hashes[rows], threshold, directory)
    representatives = np.arange(len(is_compared), dtype=np.int64)
    # Only documents that share a band of their sketches with another one are compared.
    for position in np.flatnonzero(index.may_be_near).tolist():
        earlier_position = index.find_most_similar(position)
        if earlier_position is None:
            index.add(position)
        else:
            representatives[rows[position]] = rows[earlier_position]
    return NearCopies(representatives, index.report)


def jaccard_similarity(first: set[bytes], second: set[bytes]) -> float:
    """Jaccard similarity of two sets: shared elements over all elements; 0 if both are empty."""
    num_shared = len(first & second)
    num_all = len(first) + len(second) - num_shared
    return num_shared / max(num_all, 1)


def band_recall(similarity: float, bands: int, rows: int) -> float:
    """The probability that two texts of this Jaccard similarity share a band, of `rows` MinHash values each.

    Texts that share one are compared.
    """
    return 1 - (1 - similarity**rows) ** bands


def choose_bands(threshold: float) -> tuple[int, int]:
    """Decide how to split a MinHash sketch: (bands, rows of a band), with the most rows that still find enough near copies.

    More rows make fewer useless candidates, since all rows of a band must agree. A MinHash value agrees with probability equal to
    the Jaccard similarity s (Broder 1997); a pair becomes a candidate with probability 1 - (1 - s**r)**b (Leskovec, Rajaraman and
    Ullman, Mining of Massive Datasets, section 3.4), which is to be at least `MIN_RECALL` at s = threshold. For a threshold of
    0.8, the 128 values become 18 bands of 7 rows, which find 0.986 of the pairs at 0.8, 0.999 at 0.85, 0.79 at 0.7, 0.40 at 0.6,
    0.13 at 0.5 and 0.03 at 0.4.
    """
    for rows in range(MAX_MINHASH_VALUES, 0, -1):
        bands = MAX_MINHASH_VALUES // rows
        if band_recall(threshold, bands, rows) >= MIN_RECALL:
            return bands, rows
    raise AssertionError(f"no bands for a threshold of {threshold}: one row a band finds enough of any above 0.03")


def index_bytes_per_document(threshold: float) -> int:
    """Bytes of disk that the search for near copies takes for a document at most, until it has ended."""
    bands, _ = choose_bands(threshold)
    return bands * BYTES_PER_BAND
