"""The search itself: which rules are tried on a text, and which of overlapping findings stay."""

from __future__ import annotations

import re
from collections.abc import Sequence

from strategies.errors import ConfigError
from trainer.data.stages.privacy import context, names, patterns, places
from trainer.data.stages.privacy.config import PrivacyConfig, PrivacyEngine, active_types, problems
from trainer.data.stages.privacy.phones import phones
from trainer.data.stages.privacy.presets import NATIONAL_IDS, TYPES
from trainer.data.stages.privacy.rule import Finding

__all__ = ["Finder", "Finding", "find"]

NUMBER = re.compile(r"\d(?:[^\d\n]{0,3}\d){6}")
DIGIT = re.compile(r"\d")
PLACEHOLDER = re.compile(r"\[[A-Z][A-Z_]+(?:_[0-9a-f]{8})?\]")
"""What redaction and pseudonymisation leave behind; never looked into, so that a second pass changes nothing."""
ORDER = {name: place for place, name in enumerate(TYPES)}
NAMES = frozenset({"PERSON", "LOCATION", "ORGANISATION"})
"""Types whose ends are uncertain: a name recogniser likes to swallow the number beside a name."""
RULES = (*patterns.RULES, *places.RULES, *context.RULES, *names.RULES)


class Finder:
    """Finds personal data as the settings ask. Raises ConfigError where they cannot be used."""

    def __init__(self, config: PrivacyConfig) -> None:
        wrong = problems(config)
        if wrong:
            raise ConfigError(wrong)
        self.types = frozenset(active_types(config))
        self.min_score = config.min_score
        self.regions = tuple(config.regions)
        self.allow = [re.compile(pattern) for pattern in config.allow]
        away = {name for name, region in NATIONAL_IDS.items() if region not in config.regions}
        self.rules = [rule for rule in RULES if rule.type in self.types and rule.type not in away]
        self.presidio = None
        if config.engine == PrivacyEngine.presidio:
            from trainer.data.stages.privacy.presidio import PresidioEngine

            self.presidio = PresidioEngine(self.types, self.min_score)

    def find(self, text: str) -> list[Finding]:
        """Personal data in a text, in order; no two findings overlap."""
        return self.find_all([text])[0]

    def find_all(self, texts: Sequence[str]) -> list[list[Finding]]:
        """The same for the texts of one document: a person named in full in one of them is also known in the others."""
        found = [self._candidates(text) for text in texts]
        people = {
            " ".join(text[f.start : f.end].split())
            for text, findings in zip(texts, found, strict=True)
            for f in findings
            if f.type == "PERSON" and f.score >= self.min_score
        }
        out = []
        for text, findings in zip(texts, found, strict=True):
            if people:
                findings += names.mentions(text, people)
            out.append(self._settle(text, findings))
        return out

    def _candidates(self, text: str) -> list[Finding]:
        """What the rules say, overlaps and doubtful ones included."""
        digit = DIGIT.search(text) is not None
        there = {"": True, "digit": digit, "number": digit and NUMBER.search(text) is not None, "at": "@" in text}
        lower = text.lower()
        found: list[Finding] = []
        for rule in self.rules:
            if there[rule.needs] and (not rule.hints or any(hint in lower for hint in rule.hints)):
                found += rule.findings(text)
        if there["number"] and self.types & {"PHONE", "FAX"}:
            found += [f for f in phones(text, self.regions) if f.type in self.types]
        if self.presidio:
            found += self.presidio.find(text)
        return found

    def _settle(self, text: str, found: list[Finding]) -> list[Finding]:
        """Findings that count: certain enough, not allowed, outside placeholders, and cut so that none overlaps."""
        found = [
            f
            for f in found
            if f.score >= self.min_score and not any(p.fullmatch(text[f.start : f.end]) for p in self.allow)
        ]
        if not found:
            return []
        done = [match.span() for match in PLACEHOLDER.finditer(text)] if "[" in text else []
        found = [f for f in found if not any(f.start < end and start < f.end for start, end in done)]
        return resolve(text, found)


def resolve(text: str, found: list[Finding]) -> list[Finding]:
    """Names last; longer findings first, then surer ones, then the order of `TYPES`; what a later one adds stays.

    So every character that any finding covers is covered by exactly one finding of the result.
    """
    taken: list[Finding] = []
    for finding in sorted(found, key=lambda f: (f.type in NAMES, f.start - f.end, -f.score, ORDER[f.type], f.start)):
        pieces = [(finding.start, finding.end)]
        for other in taken:
            pieces = [piece for start, end in pieces for piece in _without(start, end, other.start, other.end)]
        for start, end in pieces:
            if any(c.isalnum() for c in text[start:end]):
                taken.append(Finding(finding.type, start, end, finding.score))
    return sorted(taken, key=lambda f: f.start)


def _without(start: int, end: int, cut_start: int, cut_end: int) -> list[tuple[int, int]]:
    """The parts of start:end outside cut_start:cut_end."""
    if end <= cut_start or cut_end <= start:
        return [(start, end)]
    return [(a, b) for a, b in ((start, cut_start), (cut_end, end)) if a < b]


_finders: dict[str, Finder] = {}


def find(text: str, config: PrivacyConfig) -> list[Finding]:
    """Personal data in a text, in order, without overlaps. Raises ConfigError where the settings cannot be used."""
    finder = _finders.get(repr(config))
    if finder is None:
        finder = _finders[repr(config)] = Finder(config)
    return finder.find(text)
