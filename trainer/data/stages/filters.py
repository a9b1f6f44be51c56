"""Filters that drop whole rows: by length, phrases, echoes and language."""

from __future__ import annotations

import itertools
import re

from strategies.errors import ConfigError
from trainer.data.config import FilterConfig
from trainer.data.document import Document, Tally, texts_in
from trainer.data.stages import language

# Han and kana are written without spaces: each character counts as a word. So is each four of the scripts of South-East Asia.
WIDE = "\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
RUN = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
WORD = re.compile(rf"[{WIDE}]|[{RUN}]{{1,4}}|[^\s{WIDE}{RUN}]+")


def words(text: str) -> list[str]:
    """Words between white space; in scripts without spaces one for a Han or kana character, one for four Thai ones."""
    return text.split() if text.isascii() else WORD.findall(text)


def problems(config: FilterConfig) -> list[str]:
    """One line for each setting that contradicts another or cannot be used; ranges of single numbers aside."""
    lines = language.problems(config.languages)
    for unit in ("characters", "words"):
        low, high = getattr(config, f"min_{unit}"), getattr(config, f"max_{unit}")
        if high is not None and high < low:
            lines.append(f"data.filters.max_{unit}={high} is below data.filters.min_{unit}={low}: every row would go")
    if any(not phrase.strip() for phrase in config.drop_phrases):
        lines.append("data.filters.drop_phrases has an empty phrase, which every text contains; remove it")
    return lines


def answers(document: Document) -> list[str]:
    """Texts that are learned as answers: the completion, or the assistant turns that are not masked; never rejected ones."""
    turns = document.messages if document.chosen is None else document.chosen
    learned = [turn for turn in turns or [] if turn["role"] == "assistant" and turn.get("train", True)]
    texts = [text for turn in learned for text in texts_in(turn)]
    return texts if document.completion is None else [*texts, document.completion]


def _folded(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalnum())


def echoes(document: Document) -> bool:
    """Whether an answer of four words or more is its question again, but for case, punctuation and white space."""
    pairs = [(document.prompt or "", document.completion or "")]
    turns = [*(document.messages or []), *(document.chosen or [])]
    for before, after in itertools.pairwise(turns):
        if before["role"] == "user" and after["role"] == "assistant" and after.get("train", True):
            pairs.append((before["content"], after["content"]))
    return any(len(words(answer)) >= 4 and _folded(question) == _folded(answer) != "" for question, answer in pairs)


class Filters:
    """The filter stage. Drops a row under the first reason it meets, cheap ones first.

    Length and language are judged on the whole row, phrases on what is learned. Rows marked undesirable are spared phrases
    and echoes: they are learned as what not to say. Raises ConfigError.
    """

    name = "filters"

    def __init__(self, config: FilterConfig) -> None:
        if found := problems(config):
            raise ConfigError(found)
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
        if config.min_words or config.max_words is not None:
            number = sum(len(words(text)) for text in texts)
            if number < config.min_words:
                return "too_few_words"
            if config.max_words is not None and number > config.max_words:
                return "too_many_words"
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
        text = language.judged_text(document)
        if len(text) >= self.config.min_language_chars:
            code, probability = language.detect(text)
            remark = f" ({code} {probability:.2f})"
            if code != language.NO_LANGUAGE:
                if code not in self.languages:
                    return "other_language", remark
                uncertain = probability < self.config.min_language_probability
                return ("uncertain_language", remark) if uncertain else (None, "")
        tally.note(self.name, "language_not_judged", document.where)
        return None, ""
