"""Filters that drop whole rows: by length, phrases, echoes and language; and the count of languages in a sample.

Languages are told by py3langid.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from trainer.data.config import FilterConfig
from trainer.data.document import Document, Tally, message_texts

MIN_JUDGED_CHARACTERS = 60
"""Characters outside code below which nothing is judged: short texts are guessed badly."""
JUDGED_CHARACTERS = 3000
"""A document is judged by this many characters from its start; more does not change the answer."""
NO_LANGUAGE = "zxx"
"""ISO 639-2: no linguistic content (code, numbers)."""
FENCED_CODE_REGEX = re.compile(
    r"^ {0,3}(`{3,}(?=[^`\n]*$)|~{3,}).*?(^ {0,3}\1[`~]*[ \t\r]*$|\Z)", re.MULTILINE | re.DOTALL
)
"""Code between Markdown fences (CommonMark 0.31, section 4.5); one that is never closed reaches to the end."""
MIN_ECHO_CHARACTERS = 12
"""Letters and digits of an answer that counts as an echo: people do answer hello with hello."""
UNJUDGED_KEY = "unjudged"
"""How the count names documents too short to judge or without linguistic content."""


@functools.cache
def _language_identifier() -> Any:
    """The language model, loaded once a process (0.5 s): naive Bayes over byte n-grams (Lui and Baldwin, langid.py, ACL 2012)."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


class DetectedLanguage(NamedTuple):
    """The language that a text is probably in."""

    code: str
    """ISO 639, such as "en"."""
    probability: float
    """0 to 1."""


def detect_language(document: Document) -> DetectedLanguage | None:
    """Detect the language of a document, such as ("en", 0.99).

    Code, system prompts and rejected answers are left out. None if it has too little text to judge, or none in a language.
    """
    texts = [turn["content"] for turn in document.conversation() if turn["role"] != "system"]
    return detect_text_language("\n".join([*texts, document.text or ""]))


def detect_text_language(text: str) -> DetectedLanguage | None:
    """Detect the language of a text without its code (in fences), such as ("en", 0.99).

    None if it is too short to judge, or in no language.
    """
    # Code looks like English to the detector.
    text = FENCED_CODE_REGEX.sub("", text)[:JUDGED_CHARACTERS].strip()
    if len(text) < MIN_JUDGED_CHARACTERS:
        return None
    language, probability = _language_identifier().classify(text)
    if language == NO_LANGUAGE:
        return None
    return DetectedLanguage(str(language), float(probability))


def count_languages(documents: Iterable[Document]) -> dict[str, int]:
    """Count documents by language for the report, the most frequent first: {"en": 812, "de": 90, "unjudged": 98}.

    `unjudged` are those with too little text, or none in a language.
    """
    counts: Counter[str] = Counter()
    for document in documents:
        detected = detect_language(document)
        counts[UNJUDGED_KEY if detected is None else detected.code] += 1
    return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


def learned_answers(document: Document) -> list[str]:
    """Find the texts that are learned as answers: those of the assistant's turns that are not masked; never rejected ones."""
    turns = document.chosen or document.conversation()
    texts: list[str] = []
    for turn in turns:
        if turn["role"] == "assistant" and turn.get("train", True):
            texts += message_texts(turn)
    return texts


def has_echo(document: Document) -> bool:
    """Whether an answer that is learned only repeats its question, but for case, punctuation and white space.

    Short answers are spared, since people do answer hello with hello.
    """
    for turn, next_turn in itertools.pairwise(document.conversation()):
        is_question = turn["role"] == "user"
        is_learned_answer = next_turn["role"] == "assistant" and next_turn.get("train", True)
        if not (is_question and is_learned_answer):
            continue
        answer = _letters_and_digits(next_turn["content"])
        if len(answer) >= MIN_ECHO_CHARACTERS and answer == _letters_and_digits(turn["content"]):
            return True
    return False


def _letters_and_digits(text: str) -> str:
    """A text without case, punctuation and white space."""
    return "".join(filter(str.isalnum, text.casefold()))


