"""The privacy stage of preparation: finds personal data in a document's texts and does what the mode says.

Only texts are looked into and changed: roles, labels, file names and any other columns are not. What is looked for, what is
wrong with the settings, and the key of pseudonyms are told here too.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from strategies.errors import DataError
from trainer.data.config import REGIONS, PrivacyConfig, PrivacyEngine, PrivacyMode, PrivacyPreset
from trainer.data.document import Document, Findings, Tally, keep_first
from trainer.data.transforms.privacy import context, patterns
from trainer.data.transforms.privacy.context import canonical_phone_number, find_phone_numbers
from trainer.data.transforms.privacy.patterns import compact
from trainer.data.transforms.privacy.rule import (
    FOUND_BY_NONE,
    NATIONAL_IDS,
    NEEDS_PRESIDIO,
    NOT_ASKED,
    PRESETS,
    TYPES,
    Presidio,
    PrivacyFinding,
)

NUMBER = re.compile(r"\d(?:[^\d\n]{0,3}\d){6}")
DIGIT = re.compile(r"\d")
PLACEHOLDER = re.compile(r"\[[A-Z][A-Z_]+(?:_[0-9a-f]{8})?\]")
"""What redaction and pseudonymisation leave behind; never looked into, so that a second pass changes nothing."""
FREE_CHARACTERS = re.compile(b"1+")
"""Characters that no finding has taken."""
TYPE_ORDER = {name: place for place, name in enumerate(TYPES)}
RULES = (*patterns.RULES, *context.RULES)
KEY = "SHARDTUNE_PSEUDONYM_KEY"
"""The environment variable that holds the secret key of pseudonyms."""
KEY_CHARACTERS = 16
"""Least length of a pseudonym key: short keys can be tried out, and then every pseudonym can be undone."""


def coverage(config: PrivacyConfig) -> dict[str, Any]:
    """For the audit: `looked_for`, a list of types, and `not_looked_for`, every other known type with the reason."""
    wanted = frozenset(config.types) or PRESETS[config.preset]
    if config.mode == PrivacyMode.none:
        wanted = frozenset()
    looked_for, left_out = list[str](), dict[str, str]()
    for name in TYPES:
        region = NATIONAL_IDS.get(name)
        if name not in wanted:
            left_out[name] = NOT_ASKED
        elif name in FOUND_BY_NONE:
            left_out[name] = "found by no engine"
        elif name in NEEDS_PRESIDIO and config.engine == PrivacyEngine.patterns:
            left_out[name] = "needs data.privacy.engine=presidio"
        elif region is not None and region not in config.regions:
            left_out[name] = f"needs {region} in data.privacy.regions"
        else:
            looked_for.append(name)
    return {"looked_for": looked_for, "not_looked_for": left_out}


class PersonalDataFinder:
    """Finds personal data as the settings ask. Raises ConfigError where packages are missing."""

    def __init__(self, config: PrivacyConfig) -> None:
        self.types = frozenset(coverage(config)["looked_for"])
        self.min_score = config.min_score
        self.regions = tuple(config.regions)
        self.allow = [re.compile(pattern) for pattern in config.allow]
        self.rules = [rule for rule in RULES if rule.type in self.types]
        self.presidio: Presidio | None = None
        if config.engine == PrivacyEngine.presidio:
            self.presidio = Presidio(self.types, self.min_score)

    def find(self, text: str) -> list[PrivacyFinding]:
        """Personal data in a text that is certain enough, not allowed, and outside placeholders; no two findings overlap."""
        digit = DIGIT.search(text) is not None
        there = {"": True, "digit": digit, "number": digit and NUMBER.search(text) is not None, "at": "@" in text}
        lower = text.lower()
        found: list[PrivacyFinding] = []
        for rule in self.rules:
            if there[rule.needs] and (not rule.hints or any(hint in lower for hint in rule.hints)):
                for match in rule.regex.finditer(text):
                    start, end = match.span(1)
                    if rule.check is None or rule.check(text[start:end]):
                        found.append(PrivacyFinding(rule.type, start, end, rule.score_in_context(text, start, end)))
        if there["number"] and self.types & {"PHONE", "FAX"}:
            found += [f for f in find_phone_numbers(text, self.regions) if f.type in self.types]
        if self.presidio:
            found += self.presidio.find(text)
        found = [f for f in found if f.score >= self.min_score]
        found = [f for f in found if not any(p.fullmatch(text[f.start : f.end]) for p in self.allow)]
        if not found:
            return []
        done = [match.span() for match in PLACEHOLDER.finditer(text)] if "[" in text else []
        return resolve_overlaps(
            text, [f for f in found if not any(f.start < end and start < f.end for start, end in done)]
        )


def resolve_overlaps(text: str, found: list[PrivacyFinding]) -> list[PrivacyFinding]:
    """Names last, whose ends are uncertain; longer findings first, then surer ones, then the order of `TYPES`.

    What a later one adds stays, so every character that any finding covers is covered by exactly one finding of the result.
    """
    taken, free = list[PrivacyFinding](), bytearray(b"1") * len(text)
    for finding in sorted(
        found, key=lambda f: (f.type in NEEDS_PRESIDIO, f.start - f.end, -f.score, TYPE_ORDER[f.type], f.start)
    ):
        for piece in list(FREE_CHARACTERS.finditer(free, finding.start, finding.end)):
            start, end = piece.span()
            if any(c.isalnum() for c in text[start:end]):
                taken.append(PrivacyFinding(finding.type, start, end, finding.score))
                free[start:end] = bytes(end - start)
    return sorted(taken, key=lambda f: f.start)


HEX_DIGITS = 8
"""Length of a pseudonym's tail: 32 bits; of 9,000 different values two share one with a probability of about 1 %."""
NORMALISED_AS = {"FAX": "PHONE", "DATE_OF_BIRTH": "DATE"}
"""Types whose values are normalised alike, so that a number has one tail under both names."""
LONGEST_MASK = 32
SHOW_FIRST = frozenset({"EMAIL", "PERSON", "USERNAME", "LOCATION", "ORGANISATION"})


