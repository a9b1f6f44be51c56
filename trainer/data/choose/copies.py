"""Copies: columns of signatures made block by block, and one global decision over these columns.

Three kinds, each including the stricter ones: exact copies, the same words in the same order (normal form), and near copies
(Jaccard similarity of word n-grams; candidates from rensa's index of MinHash bands, each truly compared). Of each group the
first document in the order of input is kept, and every near copy was compared with the very document that stands for it:
likeness is not passed on along chains. Near copies are a function of the texts and their order; one process finds them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import numpy as np

from trainer.data.choose.ngrams import digest64, mix, ngrams, normal_digest, normalize
from trainer.data.config import Across, ComparedText, DuplicatePolicy, DuplicatesConfig
from trainer.data.document import Document, texts_in

SEED, VALUES = 1, 128
"""Of MinHash: the seed, and most values a document."""
MIN_RECALL = 0.97
"""Share of the pairs exactly at the threshold that the bands must find, in theory."""
DOUBT = 0.15
"""How far below the threshold an estimate may lie for a candidate to be verified: four standard deviations of it."""
MAX_CHECKED = 64
"""Documents that one document is truly compared with at most, the likest by estimate first."""
MAX_SKETCHES = 4096
"""Sketches kept in memory, 0.6 kB each; others are made anew of their text where they are compared."""
MAX_CANDIDATES = 512
"""A document that shares a band with as many is not kept for later ones: text that thousands share costs their square."""


class NearIndex:
    """Documents that others may be near copies of. `text_of(row)` gives the text of one that was added.

    A document takes about 1.6 kB, most of it for its place in each band.
    """

    def __init__(self, text_of: Callable[[int], str], *, threshold: float, ngram: int) -> None:
        from rensa import RMinHash, RMinHashLSH

        bands, rows = choose_bands(threshold)
        self._threshold, self._ngram, self._text_of = threshold, ngram, text_of
        self._empty: Callable[[], Any] = lambda: RMinHash(bands * rows, SEED)
        self._index = RMinHashLSH(threshold, bands * rows, bands)
        self._sketch_of = lru_cache(MAX_SKETCHES)(lambda row, apart: self._sketch(text_of(row), apart)[1])
        self.report = dict.fromkeys(("candidates", "comparisons", "refused", "incomplete"), 0)
        """Documents with candidates, true comparisons, those of them that were none, and documents cut short."""

    def find(self, text: str, apart: int = 0) -> int | None:
        """The likest document with a Jaccard similarity of `threshold` or more over word n-grams; None where there is none.

        Documents with another `apart` (a label, a source) are never near copies, nor are those without words.
        """
        return self._find(*self._sketch(text, apart), apart)

    def add(self, row: int, text: str, apart: int = 0, *, unless_found: bool = False) -> int | None:
        """Keep a document for later ones; with `unless_found` only where none is found, which is given back else."""
        runs, sketch = self._sketch(text, apart)
        found = self._find(runs, sketch, apart) if unless_found else None
        if found is None and runs:
            if len(self._index.query(sketch)) < MAX_CANDIDATES:
                self._index.insert(row, sketch)
            else:
                self.report["incomplete"] += 1
        return found

    def _sketch(self, text: str, apart: int) -> tuple[list[bytes], Any]:
        runs, sketch = ngrams(normalize(text), self._ngram, apart), self._empty()
        sketch.update(runs)  # one document at a time: batches start threads, and processes forked after those hang
        return runs, sketch

    def _find(self, runs: list[bytes], sketch: Any, apart: int) -> int | None:
        rows = self._index.query(sketch) if runs else []
        estimates = [(sketch.jaccard(self._sketch_of(row, apart)), row) for row in rows]
        likely = [(-estimate, row) for estimate, row in estimates if estimate >= self._threshold - DOUBT]
        self.report["candidates"] += bool(likely)
        for _, row in sorted(likely)[:MAX_CHECKED]:
            other = ngrams(normalize(self._text_of(row)), self._ngram, apart)
            self.report["comparisons"] += 1
            if jaccard(set(runs), set(other)) >= self._threshold:
                return row
            self.report["refused"] += 1
        self.report["incomplete"] += len(likely) > MAX_CHECKED
        return None


def near_copies(
    alive: np.ndarray, text_of: Callable[[int], str], apart: np.ndarray, *, threshold: float, ngram: int
) -> tuple[np.ndarray, dict[str, int]]:
    """The document that stands for each, itself where it is no near copy of an earlier one that is none: int64[n]; a report.

    Only rows that are `alive` (bool[n]) and equal in `apart` (uint64[n]) are compared. `incomplete` in the report counts
    the documents whose comparisons were cut short: among them, copies may be left.
    """
    index, stands = NearIndex(text_of, threshold=threshold, ngram=ngram), np.arange(len(alive), dtype=np.int64)
    for row in np.flatnonzero(alive).tolist():
        leader = index.add(row, text_of(row), int(apart[row]), unless_found=True)
        stands[row] = row if leader is None else leader
    copies = stands[stands != np.arange(len(stands))]
    return stands, {**index.report, "duplicates": len(copies), "groups": len(np.unique(copies))}


def jaccard(first: set[bytes], second: set[bytes]) -> float:
    """Shared elements over all elements; 0 where both sets are empty."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared or 1)


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
    for rows in range(VALUES, 0, -1):
        if recall(threshold, VALUES // rows, rows) >= MIN_RECALL:
            return VALUES // rows, rows
    return VALUES, 1


def compared_text(document: Document, which: ComparedText) -> str:
    """The text `which` asks for; the whole document where it has no such text, or an empty one.

    The whole document is its texts in reading order. The words of a rejected answer are marked, because two preference
    pairs with the answers the other way round teach opposite things.
    """
    part = prompt_of(document) if which is ComparedText.prompt else None
    if which is ComparedText.completion and document.label is None:
        part = _completion_of(document)
    if part is not None and part.strip():
        return part
    rejected = document.rejected or []
    marked = [" ".join("~" + word for word in text.split()) for message in rejected for text in texts_in(message)]
    return "\n".join(document.texts() if not rejected else [*_unrejected(document), *marked])


def _unrejected(document: Document) -> list[str]:
    turns = [text for message in (*(document.messages or []), *(document.chosen or [])) for text in texts_in(message)]
    return turns + [text for text in (document.prompt, document.completion, document.text) if text is not None]


def prompt_of(document: Document) -> str | None:
    """What an answer is given to: the turns before the last answer without system turns; None for plain text."""
    if document.messages is not None:
        end = len(document.messages)
        if document.chosen is None:
            answers = [place for place, turn in enumerate(document.messages) if turn["role"] == "assistant"]
            end = answers[-1] if answers else end
        asked = [turn for turn in document.messages[:end] if turn["role"] != "system"]
        return "\n".join(text for turn in asked for text in texts_in(turn))
    if document.prompt is not None:
        return document.prompt
    return document.text if document.label is not None else None


def _completion_of(document: Document) -> str | None:
    if document.chosen is not None:
        return "\n".join(text for turn in document.chosen for text in texts_in(turn))
    for turn in reversed(document.messages or []):
        if turn["role"] == "assistant":
            return "\n".join(texts_in(turn))
    return document.completion


class Signer:
    """Makes the columns by which documents are compared. Pure: built in every worker, the same for every block."""

    def __init__(self, config: DuplicatesConfig, *, near: bool | None = None, held_out: bool = True) -> None:
        """`near` says whether near copies are looked for; as a rule they are when `config.near` is not off.

        `held_out`: there may be held-out data to compare with. Without, "prompt" is 0 for all, and where only exact
        copies are looked for, "normal" is "digest".
        """
        self.config = config
        self.held_out = held_out
        self.near = config.near is not DuplicatePolicy.none if near is None else near

    def sign(self, documents: list[Document]) -> dict[str, np.ndarray]:
        """Columns of n documents, uint64[n] each.

        "digest" stands for the text itself, "normal" for its words, "prompt" for the words of its prompt (0: none),
        "source" for the name of its source, and "verdict", where near copies are looked for, for its label (0: none).
        Whole documents differ in "normal" when their label does.
        """
        digests, normals, prompts, sources = list[int](), list[int](), list[int](), list[int]()
        keys = np.zeros(len(documents), dtype=np.uint64)
        whole = self.config.text is ComparedText.document
        worded = self.held_out or self.near or self.config.normalized is not DuplicatePolicy.none
        for row, document in enumerate(documents):
            text = compared_text(document, self.config.text) if worded or not whole else ""
            digests.append(document.digest() if whole else digest64(text.encode("utf-8", "surrogatepass")))
            verdict = (document.label, document.desirable)
            if whole and verdict != (None, None):
                keys[row] = digest64(json.dumps(verdict).encode())
            normal = normal_digest(normalize(text)) if worded else None
            normals.append(digests[-1] if normal is None else normal)
            prompt = prompt_of(document) if self.held_out else None
            prompts.append(0 if prompt is None else normal_digest(normalize(prompt)) or 0)
            sources.append(_source_digest(document.source))
        found = {"digest": digests, "normal": normals, "prompt": prompts, "source": sources}
        columns = {name: np.array(values, dtype=np.uint64) for name, values in found.items()}
        columns["normal"] ^= keys
        return {**columns, "verdict": keys} if self.near else columns


@cache
def _source_digest(name: str) -> int:
    return digest64(name.encode("utf-8", "surrogatepass"))


def exact_groups(digest: np.ndarray, alive: np.ndarray | None = None) -> np.ndarray:
    """Index of the first document with the same digest: int64[n] from uint64[n]. Where not `alive`, a row's own index."""
    first = np.arange(len(digest), dtype=np.int64)
    rows = first if alive is None else np.flatnonzero(alive)
    _, index, inverse = np.unique(digest[rows], return_index=True, return_inverse=True)
    first[rows] = rows[index[inverse]]
    return first


@dataclass(slots=True)
class Duplicates:
    """The decision over n documents."""

    kept: np.ndarray
    """bool[n]: False where the policy drops the document."""
    stands: np.ndarray
    """int64[n]: the earlier document it duplicates; its own index where it is none."""
    kind: np.ndarray
    """uint8[n]: 0 none, else 1 + the place in `KINDS`."""
    report: dict[str, Any] = field(default_factory=dict)
    """Documents by kind, and what the search for near duplicates did."""


KINDS = ("exact", "normalized", "near")


def find_duplicates(
    config: DuplicatesConfig, columns: Mapping[str, np.ndarray], text_of: Callable[[int], str]
) -> Duplicates:
    """Decide over the joined columns of all blocks (see `Signer.sign`), in input order.

    `text_of(row)` gives `compared_text(document, config.text)`. A document counts under the strictest kind that holds.
    """
    number = len(columns["digest"])
    scope = mix(columns["source"]) if config.across is Across.source else np.zeros(number, np.uint64)
    result = Duplicates(np.ones(number, bool), np.arange(number, dtype=np.int64), np.zeros(number, np.uint8))
    order = list(DuplicatePolicy)
    given = [order.index(policy) for policy in (config.exact, config.normalized, config.near)]
    alive = np.ones(number, dtype=bool)
    for place, kind in enumerate(KINDS):
        policy = order[max(given[place:])]
        if policy is DuplicatePolicy.none:
            continue
        if kind == "near":
            stands, result.report["near_search"] = near_copies(
                alive, text_of, columns["verdict"] ^ scope, threshold=config.threshold, ngram=config.ngram
            )
        else:
            stands = exact_groups(columns[("digest", "normal")[place]] ^ scope, alive)
        found = stands != np.arange(number)
        result.stands[found], result.kind[found] = stands[found], place + 1
        alive &= ~found
        if policy is DuplicatePolicy.drop:
            result.kept &= ~found
        result.report[kind] = int(found.sum())
    # A copy was compared with its first exemplar only; where that one turned out a duplicate, so is the copy.
    for _ in KINDS[1:]:
        result.stands = result.stands[result.stands]
    return result
