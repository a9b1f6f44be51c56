"""Filters that drop whole rows: by length, phrases, echoes, language, and by published heuristics of text quality.

`measures` is a pure function of a text; `Filters` compares its figures with the thresholds of the configuration.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from strategies.errors import ConfigError
from trainer.data.document import Document, Tally
from trainer.data.stages import language
from trainer.data.stages.tags import split_code


class Quality(StrEnum):
    """Sets of quality heuristics."""

    none = "none"
    gopher = "gopher"


@dataclass(kw_only=True, slots=True)
class GopherConfig:
    """Thresholds of the quality heuristics of Rae et al. 2021 (arXiv:2112.11446, appendix A.1), with their values."""

    min_words: int = 50
    """Learned text of fewer words is not judged: the figures mean nothing for short answers. 0 judges all."""
    min_mean_word_length: float = 3.0
    """Smallest mean length of a word, in characters."""
    max_mean_word_length: float = 10.0
    """Largest mean length of a word, in characters."""
    max_symbol_ratio: float = 0.1
    """Largest number of hash signs, and of ellipses, for each word."""
    min_alphabetic_share: float = 0.8
    """Smallest share of words with at least one letter; bullets are not words here."""
    min_letter_share: float = 0.0
    """Smallest share of letters among the characters that are not space; 0 is off, 0.6 suits prose."""
    min_stop_words: int = 0
    """Fewest of the eight English stop words of the paper, each counted once; 0 is off, 2 for data all in English."""
    max_bullet_share: float = 0.9
    """Largest share of lines that begin with a bullet."""
    max_ellipsis_share: float = 0.3
    """Largest share of lines that end with an ellipsis."""
    max_duplicate_line_share: float = 0.3
    """Largest share of lines that repeat an earlier one."""
    max_duplicate_line_characters: float = 0.2
    """Largest share of characters that stand in lines that repeat an earlier one."""
    max_top_ngram_shares: list[float] = field(default_factory=lambda: [0.20, 0.18, 0.16])
    """Largest share of characters in the commonest sequence of 2, 3 and 4 words: three numbers."""
    max_repeated_ngram_shares: list[float] = field(default_factory=lambda: [0.15, 0.14, 0.13, 0.12, 0.11, 0.10])
    """Largest share of characters in repeats of sequences of 5, 6, 7, 8, 9 and 10 words: six numbers."""


@dataclass(kw_only=True, slots=True)
class FilterConfig:
    """Which rows are dropped. Nothing is until a bound is set."""

    min_characters: int = 0
    """Drop rows with fewer characters, all texts of the row together."""
    max_characters: int | None = None
    """Drop rows with more characters, all texts of the row together; null is no bound."""
    min_words: int = 0
    """Drop rows with fewer words, all texts of the row together."""
    max_words: int | None = None
    """Drop rows with more words, all texts of the row together; null is no bound."""
    min_completion_characters: int = 0
    """Drop rows whose answers (completion, or learned turns together) have fewer characters."""
    drop_echoes: bool = False
    """Drop rows with an answer of four words or more that only says the question again."""
    drop_phrases: list[str] = field(default_factory=list)
    """Drop rows whose learned text contains one of these phrases, such as `as an AI language model`, in any case."""
    quality: Quality = Quality.none
    """Quality heuristics for learned prose: `none`, or `gopher` with the thresholds of `gopher`."""
    gopher: GopherConfig = field(default_factory=GopherConfig)
    """Thresholds of `quality: gopher`."""
    languages: list[str] = field(default_factory=list)
    """Keep rows in these languages, as ISO 639 codes such as `en`; an empty list keeps all."""
    min_language_probability: float = 0.0
    """Drop rows whose language, one of `languages`, is less probable than this, 0 to 1."""
    min_language_chars: int = 60
    """Rows with fewer characters outside code are kept without judging their language."""


# Han and kana are written without spaces: each character counts as a word. So is each four of the scripts of South-East Asia.
WIDE = "\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
RUN = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
WORD = re.compile(rf"[{WIDE}]|[{RUN}]{{1,4}}|[^\s{WIDE}{RUN}]+")
UNSPACED = re.compile(rf"[{WIDE}{RUN}]")
BULLET = re.compile(r"[-*•‣▪◦●]\s|[•‣▪◦●]")
BULLETS = frozenset("-*•‣▪◦●")
STOP_WORDS = frozenset(["the", "be", "to", "of", "and", "that", "have", "with"])


def words(text: str) -> list[str]:
    """Words between white space; in scripts without spaces one for a Han or kana character, one for four Thai ones."""
    return text.split() if text.isascii() else WORD.findall(text)


def measures(text: str) -> dict[str, float]:
    """Figures of one text, after Rae et al. 2021 (arXiv:2112.11446); `*_share` are 0 to 1, 0 for an empty text.

    `mean_word_length` is nan (nothing to judge) where most words are of scripts without spaces. `top_<n>gram_share` is
    0 where no sequence of n words comes twice. `repeated_<n>gram_share` counts the characters of words that lie in a
    sequence of n words seen before, each word once.
    """
    tokens = words(text)
    lines = [line for raw in text.split("\n") if (line := raw.strip())]
    lengths = [len(token) for token in tokens]
    characters, num_words, num_lines = sum(lengths), len(tokens) or 1, len(lines) or 1
    spaced = tokens if text.isascii() else [token for token in tokens if not UNSPACED.match(token)]
    repeats = [line for line, number in Counter(lines).items() for _ in range(number - 1)]
    ellipses = text.count("...") + text.count("…")
    figures = {
        "characters": float(len(text)),
        "words": float(len(tokens)),
        "mean_word_length": sum(map(len, spaced)) / len(spaced) if 2 * len(spaced) > len(tokens) else math.nan,
        "symbol_ratio": max(text.count("#"), ellipses) / num_words,
        "alphabetic_share": sum(map(_has_letter, tokens)) / (len(tokens) - sum(map(BULLETS.__contains__, tokens)) or 1),
        "letter_share": sum(map(str.isalpha, text)) / (characters or 1),
        "stop_words": float(len(STOP_WORDS.intersection(text.lower().split()))),
        "bullet_share": sum(BULLET.match(line) is not None for line in lines) / num_lines,
        "ellipsis_share": sum(line.endswith(("...", "…")) for line in lines) / num_lines,
        "duplicate_line_share": len(repeats) / num_lines,
        "duplicate_line_characters": sum(map(len, repeats)) / (sum(map(len, lines)) or 1),
    }
    return figures | _ngram_shares(tokens, lengths, characters or 1)


def _has_letter(token: str) -> bool:
    return token.isalpha() or any(map(str.isalpha, token))


def _ngram_shares(tokens: list[str], lengths: list[int], characters: int) -> dict[str, float]:
    shares = dict.fromkeys([f"top_{n}gram_share" for n in (2, 3, 4)], 0.0)
    shares |= dict.fromkeys([f"repeated_{n}gram_share" for n in range(5, 11)], 0.0)
    for n in range(2, 11):
        grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
        if len(set(grams)) == len(grams):
            break  # no sequence of n words comes twice, so no longer one does
        if n < 5:
            counts = Counter(grams)
            most = max(counts.values())
            longest = max(sum(map(len, gram)) for gram, number in counts.items() if number == most)
            # Overlapping occurrences ("a a a") would count characters twice.
            shares[f"top_{n}gram_share"] = min(longest * most / characters, 1.0)
        else:
            seen: set[tuple[str, ...]] = set()
            covered: set[int] = set()
            for start, gram in enumerate(grams):
                if gram in seen:
                    covered.update(range(start, start + n))
                seen.add(gram)
            shares[f"repeated_{n}gram_share"] = sum(lengths[i] for i in covered) / characters
    return shares


def gopher_reason(text: str, config: GopherConfig) -> str | None:
    """The first heuristic that `text` fails, as a reason code; None where it passes or is too short to judge."""
    figures = measures(text)
    if figures["words"] < config.min_words or not figures["words"]:
        return None
    least = {
        "mean_word_length": config.min_mean_word_length,
        "alphabetic_share": config.min_alphabetic_share,
        "letter_share": config.min_letter_share,
        "stop_words": float(config.min_stop_words),
    }
    most = {
        "mean_word_length": config.max_mean_word_length,
        "symbol_ratio": config.max_symbol_ratio,
        "bullet_share": config.max_bullet_share,
        "ellipsis_share": config.max_ellipsis_share,
        "duplicate_line_share": config.max_duplicate_line_share,
        "duplicate_line_characters": config.max_duplicate_line_characters,
    }
    most |= {f"top_{n}gram_share": bound for n, bound in enumerate(config.max_top_ngram_shares, 2)}
    most |= {f"repeated_{n}gram_share": bound for n, bound in enumerate(config.max_repeated_ngram_shares, 5)}
    for name, bound in least.items():
        if figures[name] < bound:
            return f"low_{name}"
    return next((f"high_{name}" for name, bound in most.items() if figures[name] > bound), None)


def problems(config: FilterConfig) -> list[str]:
    """One line for each setting that contradicts another or cannot be used; ranges of single numbers aside."""
    lines = language.problems(config.languages)
    for unit in ("characters", "words"):
        low, high = getattr(config, f"min_{unit}"), getattr(config, f"max_{unit}")
        if high is not None and high < low:
            lines.append(f"data.filters.max_{unit}={high} is below data.filters.min_{unit}={low}: every row would go")
    low, high = config.gopher.min_mean_word_length, config.gopher.max_mean_word_length
    if high < low:
        lines.append(f"data.filters.gopher.max_mean_word_length={high} is below min_mean_word_length={low}")
    for name, number in (("max_top_ngram_shares", 3), ("max_repeated_ngram_shares", 6)):
        shares = getattr(config.gopher, name)
        if len(shares) != number or not all(0 <= share <= 1 for share in shares):
            lines.append(f"data.filters.gopher.{name}={list(shares)}: give {number} numbers from 0 to 1; 1 is off")
    if any(not phrase.strip() for phrase in config.drop_phrases):
        lines.append("data.filters.drop_phrases has an empty phrase, which every text contains; remove it")
    return lines


def answers(document: Document) -> list[str]:
    """Texts that are learned as answers: the completion, or the assistant turns that are not masked; never rejected ones."""
    turns = document.messages if document.chosen is None else document.chosen
    texts = [turn["content"] for turn in turns or [] if turn["role"] == "assistant" and turn.get("train", True)]
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

    Length and language are judged on the whole row, phrases and quality on what is learned, outside code fences. Rows
    marked undesirable are spared phrases, echoes and quality: they are learned as what not to say. Raises ConfigError.
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
        if self.phrases is not None and self.phrases.search(learned):
            return "phrase"
        if config.quality is Quality.gopher:
            prose = "".join(part for code, part in split_code(learned) if not code)
            return gopher_reason(prose, config.gopher)
        return None

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
