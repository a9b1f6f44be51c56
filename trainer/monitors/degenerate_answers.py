"""Detects degenerate answers: empty ones, repetition, or another language than that of the references.

Each share is compared with that of the references by Fisher's exact test, one-sided, at a level of 5 % over all
evaluations and the three kinds together. Nothing is reported for fewer than three answers, or for less than a tenth
of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from trainer.monitors.base import Evidence, Finding, ModelAnswer
from trainer.monitors.config import OutputConfig, Reaction

SIGNIFICANCE_LEVEL = 0.05
"""How often, at most, a run whose answers are no worse than the references is reported: over all evaluations and kinds."""
MIN_ANSWERS = 3
MIN_SHARE = 0.1
"""Answers, and share of all answers, below which nothing is reported."""
WORDS_PER_NGRAM = 4
"""Words of the n-grams that are counted; in scripts without spaces, twice as many letters."""
MIN_REPEATED_SHARE = 0.5
"""Share of an answer's n-grams that occurred in it before, from which it repeats itself."""
MIN_NGRAMS = 8
"""N-grams below which an answer is too short to repeat itself."""
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
    """Whether a generated answer goes in circles: at least half of its runs of four words (n-grams) occur earlier in it.

    A text with hardly any spaces, as in Chinese, is taken apart into runs of eight letters instead. A text of fewer than
    `MIN_NGRAMS` n-grams is too short to tell.
    """
    words = text.split()
    ngrams: list[object] = []
    has_spaces = len(words) >= len(text) / 30  # words of 30 letters on average are no words
    if has_spaces:
        for start in range(len(words) - WORDS_PER_NGRAM + 1):
            ngrams.append(tuple(words[start : start + WORDS_PER_NGRAM]))
    else:  # such as Chinese
        num_letters = 2 * WORDS_PER_NGRAM
        for start in range(len(text) - num_letters + 1):
            ngrams.append(text[start : start + num_letters])
    if len(ngrams) < MIN_NGRAMS:
        return False
    num_different = len(set(ngrams))
    repeated_share = 1 - num_different / len(ngrams)
    return repeated_share >= MIN_REPEATED_SHARE


def recognised_language(text: str) -> str | None:
    """Recognise the language of a written answer, as a code such as `en`; None if that is not sure, as for a short text.

    None as well if the package py3langid is not installed.
    """
    from trainer.data.transforms.filters import detect_text_language

    if find_spec("py3langid") is None:
        return None
    detected = detect_text_language(text)
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
        """Share of the answers that are degenerate."""
        return self.answers / self.total


def degenerate_counts_by_kind(answers: Sequence[ModelAnswer]) -> dict[str, DegenerateCount]:
    """Count the answers of an evaluation that are degenerate: `empty`, `repeated`, or `foreign` (a language of no reference).

    Such as {"empty": DegenerateCount(answers=3, references=1, total=50), ...}: the references are the right answers of the same
    prompts, which may be empty or repeat themselves too. Only pairs whose languages are both recognised count for `foreign`;
    without any there is no such key.
    """
    tests: dict[str, Callable[[str], bool]] = {"empty": is_empty, "repeated": repeats_itself}
    counts = {}
    for kind, is_degenerate in tests.items():
        num_answers = sum(is_degenerate(answer.text) for answer in answers)
        num_references = sum(is_degenerate(answer.reference) for answer in answers)
        counts[kind] = DegenerateCount(answers=num_answers, references=num_references, total=len(answers))
    foreign_count = _count_answers_in_foreign_language(answers)
    if foreign_count is not None:
        counts["foreign"] = foreign_count
    return counts


def _count_answers_in_foreign_language(answers: Sequence[ModelAnswer]) -> DegenerateCount | None:
    """Count the answers in a language that no reference (right answer) has, as when a model falls back into English.

    None if there is no pair of answer and reference whose languages are both recognised. Of the references none can be foreign,
    by definition.
    """
    answer_languages = []
    reference_languages = []
    for answer in answers:
        language = recognised_language(answer.text)
        reference_language = recognised_language(answer.reference)
        if language is not None and reference_language is not None:
            answer_languages.append(language)
            reference_languages.append(reference_language)
    if not answer_languages:
        return None
    usual_languages = {*reference_languages}  # references may be in several languages
    num_foreign = sum(language not in usual_languages for language in answer_languages)
    return DegenerateCount(answers=num_foreign, references=0, total=len(answer_languages))


def logged_metrics(evidence: Evidence) -> dict[str, float]:
    """The metrics that this detector adds to an evaluation: shares of its answers, such as {"output/empty": 0.02}.

    `output/repeated` and `output/foreign` likewise; {} if the evaluation generated no answers.
    """
    if not evidence.answers:
        return {}
    metrics = {}
    for kind, count in degenerate_counts_by_kind(evidence.answers).items():
        metrics[f"output/{kind}"] = count.share
    return metrics


def find_problem(config: OutputConfig, evidence: Evidence) -> Finding | None:
    """Report an evaluation whose generated answers are degenerate more often than the right answers are; None if they are not.

    Degenerate is empty, repeated or foreign, see `degenerate_counts_by_kind`. Each kind must be frequent and pass Fisher's
    exact test. The evaluation before the first step is not judged: those answers are the base's.
    """
    if not evidence.answers or config.action is Reaction.off or evidence.step == 0:
        return None
    # Bonferroni: each of the run's evaluations with tasks, and each of the three kinds, is one more try.
    level = SIGNIFICANCE_LEVEL / evidence.task_evaluations / len(PREDICATE_BY_KIND)
    problem_counts: dict[str, DegenerateCount] = {}  # by kind
    for kind, count in degenerate_counts_by_kind(evidence.answers).items():
        is_frequent = count.answers >= MIN_ANSWERS and count.share >= MIN_SHARE
        if not is_frequent:
            continue
        if fisher_p_value_of_more_degenerate(count.answers, count.references, count.total) <= level:
            problem_counts[kind] = count
    if not problem_counts:
        return None
    clauses = []
    for kind, count in problem_counts.items():
        clauses.append(
            f"{count.answers} of {count.total} {PREDICATE_BY_KIND[kind]} ({count.references} of the right ones)"
        )
    return Finding(
        detector="output",
        step=evidence.step,
        message=f"of the answers written, {', '.join(clauses)} (Fisher's exact test, level {level:.2g})",
        numbers={kind: count.share for kind, count in problem_counts.items()},
        remedies=REMEDIES,
        ends_run=config.action is Reaction.stop,
    )


PREDICATE_BY_KIND = {"empty": "are empty", "repeated": "repeat themselves", "foreign": "are in another language"}


def fisher_p_value_of_more_degenerate(num_degenerate_answers: int, num_degenerate_references: int, total: int) -> float:
    """How likely chance makes so many more answers degenerate than references: the p-value of Fisher's exact test, one-sided.

    There are `total` answers and as many references (the right answers of the same prompts).
    """
    # If answers and references are alike, any choice of `total` texts out of all is equally likely to be the answers.
    num_texts = 2 * total
    num_degenerate = num_degenerate_answers + num_degenerate_references
    num_choices = math.comb(num_texts, total)
    num_as_extreme = 0  # choices with as many degenerate texts, or more
    for count in range(num_degenerate_answers, min(num_degenerate, total) + 1):
        num_as_extreme += math.comb(num_degenerate, count) * math.comb(num_texts - num_degenerate, total - count)
    return num_as_extreme / num_choices
