"""The privacy stage of preparation: finds personal data in a document's texts and does what the mode says.

Only texts are looked into and changed: roles, labels, file names and any other columns are not.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from strategies.errors import ConfigError, DataError
from trainer.data.config import PrivacyConfig, PrivacyEngine, PrivacyMode
from trainer.data.document import EXAMPLES, Document, Tally
from trainer.data.stages.privacy import context, patterns
from trainer.data.stages.privacy.config import NEEDS_PRESIDIO, TYPES, active_types, problems
from trainer.data.stages.privacy.patterns import compact
from trainer.data.stages.privacy.rule import Finding, Presidio, canonical, phones

NUMBER = re.compile(r"\d(?:[^\d\n]{0,3}\d){6}")
DIGIT = re.compile(r"\d")
PLACEHOLDER = re.compile(r"\[[A-Z][A-Z_]+(?:_[0-9a-f]{8})?\]")
"""What redaction and pseudonymisation leave behind; never looked into, so that a second pass changes nothing."""
ORDER = {name: place for place, name in enumerate(TYPES)}
RULES = (*patterns.RULES, *context.RULES)


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
        self.rules = [rule for rule in RULES if rule.type in self.types]
        self.presidio: Presidio | None = None
        if config.engine == PrivacyEngine.presidio:
            self.presidio = Presidio(self.types, self.min_score)

    def find(self, text: str) -> list[Finding]:
        """Personal data in a text, in order; no two findings overlap."""
        return self._settle(text, self._candidates(text))

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
    """Names last, whose ends are uncertain; longer findings first, then surer ones, then the order of `TYPES`.

    What a later one adds stays, so every character that any finding covers is covered by exactly one finding of the result.
    """
    taken: list[Finding] = []
    for finding in sorted(
        found, key=lambda f: (f.type in NEEDS_PRESIDIO, f.start - f.end, -f.score, ORDER[f.type], f.start)
    ):
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


HEX_DIGITS = 8
"""Length of a pseudonym's tail: 32 bits; of 9,000 different values two share one with a probability of about 1 %."""
SAME = {"FAX": "PHONE", "DATE_OF_BIRTH": "DATE"}
"""Types whose values are normalised alike, so that a number has one tail under both names."""
LONGEST_MASK = 32
SHOW_FIRST = frozenset({"EMAIL", "PERSON", "USERNAME", "LOCATION", "ORGANISATION"})


@dataclass(slots=True)
class Findings:
    """Personal data seen by the privacy stage. Holds no value that was found, only masks of a few."""

    scanned: Counter[str] = field(default_factory=Counter)
    """Documents looked into, by source."""
    documents: Counter[str] = field(default_factory=Counter)
    """Documents with at least one finding, by source."""
    counts: Counter[str] = field(default_factory=Counter)
    """Findings by type."""
    documents_by_type: Counter[str] = field(default_factory=Counter)
    """Documents with at least one finding of a type."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first few of each type, as `file:line mask`."""

    def add(self, source: str, where: str, seen: list[tuple[str, str]]) -> None:
        """Count one document: (type, mask) of each of its findings."""
        self.scanned[source] += 1
        self.documents[source] += bool(seen)
        self.counts.update(type_ for type_, _ in seen)
        self.documents_by_type.update({type_ for type_, _ in seen})
        for type_, shown in seen:
            kept = self.examples.setdefault(type_, [])
            if len(kept) < EXAMPLES:
                kept.append(f"{where} {shown}")

    def merge(self, other: Findings) -> None:
        """Add a later block's findings."""
        for name in ("scanned", "documents", "counts", "documents_by_type"):
            getattr(self, name).update(getattr(other, name))
        for type_, places in other.examples.items():
            kept = self.examples.setdefault(type_, [])
            kept.extend(places[: EXAMPLES - len(kept)])

    def total(self) -> int:
        """All findings."""
        return sum(self.counts.values())

    def as_dict(self) -> dict[str, Any]:
        """For a report in JSON; types in order of how often they were found."""
        return {
            "documents_scanned": dict(sorted(self.scanned.items())),
            "documents_with_findings": dict(sorted((k, v) for k, v in self.documents.items() if v)),
            "types": {
                type_: {
                    "findings": count,
                    "documents": self.documents_by_type[type_],
                    "examples": self.examples.get(type_, []),
                }
                for type_, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
            },
        }


