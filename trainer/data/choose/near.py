"""Groups of near duplicates: candidates from columns of band hashes, each verified by its true Jaccard similarity."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable

import numpy as np

from trainer.data.choose.minhash import jaccard, ngram_set

MAX_CHECKED = 64
"""Documents that one document is compared with at most, those sharing most bands first."""
MAX_LEADERS = 128
"""Documents that stand in one bucket at most; text that thousands share would otherwise cost the square of them."""
CACHE_BYTES = 64 << 20
"""N-gram sets kept for further comparisons."""


class NgramSets:
    """N-gram sets of documents, those used last kept in memory up to `CACHE_BYTES`."""

    def __init__(self, text_of: Callable[[int], str], ngram: int) -> None:
        self._text_of, self._ngram = text_of, ngram
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self._bytes = 0

    def __getitem__(self, row: int) -> np.ndarray:
        if row in self._kept:
            self._kept.move_to_end(row)
            return self._kept[row]
        found = ngram_set(self._text_of(row), self._ngram)
        self._kept[row] = found
        self._bytes += found.nbytes
        while self._bytes > CACHE_BYTES and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return found


def alike(first: np.ndarray, second: np.ndarray, threshold: float) -> bool:
    """Whether two n-gram sets have at least this Jaccard similarity; sizes too unlike decide without a comparison."""
    small, large = sorted((len(first), len(second)))
    return small >= threshold * large and jaccard(first, second) >= threshold


def near_groups(
    bands: np.ndarray,
    text_of: Callable[[int], str],
    *,
    threshold: float,
    ngram: int,
    alive: np.ndarray | None = None,
) -> tuple[np.ndarray, dict[str, int]]:
    """The document that stands for each: int64[n] (itself where it is kept) from band hashes uint64[n, bands]; a report.

    In the order of input, a document joins an earlier one that is kept itself and truly has a Jaccard similarity of
    `threshold` or more over word n-grams, else it is kept. `text_of(row)` gives the text that was signed, for the
    candidates only; rows not `alive` are left out. Memory: a few numbers a document for one band at a time, then about
    15 bytes times bands for each document that shares a band with another. "incomplete" in the report counts the
    documents whose comparisons were cut short by `MAX_CHECKED` or `MAX_LEADERS`: among them, duplicates may be left.
    """
    stands = np.arange(len(bands), dtype=np.int64)
    rows = stands.copy() if alive is None else np.flatnonzero(alive)
    suspects, buckets, number = _shared_buckets(bands, rows)
    search = _Leaders(buckets, number)
    sets = NgramSets(text_of, ngram)
    checked = joined = incomplete = 0
    for place, row in enumerate(suspects.tolist()):
        for other in search.candidates(place):
            checked += 1
            leader = int(suspects[other])
            if alike(sets[row], sets[leader], threshold):
                stands[row] = leader
                joined += 1
                break
        else:
            search.add(place)
            incomplete += search.cut
    report = {
        "candidates": len(suspects),
        "comparisons": checked,
        "refused": checked - joined,
        "duplicates": joined,
        "groups": len(np.unique(stands[stands != np.arange(len(stands))])),
        "incomplete": incomplete,
    }
    return stands, report


def _shared_buckets(bands: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows that share a band with another one, their bucket in each band ([suspects, bands], -1: alone), buckets."""
    shared = np.zeros(len(rows), dtype=bool)
    for band in range(bands.shape[1]):
        column = np.asarray(bands[:, band])[rows]
        order = np.argsort(column, kind="stable")
        same = column[order[1:]] == column[order[:-1]]
        shared[order[1:][same]] = True
        shared[order[:-1][same]] = True
    suspects = rows[shared]
    buckets = np.full((len(suspects), bands.shape[1]), -1, dtype=np.int64 if bands.size >= 2**31 else np.int32)
    number = 0
    for band in range(bands.shape[1]):
        _, inverse, counts = np.unique(np.asarray(bands[:, band])[suspects], return_inverse=True, return_counts=True)
        many = counts > 1
        names = np.where(many, np.cumsum(many) - 1 + number, -1)
        buckets[:, band] = names[inverse]
        number += int(many.sum())
    return suspects, buckets, number


class _Leaders:
    """The kept documents of every bucket, as linked lists in flat arrays: no object a document.

    `cut` says whether a limit shortened the comparisons of the document looked at last.
    """

    def __init__(self, buckets: np.ndarray, number: int) -> None:
        self._buckets, self._bands = buckets, buckets.shape[1]
        self._head = np.full(number, -1, dtype=buckets.dtype).data
        self._next = np.full(buckets.size, -1, dtype=buckets.dtype).data
        self._filled = np.zeros(number, dtype=np.int32).data
        self.cut = False

    def candidates(self, place: int) -> list[int]:
        """Kept documents that share a bucket, those sharing most first, then the earlier."""
        found: Counter[int] = Counter()
        for bucket in self._buckets[place].tolist():
            entry = self._head[bucket] if bucket >= 0 else -1
            while entry >= 0:
                found[entry // self._bands] += 1
                entry = self._next[entry]
        self.cut = len(found) > MAX_CHECKED
        return sorted(found, key=lambda other: (-found[other], other))[:MAX_CHECKED]

    def add(self, place: int) -> None:
        """Keep a document: later ones are compared with it."""
        for band, bucket in enumerate(self._buckets[place].tolist()):
            if bucket < 0:
                continue
            if self._filled[bucket] >= MAX_LEADERS:
                self.cut = True
                continue
            entry = place * self._bands + band
            self._next[entry], self._head[bucket] = self._head[bucket], entry
            self._filled[bucket] += 1
