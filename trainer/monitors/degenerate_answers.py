"""Detects degenerate answers: empty ones, repetition, or another language than that of the references.

Each share is compared with that of the references by Fisher's exact test, one-sided, at a level of 5 % over all
evaluations and the three kinds together. Nothing is reported for fewer than three answers, or for less than a tenth
of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec

from trainer.monitors.base import Evidence, Finding, ModelAnswer
from trainer.monitors.config import OutputConfig, Reaction

LEVEL = 0.05
LEAST, LEAST_SHARE = 3, 0.1
"""Answers, and share of all, below which nothing is told."""
GRAM = 4
"""Words (letters, in scripts without spaces) of the pieces that are counted."""
REPEATED = 0.5
"""Share of an answer's pieces that occurred in it before, from which it repeats itself."""
LEAST_PIECES = 8
SURE = 0.9
"""Probability of a language from which it counts."""
REMEDIES = (
    "evaluation.generate.temperature=0.7 or evaluation.tasks.<name>.write.temperature=0.7 (what is greedy repeats)",
    "a lower optim.lr, or fewer budget.steps",
    "the template and stop tokens of model.chat_template (shardtune prepare --print shows what is learned)",
    "data.filters.languages=[...] (answers in other languages)",
)


def empty(text: str) -> bool:
    """Whether nothing is said."""
    return not any(letter.isalnum() for letter in text)


def repeats(text: str) -> bool:
    """Whether at least half of its pieces of four words were said before."""
    words = text.split()
    pieces: list[object] = [tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)]
    if len(words) < len(text) / 30:  # no spaces
        pieces = [text[i : i + 2 * GRAM] for i in range(len(text) - 2 * GRAM + 1)]
    return len(pieces) >= LEAST_PIECES and 1 - len(Counter(pieces)) / len(pieces) >= REPEATED


def language(text: str) -> str | None:
    """Its language, where there is enough of it to tell; None also where py3langid is not installed."""
    from trainer.data.transforms.filters import detect_text_language

    found = detect_text_language(text) if find_spec("py3langid") is not None else None
    return found[0] if found is not None and found[1] >= SURE else None


def shares(answers: Sequence[ModelAnswer]) -> dict[str, tuple[int, int, int]]:
    """By kind: how many answers are degenerate, how many references are, and of how many."""
    tests: dict[str, Callable[[str], bool]] = {"empty": empty, "repeated": repeats}
    found = {
        name: (sum(test(each.text) for each in answers), sum(test(each.reference) for each in answers), len(answers))
        for name, test in tests.items()
    }
    told = [(language(each.text), language(each.reference)) for each in answers]
    both = [(mine, right) for mine, right in told if mine is not None and right is not None]
    usual = {right for _, right in both}
    if both:
        found["foreign"] = (sum(mine not in usual for mine, _ in both), 0, len(both))
    return found


def numbers(seen: Evidence) -> dict[str, float]:
    """What is logged in each evaluation: `output/empty` and its kin, shares of the answers."""
    return {f"output/{name}": bad / of for name, (bad, _, of) in shares(seen.answers).items()} if seen.answers else {}


def find(config: OutputConfig, seen: Evidence) -> Finding | None:
    """What the answers of this evaluation say; nothing of those before the first step, which are the base's."""
    if not seen.answers or config.action is Reaction.off or seen.step == 0:
        return None
    level = LEVEL / max(1, seen.planned) / 3
    told = {
        name: (bad, right, of)
        for name, (bad, right, of) in shares(seen.answers).items()
        if bad >= LEAST and bad / of >= LEAST_SHARE and fisher(bad, right, of) <= level
    }
    if not told:
        return None
    words = ", ".join(
        f"{bad} of {of} {_WORDS[name]} ({right} of the right ones)" for name, (bad, right, of) in told.items()
    )
    return Finding(
        challenge="output",
        step=seen.step,
        says=f"of the answers written, {words} (Fisher's exact test, level {level:.2g})",
        numbers={name: bad / of for name, (bad, _, of) in told.items()},
        remedies=REMEDIES,
        stops=config.action is Reaction.stop,
    )


_WORDS = {"empty": "are empty", "repeated": "repeat themselves", "foreign": "are in another language"}


def fisher(bad: int, other: int, of: int) -> float:
    """The p-value of `bad` of `of` against `other` of `of` being no more often so (Fisher's exact test, one-sided)."""
    total, ways = bad + other, math.comb(2 * of, of)
    return sum(math.comb(total, k) * math.comb(2 * of - total, of - k) for k in range(bad, min(total, of) + 1)) / ways
