"""Decontamination: training documents that hold text of given evaluation sets, found by runs of 13 words.

The rule is that of Brown et al. (2020, Language Models are Few-Shot Learners, appendix C): one run of 13 words in
common, compared without case and punctuation. Evaluation texts of fewer words are looked for as a whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from strategies.errors import DataError
from trainer.data.config import DecontaminationConfig, DecontaminationPolicy
from trainer.data.document import Document, Tally
from trainer.data.selection.signatures import mix, normalize

NGRAM = 13
"""Words in a run that counts as evaluation text."""
MIN_WORDS = 5
"""Evaluation texts of fewer words are not looked for: many documents hold them by chance."""
MAX_SHARED = 10
"""Runs in more evaluation texts than this are the set's own wording, and ignored."""


def _hash_words(text: str) -> np.ndarray:
    """uint64: a hash for each word, the same in this process and those forked from it."""
    return mix(np.array([hash(word) for word in normalize(text).split()], np.int64).view(np.uint64))


def _hash_ngrams(words: np.ndarray, length: int) -> np.ndarray:
    """uint64: a hash for each distinct run of `length` words; runs of different lengths have different hashes."""
    num_runs = max(len(words) - length + 1, 0)
    hashes = np.full(num_runs, length, np.uint64)
    for step in range(length):
        # A polynomial rolling hash; uint64 wraps around on overflow.
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + words[step : step + num_runs]
    return np.unique(hashes)


def evaluation_texts(document: Document) -> Iterator[tuple[str, str]]:
    """(file:line, text) of an evaluation document for a `Decontaminator`: its questions, and answers of some length.

    System turns are left out, and so are answers of fewer than 13 words, which many questions share.
    """
    turns = [*document.conversation(), *(document.rejected or [])]
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    texts = [turn["content"] for turn in turns if turn["role"] not in ("assistant", "system")]
    if document.text is not None:
        texts.append(document.text)
    texts += [text for text in answers if len(normalize(text).split()) >= NGRAM]
    return ((document.location, text) for text in texts)


class Decontaminator:
    """A stage that counts or drops documents that hold one of `texts`, (place, text) each; equal texts count once.

    Raises DataError where no text has the words to be looked for.
    """

    name = "decontamination"

    def __init__(self, texts: Iterable[tuple[str, str]], config: DecontaminationConfig) -> None:
        self.policy = config.policy
        self.skipped: Counter[str] = Counter()
        """Evaluation texts that are not looked for, by reason."""
        self._places: list[str] = []
        """`file:line` of each evaluation text that is looked for."""
        ngrams_of_texts: list[np.ndarray] = []
        lengths: list[int] = []
        seen_texts: set[bytes] = set()
        for location, text in texts:
            words = _hash_words(text)
            if len(words) < MIN_WORDS:
                self.skipped["too_short"] += 1
                continue
            if words.tobytes() in seen_texts:
                self.skipped["repeated"] += 1
                continue
            seen_texts.add(words.tobytes())
            lengths.append(min(NGRAM, len(words)))
            ngrams_of_texts.append(_hash_ngrams(words, lengths[-1]))
            self._places.append(location)
        self._lengths = sorted({*lengths})
        """Words of a run: 13, and those of the shorter texts."""
        ngrams = np.concatenate([np.zeros(0, np.uint64), *ngrams_of_texts])
        ngram_counts = np.array([len(part) for part in ngrams_of_texts], np.int64)
        owners = np.repeat(np.arange(len(ngrams_of_texts)), ngram_counts)
        _, inverse, counts = np.unique(ngrams, return_inverse=True, return_counts=True)
        # Runs that many texts share are the set's own wording. A text shorter than 13 words is kept as it is.
        is_telling = (counts[inverse] <= MAX_SHARED) | (np.array(lengths, np.int64)[owners] < NGRAM)
        # Sorted by hash, so that `match` finds the owners of a run by bisection.
        order = np.argsort(ngrams[is_telling], kind="stable")
        self._ngrams = ngrams[is_telling][order]
        """Sorted, for `np.searchsorted`."""
        self._owners = owners[is_telling][order]
        """Number of the evaluation text that each run is of."""
        self._ngrams_per_text = np.bincount(self._owners, minlength=len(ngrams_of_texts))
        self.skipped["only_shared_wording"] = int((self._ngrams_per_text == 0).sum())
        if not self._ngrams_per_text.any():
            num_texts = len(self._places) + self.skipped["too_short"] + self.skipped["repeated"]
            raise DataError(
                f"none of the {num_texts} evaluation texts for "
                f"decontamination can be looked for: {self.skipped['too_short']} have fewer than {MIN_WORDS} words and "
                f"{self.skipped['only_shared_wording']} only runs that are in more than {MAX_SHARED} texts; check the files"
            )

    def match(self, text: str) -> tuple[str, float] | None:
        """(place of the evaluation text of which `text` holds the largest share, that share); None if it holds none."""
        words = _hash_words(text)
        ngrams = np.concatenate([_hash_ngrams(words, length) for length in self._lengths])
        begins = np.searchsorted(self._ngrams, ngrams, "left")
        ends = np.searchsorted(self._ngrams, ngrams, "right")
        is_shared = begins < ends
        shared_counts = np.zeros(len(self._ngrams_per_text), np.int64)
        for begin, end in zip(begins[is_shared].tolist(), ends[is_shared].tolist(), strict=True):
            shared_counts[self._owners[begin:end]] += 1
        shares = shared_counts / np.maximum(self._ngrams_per_text, 1)
        best = int(np.argmax(shares))
        return (self._places[best], float(shares[best])) if shares[best] > 0 else None

    def __call__(self, document: Document, tally: Tally) -> Document | None:
        """Count, and by policy drop, a document that holds evaluation text; its texts are looked at as one."""
        match = self.match("\n".join(document.texts()))
        if match is None:
            return document
        place, share = match
        location = f"{document.location} ({share:.0%} of {place})"
        if self.policy is DecontaminationPolicy.drop:
            tally.drop(self.name, "holds evaluation text", location)
            return None
        tally.note(self.name, "holds evaluation text", location)
        return document