class PrivacyStage:
    """Report, redact, pseudonymise, drop or fail. Built from its settings in every worker process, for rows of one source.

    `seen` rows of the source came before, which count towards `scan_documents`.
    """

    name = "privacy"

    def __init__(self, config: PrivacyConfig, *, seen: int = 0) -> None:
        self.config = config
        limit = config.scan_documents if config.mode == PrivacyMode.report else 0
        self._left = max(limit - seen, 0) if limit else None
        self._finder = None if config.mode == PrivacyMode.none or self._left == 0 else PersonalDataFinder(config)
        self._key = secret_key()
        assert config.mode != PrivacyMode.pseudonymise or len(self._key) >= KEY_CHARACTERS, "`problems` says so before"

    def __call__(self, document: Document, tally: Tally) -> Document | None:
        """The document, its texts perhaps changed; None where mode=drop dropped it. For mode=fail see `refuse_findings`."""
        if self._finder is None or self._left == 0:
            return document
        self._left = None if self._left is None else self._left - 1
        texts, found, findings = document.texts(), dict[str, list[PrivacyFinding]](), tally.findings
        seen: list[tuple[str, str]] = []
        for text in texts:
            found[text] = self._finder.find(text)
            seen += [(f.type, mask(f.type, text[f.start : f.end])) for f in found[text]]
        findings.scanned[document.source] += 1
        if not seen:
            return document
        findings.documents[document.source] += 1
        findings.counts.update(type_ for type_, _ in seen)
        findings.documents_by_type.update({type_ for type_, _ in seen})
        for type_, shown in seen:
            keep_first(findings.examples, type_, [f"{document.where} {shown}"])
        if self.config.mode == PrivacyMode.drop:
            tally.drop(self.name, seen[0][0], document.where)
            return None
        for type_, shown in seen:
            tally.note(self.name, type_, f"{document.where} {shown}")
        if self.config.mode in (PrivacyMode.redact, PrivacyMode.pseudonymise):
            document.map_texts(lambda text: self._rewrite(text, found[text]))
        return document

    def _rewrite(self, text: str, found: list[PrivacyFinding]) -> str:
        """The text with every finding replaced by its placeholder."""
        parts, end = [], 0
        for finding in found:
            placeholder, value = f"[{finding.type}]", text[finding.start : finding.end]
            if self.config.mode == PrivacyMode.pseudonymise:
                placeholder = pseudonym(finding.type, value, self._key, self.config.regions)
            parts += [text[end : finding.start], placeholder]
            end = finding.end
        return "".join([*parts, text[end:]])