class Privacy:
    """Report, redact, pseudonymise, drop or fail. Built from its settings in every worker process.

    Raises ConfigError where the settings cannot be used (also: no key for pseudonyms). `findings` adds up what was seen.
    """

    name = "privacy"

    def __init__(self, config: PrivacyConfig) -> None:
        self.config = config
        self.findings = Findings()
        self._finder = None if config.mode == PrivacyMode.none else Finder(config)
        self._key = os.environ.get(config.key_env, "").encode()

    def __call__(self, document: Document, tally: Tally) -> Document | None:
        """The document, its texts perhaps changed; None where mode=drop dropped it. For mode=fail see `check`."""
        if self._finder is None or self._past_sample(document.source):
            return document
        texts = document.texts()
        found = {text: self._finder.find(text) for text in texts}
        seen = [(f.type, mask(f.type, text[f.start : f.end])) for text in texts for f in found[text]]
        self.findings.add(document.source, document.where, seen)
        if not seen:
            return document
        if self.config.mode == PrivacyMode.drop:
            tally.drop(self.name, seen[0][0], document.where)
            return None
        for type_, shown in seen:
            tally.note(self.name, type_, f"{document.where} {shown}")
        if self.config.mode in (PrivacyMode.redact, PrivacyMode.pseudonymise):
            document.map_texts(lambda text: self._rewrite(text, found[text]))
        return document

    def _past_sample(self, source: str) -> bool:
        limit = self.config.scan_documents
        return self.config.mode == PrivacyMode.report and 0 < limit <= self.findings.scanned[source]

    def _rewrite(self, text: str, found: list[Finding]) -> str:
        """The text with every finding replaced by its placeholder."""
        parts, end = [], 0
        for finding in found:
            parts += [text[end : finding.start], self._placeholder(finding.type, text[finding.start : finding.end])]
            end = finding.end
        return "".join([*parts, text[end:]])

    def _placeholder(self, type_: str, value: str) -> str:
        if self.config.mode == PrivacyMode.pseudonymise:
            return pseudonym(type_, value, self._key, self.config.regions)
        return f"[{type_}]"


def check(findings: Findings, config: PrivacyConfig) -> None:
    """Raise DataError where mode=fail and more was found than allowed; call it once on the findings of all workers."""
    if config.mode != PrivacyMode.fail or findings.total() <= config.max_findings:
        return
    lines = [
        f"  {type_}: {count} in {findings.documents_by_type[type_]} documents, first at {findings.examples[type_][0]}"
        for type_, count in findings.counts.most_common()
    ]
    raise DataError(
        f"{findings.total()} pieces of personal data found, at most {config.max_findings} allowed "
        f"(data.privacy.max_findings):\n" + "\n".join(lines) + "\nset data.privacy.mode=redact, pseudonymise or drop, "
        "name what is no personal data in data.privacy.allow, or raise data.privacy.max_findings"
    )


def normalise(type_: str, value: str, regions: Sequence[str]) -> str:
    """One spelling for all spellings of a value: case, spaces, separators and national telephone formats vanish."""
    text = " ".join(unicodedata.normalize("NFKC", value).split())
    kind = SAME.get(type_, type_)
    if kind == "PHONE":
        return canonical(text, regions)
    if kind == "IP":
        try:
            return str(ipaddress.ip_address(text))
        except ValueError:
            return text.casefold()
    if kind in {"EMAIL", "URL", "PERSON", "LOCATION", "ORGANISATION"}:
        return text.casefold()
    if kind == "SECRET":
        return text
    if kind == "USERNAME":
        return text.removeprefix("@").casefold()
    return compact(text)


def pseudonym(type_: str, value: str, key: bytes, regions: Sequence[str]) -> str:
    """`[PERSON_3fa9c01b]`: HMAC-SHA256 of the normalised value under a secret key, the same in every run with that key."""
    message = f"{SAME.get(type_, type_)}\0{normalise(type_, value, regions)}".encode()
    return f"[{type_}_{hmac.new(key, message, hashlib.sha256).hexdigest()[:HEX_DIGITS]}]"


def mask(type_: str, value: str) -> str:
    """What a report may show: `j***@e***.com`. The shape of numbers, first letters of names, no more than that.

    No four letters or digits in a row of the value are ever shown, and of secrets nothing.
    """
    if type_ == "SECRET":
        return "***"
    value = " ".join(value.split())
    if type_ in SHOW_FIRST:
        local, at, domain = value.rpartition("@")
        if type_ == "EMAIL" and at:
            host, _, top = domain.rpartition(".")
            return f"{local[:1]}***@{host[:1]}***.{top if len(top) <= 3 else '***'}"
        return " ".join(f"{word[:1]}***" for word in value.split()[:4])
    shape = "".join("*" if c.isalnum() else c for c in value)
    return shape if len(shape) <= LONGEST_MASK else shape[:LONGEST_MASK] + "..."
