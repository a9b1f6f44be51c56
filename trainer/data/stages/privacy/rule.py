"""What a rule is: a regular expression with what makes a match more, or less, likely to be personal data."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

BEFORE, AFTER = 48, 20
"""How many characters before and after a match are searched for words that speak for or against it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Personal data at `text[start:end]`, and how certain that is, from 0 to 1."""

    type: str
    start: int
    end: int
    score: float


@dataclass(frozen=True, slots=True)
class Rule:
    """One way in which a type shows itself.

    The match counts `score`; where `near` matches close by, `boosted`; where `against` matches before it, `AGAINST`,
    whatever else is near. A rule is tried only on texts that hold `needs` and one of `hints`: both spare time on clean text.
    """

    type: str
    regex: re.Pattern[str]
    score: float
    check: Callable[[str], bool] | None = None
    """Called with the match; False rejects it."""
    group: int = 1
    """The group of the expression that is the finding."""
    near: re.Pattern[str] | None = None
    boosted: float = 0.95
    against: re.Pattern[str] | None = None
    needs: str = ""
    """`digit`: a digit; `number`: seven digits close together; `at`: an @; empty: nothing."""
    hints: tuple[str, ...] = field(default=())
    """Lower-case pieces of text one of which has to be there; empty: none has to be."""

    def findings(self, text: str) -> list[Finding]:
        """All matches in a text, with their scores."""
        out = []
        for match in self.regex.finditer(text):
            start, end = match.span(self.group)
            if self.check is None or self.check(text[start:end]):
                out.append(Finding(self.type, start, end, self._score(text, start, end)))
        return out

    def _score(self, text: str, start: int, end: int) -> float:
        before = text[max(0, start - BEFORE) : start]
        after = text[end : end + AFTER]
        if self.against and self.against.search(before):
            return AGAINST
        if self.near and (self.near.search(before) or self.near.search(after)):
            return self.boosted
        return self.score


AGAINST = 0.2
"""Score of a match that the words before it explain as something else."""

_OTHER = (
    r"(?:\b(?:orders?|invoices?|isbn(?:-1[03])?|issn|doi|sku|ref(?:erence)?|tickets?|tracking|version|ver|"
    r"release|build|"
    r"item|part|model|commit|bestellung|rechnung|commande|facture|pages?|pp|vol)\b(?: (?:number|no|nr|id|code))?\.?"
    r"(?: is| was)? ?[:#=°]{0,2}|(?<![\w.])v)"
)
NOT_PERSONAL = re.compile(rf"{_OTHER}[ #]*(?:[A-Z]{{1,4}}-)?$", re.IGNORECASE)
"""Words that say that the number right after them is not a person's."""
VERSION = re.compile(rf"{_OTHER}[ \w.-]{{0,12}}$", re.IGNORECASE)
"""The same with up to twelve characters between, as in `version of driver 10.0.1.2`."""


def words(*alternatives: str) -> re.Pattern[str]:
    """Any of these expressions as whole words, in any case."""
    return re.compile(rf"(?<!\w)(?:{'|'.join(alternatives)})(?!\w)", re.IGNORECASE)


def rule(type_: str, regex: str, score: float, *, hints: str = "", **more: Any) -> Rule:
    """A rule from the text of its expression; `hints` are parted by |."""
    return Rule(type_, re.compile(regex), score, hints=tuple(filter(None, hints.split("|"))), **more)
