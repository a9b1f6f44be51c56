"""Filters that drop whole rows: by length, phrases, echoes and language, as py3langid sees it; and languages over a sample."""

from __future__ import annotations

import difflib
import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from trainer.data.config import FilterConfig
from trainer.data.document import Document, Tally, texts_in

MIN_JUDGED_CHARACTERS = 60
"""Characters outside code below which nothing is judged: short texts are guessed badly."""
JUDGED_CHARACTERS = 3000
"""A document is judged by this many characters from its start; more does not change the answer."""
NO_LANGUAGE = "zxx"
"""ISO 639-2: no linguistic content (code, numbers)."""
FENCED = re.compile(r"^ {0,3}(`{3,}(?=[^`\n]*$)|~{3,}).*?(^ {0,3}\1[`~]*[ \t\r]*$|\Z)", re.MULTILINE | re.DOTALL)
"""Code between Markdown fences (CommonMark 0.31, section 4.5); one that is never closed reaches to the end."""
MIN_ECHO_CHARACTERS = 12
"""Letters and digits of an answer that counts as an echo: people do answer hello with hello."""
UNJUDGED = "unjudged"
"""How the count names documents too short to judge or without linguistic content."""


@functools.cache
def _identifier() -> Any:
    """The model, 0.5 s to load, once a process: naive Bayes over byte n-grams (Lui and Baldwin, langid.py, ACL 2012)."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def detect_language(document: Document) -> tuple[str, float] | None:
    """(ISO 639 code, probability 0 to 1) of a document without its code, system prompts and rejected answers.

    None where it has too little text to judge, or none in a language.
    """
    texts = [turn["content"] for turn in document.conversation() if turn["role"] != "system"]
    return detect_text_language("\n".join([*texts, document.text or ""]))


def detect_text_language(text: str) -> tuple[str, float] | None:
    """(ISO 639 code, probability 0 to 1) of a text without its code; None where it is too short, or in no language."""
    text = FENCED.sub("", text)[:JUDGED_CHARACTERS].strip()
    if len(text) < MIN_JUDGED_CHARACTERS:
        return None
    code, probability = _identifier().classify(text)
    return None if code == NO_LANGUAGE else (str(code), float(probability))


def count_languages(documents: Iterable[Document]) -> dict[str, int]:
    """Documents by language, commonest first; `unjudged` are those with too little text."""
    counts = Counter(found[0] if (found := detect_language(document)) else UNJUDGED for document in documents)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def learned_answers(document: Document) -> list[str]:
    """Texts that are learned as answers: the assistant's turns that are not masked; never rejected ones."""
    turns = document.chosen or document.conversation()
    learned = [turn for turn in turns if turn["role"] == "assistant" and turn.get("train", True)]
    return [text for turn in learned for text in texts_in(turn)]


def has_echo(document: Document) -> bool:
    """Whether an answer of some length is its question again, but for case, punctuation and white space."""
    for before, after in itertools.pairwise(document.conversation()):
        if before["role"] == "user" and after["role"] == "assistant" and after.get("train", True):
            asked, answer = ("".join(filter(str.isalnum, turn["content"].casefold())) for turn in (before, after))
            if asked == answer and len(answer) >= MIN_ECHO_CHARACTERS:
                return True
    return False


class Filters:
    """The filter stage. Drops a row under the first reason it meets, cheap ones first.

    Length and language are judged on the whole row, phrases on what is learned. Rows marked undesirable are spared phrases
    and echoes: they are learned as what not to say.
    """

    name = "filters"

    def __init__(self, config: FilterConfig) -> None:
        self.config = config
        phrases = sorted({re.sub(r"\s+", r" ", phrase.strip()) for phrase in config.drop_phrases})
        pattern = "|".join(re.escape(phrase).replace(r"\ ", r"\s+") for phrase in phrases)
        self.phrases = re.compile(pattern, re.IGNORECASE) if phrases else None

    def __call__(self, document: Document, tally: Tally) -> Document | None:
        size, low, high = sum(map(len, document.texts())), self.config.min_characters, self.config.max_characters
        large = "too_many_characters" if high is not None and size > high else None
        reason, remark = "too_few_characters" if size < low else large, ""
        if reason is None and document.desirable is not False:
            reason = self._reason_in_learned_text(document)
        if reason is None and self.config.languages:
            if (found := detect_language(document)) is None:
                tally.note(self.name, "language_not_judged", document.where)
            elif found[0] not in self.config.languages:
                reason, remark = "other_language", f" ({found[0]} {found[1]:.2f})"
        if reason is None:
            return document
        tally.drop(self.name, reason, document.where + remark)
        return None

    def _reason_in_learned_text(self, document: Document) -> str | None:
        texts = learned_answers(document)
        if texts and sum(len(text.strip()) for text in texts) < self.config.min_completion_characters:
            return "completion_too_short"
        if self.config.drop_echoes and has_echo(document):
            return "echoes_prompt"
        learned = "\n".join(texts) or document.text or ""
        return "phrase" if self.phrases is not None and self.phrases.search(learned) else None


def problems(config: FilterConfig) -> Iterator[str]:
    """Bounds that cross, empty phrases, languages that the detector does not know."""
    low, high = config.min_characters, config.max_characters
    if high is not None and high < low:
        yield f"data.filters.max_characters={high} is below data.filters.min_characters={low}: every row would go"
    if any(not phrase.strip() for phrase in config.drop_phrases):
        yield "data.filters.drop_phrases has an empty phrase, which every text contains; remove it"
    if not config.languages:
        return
    known = {str(code) for code in _identifier().labels} - {NO_LANGUAGE}
    for code in config.languages:
        if code not in known:
            near = difflib.get_close_matches(code.lower(), sorted(known), n=1, cutoff=0.5)
            near = [code[:2].lower()] if code[:2].lower() in known else near
            hint = f"; did you mean {near[0]}?" if near else ""
            yield f"data.filters.languages: {code!r} is not an ISO 639 code the detector knows{hint}"
