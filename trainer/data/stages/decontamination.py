"""Decontamination: training documents that hold text of given evaluation sets, found by runs of 13 words.

The rule is that of Brown et al. (2020, Language Models are Few-Shot Learners, appendix C): one run of 13 words in
common, compared without case and punctuation. Evaluation texts of fewer words are looked for as a whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from strategies.errors import DataError
from trainer.data.choose.compare import mix, normal_digest, normalize
from trainer.data.config import DecontaminationConfig, DecontaminationPolicy
from trainer.data.document import EXAMPLES, Document, Tally

BATCH_TEXTS = 512
MIN_WORDS = 5
"""Evaluation texts of fewer words are not looked for (they are counted): many documents hold them by chance."""
MAX_SHARED = 10
"""Runs in more evaluation texts than this are the set's own wording, and ignored."""
MAX_FILTER_BITS = 27


LONGEST_WORD = 256
"""Bytes. A longer run without a separator (base64, sequences) counts as single bytes, so that an edit stays local."""


def _fixed_random(name: str, number: int) -> np.ndarray:
    """`number` odd 64-bit constants that never change."""
    raw = hashlib.shake_128(name.encode()).digest(8 * number)
    return np.frombuffer(raw, dtype="<u8").astype(np.uint64) | np.uint64(1)


_BYTE = _fixed_random("byte", 256)
_POWER = np.cumprod(np.full(LONGEST_WORD + 1, 0x9E3779B97F4A7C15, dtype=np.uint64), dtype=np.uint64)
_STEP = _fixed_random("step", 256)


