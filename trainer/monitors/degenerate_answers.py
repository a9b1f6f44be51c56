"""Detects degenerate answers: empty ones, repetition, or another language than that of the references.

Each share is compared with that of the references by Fisher's exact test, one-sided, at a level of 5 % over all
evaluations and the three kinds together. Nothing is reported for fewer than three answers, or for less than a tenth
of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from trainer.monitors.base import Evidence, Finding, ModelAnswer
from trainer.monitors.config import OutputConfig, Reaction

LEVEL = 0.05
MIN_ANSWERS = 3
MIN_SHARE = 0.1
"""Answers, and share of all answers, below which nothing is reported."""
GRAM = 4
"""Words (letters, in scripts without spaces) of the pieces that are counted."""
REPEATED = 0.5
"""Share of an answer's pieces that occurred in it before, from which it repeats itself."""
MIN_PIECES = 8
MIN_LANGUAGE_PROBABILITY = 0.9
"""Probability of a language from which it counts."""
REMEDIES = (
    "evaluation.generate.temperature=0.7 or evaluation.tasks.<name>.write.temperature=0.7 (what is greedy repeats)",
    "a lower optim.lr, or fewer budget.steps",
    "the template and stop tokens of model.chat_template (shardtune prepare --print shows what is learned)",
    "data.filters.languages=[...] (answers in other languages)",
)


def is_empty(text: str) -> bool:
    """Whether a text has no letter and no digit."""
    return not any(letter.isalnum() for letter in text)


def repeats_itself(text: str) -> bool:
    """Whether at least half of its pieces of four words occur earlier in the text."""
    words = text.split()
    pieces: list[object] = [tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)]
    if len(words) < len(text) / 30:  # no spaces
        pieces = [text[i : i + 2 * GRAM] for i in range(len(text) - 2 * GRAM + 1)]
    return len(pieces) >= MIN_PIECES and 1 - len(Counter(pieces)) / len(pieces) >= REPEATED


def language_of(text: str) -> str | None:
    """The language of a text; None if it is too short to be sure, or py3langid is not installed."""
    from trainer.data.transforms.filters import detect_text_language

    detected = detect_text_language(text) if find_spec("py3langid") is not None else None
    if detected is None:
        return None
    language, probability = detected
    return language if probability >= MIN_LANGUAGE_PROBABILITY else None


@dataclass(frozen=True, slots=True)
class DegenerateCount:
    """How many answers are degenerate in one way, beside the references."""

    answers: int
    references: int
    total: int
    """Of how many answers, and as many references."""

    @property
    def share(self) -> float:
        """Of the answers."""
        return self.answers / self.total


def degenerate_counts(answers: Sequence[ModelAnswer]) -> dict[str, DegenerateCount]:
    """How many answers are empty, repeat themselves, or are in another language than all references."""
    tests: dict[str, Callable[[str], bool]] = {"empty": is_empty, "repeated": repeats_itself}
    counts = {}
    for kind, test in tests.items():
        degenerate = sum(test(answer.text) for answer in answers)
        in_references = sum(test(answer.reference) for answer in answers)
        counts[kind] = DegenerateCount(degenerate, in_references, len(answers))

    answer_languages = []
    reference_languages = []
    for answer in answers:
        language = language_of(answer.text)
        reference_language = language_of(answer.reference)
        if language is not None and reference_language is not None:
            answer_languages.append(language)
            reference_languages.append(reference_language)
    if answer_languages:
        # References may be in several languages: an answer is foreign if none of them has its language.
        usual = {*reference_languages}
        foreign = sum(language not in usual for language in answer_languages)
        counts["foreign"] = DegenerateCount(foreign, 0, len(answer_languages))
    return counts


def logged_metrics(evidence: Evidence) -> dict[str, float]:
    """What is logged in each evaluation: `output/empty` and its kin, shares of the answers."""
    if not evidence.answers:
        return {}
    return {f"output/{kind}": count.share for kind, count in degenerate_counts(evidence.answers).items()}


def find_problem(config: OutputConfig, evidence: Evidence) -> Finding | None:
    """What the answers of this evaluation say; nothing of those before the first step, which are the base's."""
    if not evidence.answers or config.action is Reaction.off or evidence.step == 0:
        return None
    level = LEVEL / max(1, evidence.planned_evaluations) / 3  # Bonferroni over evaluations and the three kinds
    found = {}
    for kind, count in degenerate_counts(evidence.answers).items():
        is_frequent = count.answers >= MIN_ANSWERS and count.share >= MIN_SHARE
        if is_frequent and fisher_p_value(count.answers, count.references, count.total) <= level:
            found[kind] = count
    if not found:
        return None
    clauses = [
        f"{count.answers} of {count.total} {_WORDS[kind]} ({count.references} of the right ones)"
        for kind, count in found.items()
    ]
    return Finding(
        challenge="output",
        step=evidence.step,
        says=f"of the answers written, {', '.join(clauses)} (Fisher's exact test, level {level:.2g})",
        numbers={kind: count.share for kind, count in found.items()},
        remedies=REMEDIES,
        stops=config.action is Reaction.stop,
    )


_WORDS = {"empty": "are empty", "repeated": "repeat themselves", "foreign": "are in another language"}


def fisher_p_value(degenerate: int, in_references: int, total: int) -> float:
    """The p-value of "answers are degenerate no more often than references" (Fisher's exact test, one-sided).

    `degenerate` of `total` answers are, and `in_references` of as many references.
    """
    both = degenerate + in_references
    ways = math.comb(2 * total, total)
    as_many_or_more = 0
    for count in range(degenerate, min(both, total) + 1):
        as_many_or_more += math.comb(both, count) * math.comb(2 * total - both, total - count)
    return as_many_or_more / ways