class Filters:
    """The stage of preparation that drops documents by length, phrases, echoes and language, as `data.filters` says.

    A document is dropped under the first reason it meets, cheap ones first. Length and language are judged on the whole row,
    phrases on what is learned. Rows marked undesirable are spared phrases and echoes: they are learned as what not to say.
    """

    name = "filters"

    def __init__(self, config: FilterConfig) -> None:
        self.config = config
        phrases = sorted({re.sub(r"\s+", r" ", phrase.strip()) for phrase in config.drop_phrases})
        # Any white space between words matches, line breaks included.
        pattern = "|".join(re.escape(phrase).replace(r"\ ", r"\s+") for phrase in phrases)
        self.any_phrase_regex = re.compile(pattern, re.IGNORECASE) if phrases else None

    def __call__(self, document: Document, tally: Tally) -> Document | None:
        """Filter a document: returns it, or None if one of the filters drops it, which `tally` then counts under its reason.

        Filters in order: length of all texts; what is learned, unless the row is marked undesirable; language.
        """
        reason = self._drop_reason_by_length(document)
        remark = ""  # on the location, for the list of drops
        if reason is None and document.desirable is not False:
            reason = self._drop_reason_by_learned_text(document)
        if reason is None and self.config.languages:
            detected = detect_language(document)
            if detected is None:
                tally.note(self.name, "language_not_judged", document.location)
            elif detected.code not in self.config.languages:
                reason = "other_language"
                remark = f" ({detected.code} {detected.probability:.2f})"
        if reason is None:
            return document
        tally.drop(self.name, reason, document.location + remark)
        return None

    def _drop_reason_by_length(self, document: Document) -> str | None:
        """Say why a document is dropped because of the length of all its texts together; None if it is kept."""
        num_characters = sum(map(len, document.texts()))
        if num_characters < self.config.min_characters:
            return "too_few_characters"
        if self.config.max_characters is not None and num_characters > self.config.max_characters:
            return "too_many_characters"
        return None

    def _drop_reason_by_learned_text(self, document: Document) -> str | None:
        """Say why a document is dropped because of the text that is learned (its answers, or a plain text); None if it is kept.

        Reasons, in this order: "completion_too_short", "echoes_prompt", "phrase".
        """
        answers = learned_answers(document)
        num_characters = sum(len(text.strip()) for text in answers)
        if answers and num_characters < self.config.min_completion_characters:
            return "completion_too_short"
        if self.config.drop_echoes and has_echo(document):
            return "echoes_prompt"
        learned_text = "\n".join(answers) or document.text or ""
        if self.any_phrase_regex is not None and self.any_phrase_regex.search(learned_text):
            return "phrase"
        return None


def filter_problems(config: FilterConfig) -> Iterator[str]:
    """Find what is wrong with `data.filters`: bounds that cross, empty phrases, languages that the detector does not know.

    Each problem is one sentence with the setting and what to do.
    """
    min_characters = config.min_characters
    max_characters = config.max_characters
    if max_characters is not None and max_characters < min_characters:
        yield (
            f"data.filters.max_characters={max_characters} is below data.filters.min_characters={min_characters}: every row "
            "would go"
        )
    if any(not phrase.strip() for phrase in config.drop_phrases):
        yield "data.filters.drop_phrases has an empty phrase, which every text contains; remove it"
    if config.languages:
        yield from _language_problems(config.languages)


def _language_problems(languages: list[str]) -> Iterator[str]:
    """Write a problem for each language code that the detector does not know, with the code that is probably meant."""
    known_codes = {str(code) for code in _language_identifier().labels} - {NO_LANGUAGE}
    for code in languages:
        if code in known_codes:
            continue
        two_letters = code[:2].lower()  # of a code with a region, such as de-AT, or of an English name
        if two_letters in known_codes:
            suggestions = [two_letters]
        else:
            suggestions = difflib.get_close_matches(code.lower(), sorted(known_codes), n=1, cutoff=0.5)
        hint = f"; did you mean {suggestions[0]}?" if suggestions else ""
        yield f"data.filters.languages: {code!r} is not an ISO 639 code the detector knows{hint}"
