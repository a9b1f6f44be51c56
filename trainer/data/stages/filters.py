"""Filters that drop whole rows: by length, phrases, echoes and language, as py3langid sees it; and languages over a sample."""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from typing import Any

from trainer.data.config import FilterConfig
from trainer.data.document import Document, Tally, texts_in

SHORTEST = 60
"""Characters outside code below which nothing is judged: short texts are guessed badly."""
JUDGED_CHARACTERS = 3000
"""A document is judged by this many characters from its start; more does not change the answer."""
NO_LANGUAGE = "zxx"
"""ISO 639-2: no linguistic content (code, numbers)."""
FENCE = re.compile(r"^ {0,3}(`{3,}(?=[^`\n]*$)|~{3,})", re.MULTILINE)
"""The opening of a Markdown code fence."""
SHORTEST_ECHO = 12
"""Letters and digits of an answer that counts as an echo: people do answer hello with hello."""
UNJUDGED = "unjudged"
"""How the count names documents too short to judge or without linguistic content."""

LANGUAGES = frozenset(
    "ace af am an ar ary arz as az ba bcl be bg bn br bs ca crh cs cy da de dz el en eo es et eu ext fa fi fo fr fuv fy ga "  # noqa: SIM905
    "gcf gcr gd gl gom grc gu gug guw ha hbo he hi hr ht hu hy id ig is it ja jv ka kab kik kk km kn ko ku ky la lb lg lij ln "
    "lo lt ltg lv mg mk ml mn mr ms mt my ne nl nn no nso oc om or pa pcm pl ps pt qu ro ru rw sa sdh se si sk sl sn so sq sr "
    "st sv sw ta te tg th tk tl tr tt ug uk ur uz uzs vec vi vo wa wuu xh yo yue zh zu".split()
)
"""ISO 639 codes that the detector tells apart (py3langid 0.4)."""


@functools.cache
def _identifier() -> Any:
    """The model, 0.5 s to load, once a process."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def detect(text: str) -> tuple[str, float]:
    """(ISO 639 code, probability 0 to 1). Below some 40 characters the answer is often wrong.

    Naive Bayes over byte n-grams: Lui and Baldwin, langid.py, ACL 2012 system demonstrations.
    """
    code, probability = _identifier().classify(text)
    return str(code), float(probability)


def split_code(text: str) -> list[tuple[bool, str]]:
    """(is code, part) in order; the parts joined are `text`. Code is what stands between Markdown fences.

    Fences follow CommonMark 0.31, section 4.5: three or more backticks or tildes, closed by at least as many of the
    same; one that is never closed reaches to the end.
    """
    if "```" not in text and "~~~" not in text:
        return [(False, text)]
    parts, start = [], 0
    while opening := FENCE.search(text, start):
        mark = opening[1]
        closing = re.compile(rf"^ {{0,3}}{mark[0]}{{{len(mark)},}}[ \t\r]*$", re.MULTILINE).search(text, opening.end())
        end = closing.end() if closing else len(text)
        parts += [(False, text[start : opening.start()]), (True, text[opening.start() : end])]
        start = end
    return [part for part in [*parts, (False, text[start:])] if part[1]]


def judged_text(document: Document) -> str:
    """What the language of a document is judged by: all turns but system prompts and rejected answers, without code."""
    turns = [*(document.messages or []), *(document.chosen or [])]
    texts = [turn["content"] for turn in turns if turn["role"] != "system"]
    texts += [text for text in (document.prompt, document.completion, document.text) if text]
    prose = "".join(part for code, part in split_code("\n".join(texts)) if not code)
    return prose[:JUDGED_CHARACTERS].strip()


def share(documents: Iterable[Document], *, max_documents: int = 1000) -> dict[str, int]:
    """Documents by language, commonest first, over the first `max_documents`; `unjudged` are those with too little text."""
    counts: Counter[str] = Counter()
    for document in islice(documents, max_documents):
        text = judged_text(document)
        code = detect(text)[0] if len(text) >= SHORTEST else UNJUDGED
        counts[UNJUDGED if code == NO_LANGUAGE else code] += 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def answers(document: Document) -> list[str]:
    """Texts that are learned as answers: the completion, or the assistant turns that are not masked; never rejected ones."""
    turns = document.messages if document.chosen is None else document.chosen
    learned = [turn for turn in turns or [] if turn["role"] == "assistant" and turn.get("train", True)]
    texts = [text for turn in learned for text in texts_in(turn)]
    return texts if document.completion is None else [*texts, document.completion]


def echoes(document: Document) -> bool:
    """Whether an answer of some length is its question again, but for case, punctuation and white space."""
    pairs = [(document.prompt or "", document.completion or "")]
    turns = [*(document.messages or []), *(document.chosen or [])]
    for before, after in itertools.pairwise(turns):
        if before["role"] == "user" and after["role"] == "assistant" and after.get("train", True):
            pairs.append((before["content"], after["content"]))
    said = [["".join(filter(str.isalnum, text.casefold())) for text in pair] for pair in pairs]
    return any(question == answer and len(answer) >= SHORTEST_ECHO for question, answer in said)


class Filters:
    """The filter stage. Drops a row under the first reason it meets, cheap ones first.

    Length and language are judged on the whole row, phrases on what is learned. Rows marked undesirable are spared phrases
    and echoes: they are learned as what not to say.
    """

    name = "filters"

    def __init__(self, config: FilterConfig) -> None:
        self.config = config
        self.languages = frozenset(config.languages)
        phrases = sorted({re.sub(r"\s+", r" ", phrase.strip()) for phrase in config.drop_phrases})
        pattern = "|".join(re.escape(phrase).replace(r"\ ", r"\s+") for phrase in phrases)
        self.phrases = re.compile(pattern, re.IGNORECASE) if phrases else None

    def __call__(self, document: Document, tally: Tally) -> Document | None:
        reason, remark = self._length(document), ""
        if reason is None and document.desirable is not False:
            reason = self._learned(document)
        if reason is None and self.languages:
            reason, remark = self._language(document, tally)
        if reason is None:
            return document
        tally.drop(self.name, reason, document.where + remark)
        return None

    def _length(self, document: Document) -> str | None:
        config, texts = self.config, document.texts()
        size = sum(map(len, texts))
        if size < config.min_characters:
            return "too_few_characters"
        if config.max_characters is not None and size > config.max_characters:
            return "too_many_characters"
        return None

    def _learned(self, document: Document) -> str | None:
        config, texts = self.config, answers(document)
        conversation = bool(texts)
        if conversation and sum(len(text.strip()) for text in texts) < config.min_completion_characters:
            return "completion_too_short"
        if config.drop_echoes and echoes(document):
            return "echoes_prompt"
        learned = "\n".join(texts) if conversation else document.text or ""
        return "phrase" if self.phrases is not None and self.phrases.search(learned) else None

    def _language(self, document: Document, tally: Tally) -> tuple[str | None, str]:
        text = judged_text(document)
        if len(text) >= SHORTEST:
            code, probability = detect(text)
            remark = f" ({code} {probability:.2f})"
            if code != NO_LANGUAGE:
                if code not in self.languages:
                    return "other_language", remark
                uncertain = probability < self.config.min_language_probability
                return ("uncertain_language", remark) if uncertain else (None, "")
        tally.note(self.name, "language_not_judged", document.where)
        return None, ""
