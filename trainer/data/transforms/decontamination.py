"""Decontamination: finds training documents that contain text of given evaluation sets, by runs of 13 words.

The rule is that of Brown et al. (2020, Language Models are Few-Shot Learners, appendix C): one run of 13 words in
common, compared without case and punctuation. Evaluation texts of fewer words are looked for as a whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from strategies.errors import DataError
from trainer.data.config import DecontaminationConfig, DecontaminationPolicy
from trainer.data.document import Document, Tally
from trainer.data.selection.document_hashes import mix_bits, normalize

WORDS_PER_RUN = 13
"""Words in a run that counts as evaluation text."""
MIN_WORDS = 5
"""Evaluation texts of fewer words are not looked for: many documents hold them by chance."""
MAX_TEXTS_PER_RUN = 10
"""Runs in more evaluation texts than this are the set's own wording, and ignored."""
_HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""Odd, with bits all over: 2^64 divided by the golden ratio."""


def _hash_words(text: str) -> np.ndarray:
    """Hash each word of a text, uint64 [words]: the same in this process and those forked from it.

    Python's own hash is fast; it differs between processes that are started anew.
    """
    words = normalize(text).split()
    hashes = np.array([hash(word) for word in words], np.int64)
    return mix_bits(hashes.view(np.uint64))


def _hash_ngrams(word_hashes: np.ndarray, length: int) -> np.ndarray:
    """Hash each distinct run of `length` words of a text, uint64, ascending; runs of different lengths have different hashes.

    `word_hashes`: uint64 [words]. The result is empty if the text has fewer words.
    """
    num_runs = max(len(word_hashes) - length + 1, 0)
    hashes = np.full(num_runs, length, np.uint64)
    for offset in range(length):
        # A polynomial rolling hash; uint64 wraps around on overflow.
        hashes = hashes * _HASH_FACTOR + word_hashes[offset : offset + num_runs]
    return np.unique(hashes)


class EvaluationText(NamedTuple):
    """A text of an evaluation set, which training data must not contain."""

    location: str
    """`file:line` of its row."""
    text: str


class Contamination(NamedTuple):
    """An evaluation text of which a training document holds something."""

    location: str
    """`file:line` of the evaluation text."""
    share: float
    """How many of its runs of words the document has, 0 to 1."""


def texts_to_decontaminate_from(document: Document) -> Iterator[EvaluationText]:
    """Find what of an evaluation document training data must not contain: its questions, and answers of some length.

    System turns are left out, and so are answers of fewer than `WORDS_PER_RUN` words, which many questions share.
    """
    turns = [*document.conversation(), *(document.rejected or [])]
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    texts = [turn["content"] for turn in turns if turn["role"] not in ("assistant", "system")]
    if document.text is not None:
        texts.append(document.text)
    texts += [text for text in answers if len(normalize(text).split()) >= WORDS_PER_RUN]
    return (EvaluationText(document.location, text) for text in texts)


class Decontaminator:
    """The stage of preparation that counts or drops training documents that contain text of evaluation sets."""

    name = "decontamination"

    def __init__(self, texts: Iterable[EvaluationText], config: DecontaminationConfig) -> None:
        """Index the evaluation texts by their runs of 13 words, or as a whole if they are shorter; equal ones count once.

        Raises DataError if none of the texts can be looked for.
        """
        self.policy = config.policy
        self.skipped: Counter[str] = Counter()
        """Evaluation texts that are not looked for, by reason."""
        self._locations: list[str] = []
        """`file:line` of each evaluation text that is looked for."""
        ngrams_of_texts: list[np.ndarray] = []
        ngram_lengths: list[int] = []
        earlier_texts: set[bytes] = set()
        for location, text in texts:
            word_hashes = _hash_words(text)
            if len(word_hashes) < MIN_WORDS:
                self.skipped["too_short"] += 1
                continue
            if word_hashes.tobytes() in earlier_texts:
                self.skipped["repeated"] += 1
                continue
            earlier_texts.add(word_hashes.tobytes())
            ngram_length = min(WORDS_PER_RUN, len(word_hashes))
            ngram_lengths.append(ngram_length)
            ngrams_of_texts.append(_hash_ngrams(word_hashes, ngram_length))
            self._locations.append(location)
        self._ngram_lengths = sorted({*ngram_lengths})
        """Words of a run: 13, and those of the shorter texts."""

        # One row for each run of each text.
        ngrams = np.concatenate([np.zeros(0, np.uint64), *ngrams_of_texts])
        ngrams_per_text = np.array([len(text_ngrams) for text_ngrams in ngrams_of_texts], np.int64)
        text_of_ngram = np.repeat(np.arange(len(ngrams_of_texts)), ngrams_per_text)
        _, inverse, counts = np.unique(ngrams, return_inverse=True, return_counts=True)
        # Runs that many texts share are the set's own wording. A text shorter than 13 words is kept as it is.
        is_rare = counts[inverse] <= MAX_TEXTS_PER_RUN
        is_whole_text = np.array(ngram_lengths, np.int64)[text_of_ngram] < WORDS_PER_RUN
        is_used = is_rare | is_whole_text
        # Sorted by hash, so that `find_best_match` finds the texts of a run by bisection.
        order = np.argsort(ngrams[is_used], kind="stable")
        self._ngrams = ngrams[is_used][order]
        """Sorted, for `np.searchsorted`."""
        self._text_of_ngram = text_of_ngram[is_used][order]
        """Number of the evaluation text that each run is of."""
        self._ngrams_per_text = np.bincount(self._text_of_ngram, minlength=len(ngrams_of_texts))
        self.skipped["only_shared_wording"] = int((self._ngrams_per_text == 0).sum())
        if not self._ngrams_per_text.any():
            num_texts = len(self._locations) + self.skipped["too_short"] + self.skipped["repeated"]
            raise DataError(
                f"none of the {num_texts} evaluation texts for "
                f"decontamination can be looked for: {self.skipped['too_short']} have fewer than {MIN_WORDS} words and "
                f"{self.skipped['only_shared_wording']} only runs that are in more than {MAX_TEXTS_PER_RUN} texts; check "
                "the files"
            )

    def find_best_match(self, text: str) -> Contamination | None:
        """Find the evaluation text of which `text` holds most, by the share of its runs of words that are in `text`.

        A run of words counts once, however often it is in a text. None if `text` shares none with any evaluation text.
        """
        word_hashes = _hash_words(text)
        ngrams = np.concatenate([_hash_ngrams(word_hashes, length) for length in self._ngram_lengths])
        # The rows [begin, end) of each n-gram in the sorted table of all; none if it is in no evaluation text.
        begins = np.searchsorted(self._ngrams, ngrams, "left")
        ends = np.searchsorted(self._ngrams, ngrams, "right")
        is_shared = begins < ends
        num_shared_by_text = np.zeros(len(self._ngrams_per_text), np.int64)
        for begin, end in zip(begins[is_shared].tolist(), ends[is_shared].tolist(), strict=True):
            num_shared_by_text[self._text_of_ngram[begin:end]] += 1
        shares = num_shared_by_text / np.maximum(self._ngrams_per_text, 1)
        best_text = int(np.argmax(shares))
        if shares[best_text] == 0:
            return None
        return Contamination(self._locations[best_text], float(shares[best_text]))

    def __call__(self, document: Document, tally: Tally) -> Document | None:
        """Count, and by policy drop, a training document that holds text of an evaluation set; its texts are looked at as one.

        Returns None if it is dropped. `tally` gets its location, and the evaluation text with the share of it that was found.
        """
        match = self.find_best_match("\n".join(document.texts()))
        if match is None:
            return document
        location_and_match = f"{document.location} ({match.share:.0%} of {match.location})"
        if self.policy is DecontaminationPolicy.drop:
            tally.drop(self.name, "holds evaluation text", location_and_match)
            return None
        tally.note(self.name, "holds evaluation text", location_and_match)
        return document