def refuse_findings(findings: Findings, config: PrivacyConfig) -> None:
    """Raise DataError where mode=fail and anything was found; call it once on the findings of all workers."""
    if config.mode != PrivacyMode.fail or not findings.counts:
        return
    lines = [
        f"  {type_}: {count} in {findings.documents_by_type[type_]} documents, first at {findings.examples[type_][0]}"
        for type_, count in findings.counts.most_common()
    ]
    raise DataError(
        f"{findings.counts.total()} pieces of personal data found, and data.privacy.mode=fail allows none:\n"
        + "\n".join(lines)
        + "\nset data.privacy.mode=redact, pseudonymise or drop, or name what is no personal data in data.privacy.allow"
    )


def normalise(type_: str, value: str, regions: Sequence[str]) -> str:
    """One spelling for all spellings of a value: case, spaces, separators and national telephone formats vanish."""
    text = " ".join(unicodedata.normalize("NFKC", value).split())
    kind = NORMALISED_AS.get(type_, type_)
    if kind == "PHONE":
        return canonical_phone_number(text, regions)
    if kind == "IP":
        try:
            return str(ipaddress.ip_address(text))
        except ValueError:  # what another finding left of one
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
    message = f"{NORMALISED_AS.get(type_, type_)}\0{normalise(type_, value, regions)}".encode()
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


def secret_key() -> bytes:
    """The secret key of pseudonyms; empty where none is set."""
    return os.environ.get(KEY, "").encode()


def key_identity() -> str:
    """What tells one secret key of pseudonyms from another without giving it away."""
    return hmac.new(secret_key(), b"identity of the key", hashlib.sha256).hexdigest()


def problems(config: PrivacyConfig) -> Iterator[str]:
    """Of the search for personal data: what is not known, what nothing would look for, a key that is missing."""
    if config.mode == PrivacyMode.none:
        return
    reasons = coverage(config)["not_looked_for"]
    for name in config.types:
        if name not in TYPES:
            yield f"data.privacy.types: {name!r} is not a type; the types are {', '.join(TYPES)}"
        elif (why := reasons.get(name, NOT_ASKED)) != NOT_ASKED:
            remedies = {
                "needs data.privacy.engine=presidio": "set it (pip install 'shardtune[pii]'), or leave the type out",
                "found by no engine": "leave it out; LOCATION finds places in addresses with data.privacy.engine=presidio",
            }
            yield f"data.privacy.types: {name} {why}; {remedies.get(why, 'add it, or leave the type out')}"
    if not config.types and config.preset == PrivacyPreset.none:
        yield "data.privacy.preset=none with an empty data.privacy.types looks for nothing; name types, or set mode=none"
    if not set(config.regions) <= set(REGIONS):
        import phonenumbers

        for region in config.regions:
            if region not in phonenumbers.SUPPORTED_REGIONS:
                yield f"data.privacy.regions: {region!r} is not a two-letter ISO 3166 code in capitals, such as US, GB or DE"
    for pattern in config.allow:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"data.privacy.allow: {pattern!r} is not a regular expression ({error})"
    if config.mode == PrivacyMode.pseudonymise and len(secret_key()) < KEY_CHARACTERS:
        yield (
            f"data.privacy.mode=pseudonymise needs a secret key of at least {KEY_CHARACTERS} characters in the environment "
            f"variable {KEY}; make one with: openssl rand -hex 32"
        )