def word_hashes(normalized: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """A 64-bit hash of every word of some normalised texts: (uint64[words], int64[texts + 1] offsets into it).

    A polynomial over the bytes modulo 2**64 with random byte values, then `mix`; one pass over all texts at once.
    """
    joined = np.frombuffer(b" ".join((*normalized, b"")), dtype=np.uint8)
    if not len(joined):
        return np.empty(0, dtype=np.uint64), np.zeros(len(normalized) + 1, dtype=np.int64)
    inside = np.zeros(len(joined) + 1, dtype=np.int8)
    inside[1:] = joined != 32
    edges = np.diff(inside)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    long = ends - starts > LONGEST_WORD
    if long.any():
        pieces = [np.arange(start, end) for start, end in zip(starts[long], ends[long], strict=True)]
        split = np.concatenate(pieces)
        starts, ends = np.concatenate([starts[~long], split]), np.concatenate([ends[~long], split + 1])
        order = np.argsort(starts, kind="stable")
        starts, ends = starts[order], ends[order]
    begins = np.cumsum([0, *(len(data) + 1 for data in normalized)])
    offsets = np.searchsorted(starts, begins)
    if not len(starts):
        return np.empty(0, dtype=np.uint64), offsets
    lengths = ends - starts
    bytes_of_words = joined[inside[1:].view(bool)]
    first = np.cumsum(lengths) - lengths
    place = np.arange(len(bytes_of_words)) - np.repeat(first, lengths)
    return mix(np.add.reduceat(_BYTE[bytes_of_words] * _POWER[place], first)), offsets


def roll(words: np.ndarray, ngram: int) -> np.ndarray:
    """Hashes of all runs of `ngram` words, given the words' hashes: uint64[max(0, words - ngram + 1)], not mixed."""
    number = len(words) - ngram + 1
    if number <= 0:
        return np.empty(0, dtype=np.uint64)
    total = words[:number] * _STEP[0]
    for step in range(1, ngram):
        total += words[step : step + number] * _STEP[step]
    return total


def evaluation_texts(document: Document, ngram: int) -> Iterator[tuple[str, str]]:
    """(file:line, text) of an evaluation document for `Decontaminator.build`: its questions, and answers of some length.

    System turns are left out, and so are answers of fewer than `ngram` words, which many questions share.
    """
    answers = [turn for turn in document.turns() if turn["role"] == "assistant"]
    texts = [turn["content"] for turn in document.turns() if turn["role"] not in ("assistant", "system")]
    texts += [text for text in (document.prompt, document.text) if text is not None]
    for text in texts:
        yield document.where, text
    for text in [turn["content"] for turn in answers] + ([document.completion] if document.completion else []):
        if len(normalize(text).split()) >= ngram:
            yield document.where, text


@dataclass(slots=True)
class _Runs:
    """Runs of `ngram` words in the evaluation texts: sorted hashes, the text each is from, and a filter before them."""

    ngram: int
    hashes: np.ndarray
    owners: np.ndarray
    filter: np.ndarray
    shift: np.uint64

    @classmethod
    def of(cls, ngram: int, hashes: np.ndarray, owners: np.ndarray) -> _Runs:
        """Sort the runs; the filter has 8 to 16 places a run, so that most runs of a clean document end there."""
        order = np.argsort(hashes, kind="stable")
        bits = min(MAX_FILTER_BITS, max(10, len(hashes).bit_length() + 3))
        shift = np.uint64(64 - bits)
        table = np.zeros(1 << bits, dtype=bool)
        table[hashes >> shift] = True
        return cls(ngram, hashes[order], owners[order], table, shift)

    def owners_of(self, words: np.ndarray) -> np.ndarray:
        """The evaluation texts whose runs are among those of these words: int32, once for each distinct run."""
        runs = roll(words, self.ngram)
        runs = runs[self.filter[runs >> self.shift]]
        if not len(runs):
            return self.owners[:0]
        runs = np.unique(runs)
        left = np.searchsorted(self.hashes, runs, side="left")
        counts = np.searchsorted(self.hashes, runs, side="right") - left
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.owners[np.repeat(left, counts) + within]


@dataclass(slots=True)
class Decontaminator:
    """A stage that counts or drops documents with evaluation text. Plain arrays: cheap to hand to other processes."""

    config: DecontaminationConfig
    report: dict[str, Any]
    """Evaluation texts given, looked for, and why others are not, with the first places."""
    name: str = "decontamination"
    _places: list[str] = field(default_factory=list)
    _sizes: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    _tables: list[_Runs] = field(default_factory=list)

    @classmethod
    def build(cls, texts: Iterable[tuple[str, str]], config: DecontaminationConfig) -> Decontaminator:
        """Collect the runs of evaluation texts, given with their places; each distinct text counts once.

        Raises DataError where no text has the words to be looked for.
        """
        names = ("texts", "checked", "repeated", "too_short", "only_shared_wording")
        made = cls(config, {**dict.fromkeys(names, 0), "ignored_runs": 0, "examples": {}})
        parts: dict[int, list[tuple[np.ndarray, int]]] = {}
        seen: set[int] = set()
        iterator = iter(texts)
        while batch := list(islice(iterator, BATCH_TEXTS)):
            normalized = [normalize(text) for _, text in batch]
            words, offsets = word_hashes(normalized)
            for row, (where, _) in enumerate(batch):
                made.report["texts"] += 1
                own = words[offsets[row] : offsets[row + 1]]
                if len(own) < MIN_WORDS:
                    made._skip("too_short", where)
                    continue
                digest = normal_digest(normalized[row]) or 0
                if digest in seen:
                    made._skip("repeated", where)
                    continue
                seen.add(digest)
                length = min(config.ngram, len(own))
                parts.setdefault(length, []).append((np.unique(roll(own, length)), len(made._places)))
                made._places.append(where)
        made._finish(parts)
        return made

    def _skip(self, reason: str, where: str) -> None:
        self.report[reason] += 1
        places = self.report["examples"].setdefault(reason, [])
        if len(places) < EXAMPLES:
            places.append(where)

    def _finish(self, parts: dict[int, list[tuple[np.ndarray, int]]]) -> None:
        self._sizes = np.zeros(len(self._places), dtype=np.int64)
        for length, found in sorted(parts.items()):
            hashes = np.concatenate([runs for runs, _ in found])
            owners = np.repeat(np.array([owner for _, owner in found], np.int32), [len(runs) for runs, _ in found])
            if length == self.config.ngram:
                _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
                common = counts[inverse] > MAX_SHARED
                self.report["ignored_runs"] += int((counts > MAX_SHARED).sum())
                hashes, owners = hashes[~common], owners[~common]
            self._sizes += np.bincount(owners, minlength=len(self._sizes))
            self._tables.append(_Runs.of(length, hashes, owners))
        for owner in np.flatnonzero(self._sizes == 0).tolist():
            self._skip("only_shared_wording", self._places[owner])
        self.report["checked"] = int((self._sizes > 0).sum())
        if not self.report["checked"]:
            raise DataError(
                f"none of the {self.report['texts']} evaluation texts for decontamination can be looked for: "
                f"{self.report['too_short']} have fewer than {MIN_WORDS} words and "
                f"{self.report['only_shared_wording']} only runs that are in more than {MAX_SHARED} texts; check the files"
            )

    def match(self, text: str) -> tuple[str, float] | None:
        """The evaluation text (its place) of which `text` holds the largest share, and that share; None where clean."""
        words, _ = word_hashes([normalize(text)])
        owners = np.concatenate([table.owners_of(words) for table in self._tables])
        if not len(owners):
            return None
        distinct, counts = np.unique(owners, return_counts=True)
        shares = counts / self._sizes[distinct]
        best = int(np.argmax(shares))
        if shares[best] < self.config.min_overlap:
            return None
        return self._places[distinct[best]], float(shares[best])

    def __call__(self, document: Document, tally: Tally) -> Document | None:
        """Count, and by policy drop, a document that holds evaluation text; its texts are looked at as one."""
        found = self.match("\n".join(document.texts()))
        if found is None:
            return document
        where = f"{document.where} ({found[1]:.0%} of {found[0]})"
        if self.config.policy is DecontaminationPolicy.drop:
            tally.drop(self.name, "holds evaluation text", where)
            return None
        tally.note(self.name, "holds evaluation text", where)
        return document
