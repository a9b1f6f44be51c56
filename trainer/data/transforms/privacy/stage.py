"""The privacy stage of preparation: finds personal data in a document's texts, and reports, replaces or refuses it.

Only texts are searched and changed; roles, labels, file names and any other columns are not. The rules of the privacy settings
and the key of pseudonyms are here too.
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
from strategies.extras import install_command
from trainer.data.config import REGIONS, PrivacyConfig, PrivacyEngine, PrivacyMode, PrivacyPreset
from trainer.data.document import Document, PersonalDataFindings, Tally, add_first_examples
from trainer.data.transforms.privacy import context, patterns
from trainer.data.transforms.privacy.context import canonical_phone_number, find_phone_numbers
from trainer.data.transforms.privacy.patterns import letters_and_digits
from trainer.data.transforms.privacy.rule import (
    COUNTRY_BY_NATIONAL_ID,
    FOUND_BY_NONE,
    NEEDS_PRESIDIO,
    NOT_ASKED,
    PRESETS,
    TYPES,
    Presidio,
    PrivacyFinding,
)

NUMBER_REGEX = re.compile(r"\d(?:[^\d\n]{0,3}\d){6}")
"""Seven digits close together."""
DIGIT_REGEX = re.compile(r"\d")
PLACEHOLDER_REGEX = re.compile(r"\[[A-Z][A-Z_]+(?:_[0-9a-f]{8})?\]")
"""What redaction and pseudonymisation leave behind; never looked into, so that a second pass changes nothing."""
FREE_STRETCH_REGEX = re.compile(b"1+")
"""A stretch of characters that no finding has taken."""
TYPE_ORDER = {type_: index for index, type_ in enumerate(TYPES)}
RULES = (*patterns.RULES, *context.RULES)
KEY_VARIABLE = "SHARDTUNE_PSEUDONYM_KEY"
"""The environment variable that holds the secret key of pseudonyms."""
KEY_CHARACTERS = 16
"""Least length of a pseudonym key: short keys can be tried out, and then every pseudonym can be undone."""


_FOUND_BY_NO_ENGINE = "found by no engine"
_NEEDS_PRESIDIO_ENGINE = "needs data.privacy.engine=presidio"
"""Reasons for which a type is not looked for, as the audit has them; `NOT_ASKED` is another."""


def privacy_coverage(config: PrivacyConfig) -> dict[str, Any]:
    """Say for the audit which types of personal data are looked for, and why the others are not.

    Example: {"looked_for": ["EMAIL", "PHONE"], "not_looked_for": {"PERSON": "needs data.privacy.engine=presidio", ...}}. The
    second has every other known type.
    """
    requested_types = frozenset(config.types) or PRESETS[config.preset]
    if config.mode == PrivacyMode.none:
        requested_types = frozenset()
    looked_for: list[str] = []
    not_looked_for: dict[str, str] = {}
    for pii_type in TYPES:
        # Only types of national identity numbers have a country, such as US_SSN.
        country = COUNTRY_BY_NATIONAL_ID.get(pii_type)
        if pii_type not in requested_types:
            not_looked_for[pii_type] = NOT_ASKED
        elif pii_type in FOUND_BY_NONE:
            not_looked_for[pii_type] = _FOUND_BY_NO_ENGINE
        elif pii_type in NEEDS_PRESIDIO and config.engine == PrivacyEngine.patterns:
            not_looked_for[pii_type] = _NEEDS_PRESIDIO_ENGINE
        elif country is not None and country not in config.regions:
            not_looked_for[pii_type] = f"needs {country} in data.privacy.regions"
        else:
            looked_for.append(pii_type)
    return {"looked_for": looked_for, "not_looked_for": not_looked_for}


class PersonalDataFinder:
    """Finds personal data in texts as the settings ask. Raises ConfigError if packages are missing."""

    def __init__(self, config: PrivacyConfig) -> None:
        self.types = frozenset(privacy_coverage(config)["looked_for"])
        self.min_score = config.min_score
        self.regions = tuple(config.regions)
        self.allow = [re.compile(pattern) for pattern in config.allow]
        self.rules = [rule for rule in RULES if rule.type in self.types]
        self.presidio: Presidio | None = None
        if config.engine == PrivacyEngine.presidio:
            self.presidio = Presidio(self.types, self.min_score)

    def find(self, text: str) -> list[PrivacyFinding]:
        """Find personal data in a text, in order; no two findings overlap.

        Left out is what is not certain enough, what `data.privacy.allow` names, and what lies in a placeholder such as "[EMAIL]",
        which an earlier pass has left.
        """
        findings = self._find_by_rules(text)
        if self.presidio:
            findings += self.presidio.find(text)
        findings = [finding for finding in findings if self._is_accepted(text, finding)]
        if not findings:
            return []
        placeholders = [match.span() for match in PLACEHOLDER_REGEX.finditer(text)]
        outside_placeholders = []
        for finding in findings:
            if not any(finding.start < end and start < finding.end for start, end in placeholders):
                outside_placeholders.append(finding)
        return resolve_overlaps(text, outside_placeholders)

    def _find_by_rules(self, text: str) -> list[PrivacyFinding]:
        """Find personal data by our own rules and the telephone library, certain or not; findings may overlap.

        A rule is tried only on texts that have what it needs and one of its `required_texts`, since most texts have none of it,
        and the tests are cheap.
        """
        has_digit = DIGIT_REGEX.search(text) is not None
        has_number = has_digit and NUMBER_REGEX.search(text) is not None
        # By `PrivacyRule.needs`, what a text must have for the rule.
        meets_need = {"": True, "digit": has_digit, "number": has_number, "at": "@" in text}
        lower_text = text.lower()  # required texts are lower case
        findings: list[PrivacyFinding] = []
        for rule in self.rules:
            if not meets_need[rule.needs]:
                continue
            if rule.required_texts and not any(hint in lower_text for hint in rule.required_texts):
                continue
            for match in rule.regex.finditer(text):
                # Group 1 of a rule's expression is the finding; the rest is what must stand around it.
                start, end = match.span(1)
                if rule.check is None or rule.check(text[start:end]):
                    score = rule.score_in_context(text, start, end)
                    findings.append(PrivacyFinding(rule.type, start, end, score))
        if has_number and self.types & {"PHONE", "FAX"}:
            phone_findings = find_phone_numbers(text, self.regions)
            findings += [finding for finding in phone_findings if finding.type in self.types]
        return findings

    def _is_accepted(self, text: str, finding: PrivacyFinding) -> bool:
        """Whether a finding is certain enough (`data.privacy.min_score`), and not what `data.privacy.allow` names."""
        if finding.score < self.min_score:
            return False
        matched_text = text[finding.start : finding.end]
        return not any(pattern.fullmatch(matched_text) for pattern in self.allow)


def resolve_overlaps(text: str, findings: list[PrivacyFinding]) -> list[PrivacyFinding]:
    """Choose among findings so that none overlap, in the order of `text`: each keeps what no better one has taken.

    Longer findings go first, then more certain ones, then the order of `TYPES`; names last, whose ends are uncertain. Every
    letter and digit that any finding covers is covered by exactly one finding of the result.
    """

    def rank(finding: PrivacyFinding) -> tuple[bool, int, float, int, int]:
        length = finding.end - finding.start
        return (finding.type in NEEDS_PRESIDIO, -length, -finding.score, TYPE_ORDER[finding.type], finding.start)

    without_overlap: list[PrivacyFinding] = []
    # A byte for each character, "1" while no finding has taken it, so that a regular expression finds what is free.
    is_free = bytearray(b"1") * len(text)
    for finding in sorted(findings, key=rank):
        for free_stretch in list(FREE_STRETCH_REGEX.finditer(is_free, finding.start, finding.end)):
            start, end = free_stretch.span()
            if any(character.isalnum() for character in text[start:end]):
                without_overlap.append(PrivacyFinding(finding.type, start, end, finding.score))
                is_free[start:end] = bytes(end - start)
    return sorted(without_overlap, key=lambda finding: finding.start)


HEX_DIGITS = 8
"""Length of a pseudonym's tail: 32 bits; of 9,000 different values two share one with a probability of about 1 %."""
NORMAL_TYPE_BY_TYPE = {"FAX": "PHONE", "DATE_OF_BIRTH": "DATE"}
"""Types whose values are normalised alike, so that a number has one tail under both names."""
MAX_MASK_CHARACTERS = 32
"""Characters of a mask in a report."""
MASKED_BY_WORDS = frozenset({"EMAIL", "PERSON", "USERNAME", "LOCATION", "ORGANISATION"})
"""Types of whose words a mask shows the first letters; of others it shows the shape."""


class PrivacyStage:
    """The stage of preparation that looks for personal data in the documents of one source: report, redact, drop and so on."""

    name = "privacy"

    def __init__(self, config: PrivacyConfig, *, documents_before: int = 0) -> None:
        """Set up the stage for one range of rows of a source.

        `documents_before`: documents of the source that came before these. They count towards `scan_documents`.
        """
        self.config = config
        # Only a report may look at a part of the documents: the other modes act on all that is found.
        limit = config.scan_documents if config.mode == PrivacyMode.report else 0
        self._num_documents_to_scan = max(limit - documents_before, 0) if limit else None
        """How many more documents are searched; None: all of them."""
        self._finder: PersonalDataFinder | None = None
        if config.mode != PrivacyMode.none and self._num_documents_to_scan != 0:
            self._finder = PersonalDataFinder(config)
        # Read from the environment, never from the configuration, which is written down with the run.
        self._key = secret_key()
        assert config.mode != PrivacyMode.pseudonymise or len(self._key) >= KEY_CHARACTERS, (
            "`privacy_problems` says so before"
        )

    def __call__(self, document: Document, tally: Tally) -> Document | None:
        """Look for personal data in a document, as far as the mode asks, and act on what was found.

        - mode=none, or mode=report and `scan_documents` of the source were searched already: the document as it is;
        - mode=drop: None, counted in `tally`, if anything was found;
        - mode=redact or pseudonymise: the document with its texts changed;
        - mode=report or fail: the document as it is. For fail, `raise_if_personal_data` raises the error at the end.
        `tally` counts the findings, with masks of the first few.
        """
        if self._finder is None or self._num_documents_to_scan == 0:  # 0: all that the mode asks for were searched
            return document
        if self._num_documents_to_scan is not None:  # None: every document is searched
            self._num_documents_to_scan -= 1
        # A text that is in the document twice is searched once.
        findings_by_text = {text: self._finder.find(text) for text in document.texts()}
        masked_findings = _masked_findings(document, findings_by_text)
        tally.findings.scanned[document.source] += 1
        if not masked_findings:
            return document
        self._add_findings(tally.findings, document, masked_findings)
        if self.config.mode == PrivacyMode.drop:
            first_type, _ = masked_findings[0]
            tally.drop(self.name, first_type, document.location)
            return None
        for pii_type, masked_text in masked_findings:
            tally.note(self.name, pii_type, f"{document.location} {masked_text}")
        if self.config.mode in (PrivacyMode.redact, PrivacyMode.pseudonymise):
            document.map_texts(lambda text: self._rewrite(text, findings_by_text[text]))
        return document

    @staticmethod
    def _add_findings(
        findings: PersonalDataFindings, document: Document, masked_findings: list[tuple[str, str]]
    ) -> None:
        """Count a document's findings of personal data, (type, masked text) each, in `findings`, with the first few as examples.

        `findings`: those of all documents of a block so far.
        """
        types = [pii_type for pii_type, _ in masked_findings]
        findings.documents[document.source] += 1
        findings.counts.update(types)
        findings.documents_by_type.update(set(types))
        for pii_type, masked_text in masked_findings:
            add_first_examples(findings.examples, pii_type, [f"{document.location} {masked_text}"])

    def _rewrite(self, text: str, findings: list[PrivacyFinding]) -> str:
        """Replace every finding in a text by its placeholder, such as "[EMAIL]", or its pseudonym, such as "[EMAIL_3fa9c01b]".

        `findings`: in order, without overlap.
        """
        pieces: list[str] = []
        previous_end = 0
        for finding in findings:
            replacement = f"[{finding.type}]"
            if self.config.mode == PrivacyMode.pseudonymise:
                personal_text = text[finding.start : finding.end]
                replacement = pseudonym(finding.type, personal_text, self._key, self.config.regions)
            pieces += [text[previous_end : finding.start], replacement]
            previous_end = finding.end
        return "".join([*pieces, text[previous_end:]])


def _masked_findings(document: Document, findings_by_text: dict[str, list[PrivacyFinding]]) -> list[tuple[str, str]]:
    """List every finding in a document, in reading order, as (type, masked text), such as ("EMAIL", "j***@e***.com").

    Reports must not hold personal data themselves. `findings_by_text`: the findings in each text of the document.
    """
    masked_findings = []
    for text in document.texts():
        for finding in findings_by_text[text]:
            personal_text = text[finding.start : finding.end]
            masked_findings.append((finding.type, mask(finding.type, personal_text)))
    return masked_findings


def raise_if_personal_data(findings: PersonalDataFindings, config: PrivacyConfig) -> None:
    """Raise DataError if `data.privacy.mode` is `fail` and anything was found, with counts by type and the first place of each.

    Called once on the findings of all workers, so that the error names all.
    """
    if config.mode != PrivacyMode.fail or not findings.counts:
        return
    lines = []
    for pii_type, count in findings.counts.most_common():
        num_documents = findings.documents_by_type[pii_type]
        first_example = findings.examples[pii_type][0]
        lines.append(f"  {pii_type}: {count} in {num_documents} documents, first at {first_example}")
    raise DataError(
        f"{findings.counts.total()} pieces of personal data found, and data.privacy.mode=fail allows none:\n"
        + "\n".join(lines)
        + "\nset data.privacy.mode=redact, pseudonymise or drop, or name what is no personal data in data.privacy.allow"
    )


def normalise_personal_text(type_: str, personal_text: str, regions: Sequence[str]) -> str:
    """Bring a person's data into one form for all its spellings, so that all get the same pseudonym.

    That is without case, spaces, separators and national telephone formats: EMAIL "Jane@Example.com" -> "jane@example.com";
    USERNAME "@Jane" -> "jane"; a SECRET keeps its case. `type_`: such as "EMAIL". `regions`: countries whose national telephone
    numbers are read, such as "GB".
    """
    # Full-width digits and the like become the usual ones.
    text = " ".join(unicodedata.normalize("NFKC", personal_text).split())
    normal_type = NORMAL_TYPE_BY_TYPE.get(type_, type_)
    if normal_type == "PHONE":
        return canonical_phone_number(text, regions)
    if normal_type == "IP":
        try:
            return str(ipaddress.ip_address(text))
        except ValueError:  # what another finding left of one
            return text.casefold()
    if normal_type in {"EMAIL", "URL", "PERSON", "LOCATION", "ORGANISATION"}:
        return text.casefold()
    if normal_type == "SECRET":
        return text
    if normal_type == "USERNAME":
        return text.removeprefix("@").casefold()
    return letters_and_digits(text)


def pseudonym(type_: str, personal_text: str, key: bytes, regions: Sequence[str]) -> str:
    """Make the pseudonym of a finding, such as `[PERSON_3fa9c01b]`; the same in every run with the same secret key.

    Its tail is the HMAC-SHA256 of the normalised text under the key, so that nobody without the key can try out names.
    """
    normal_type = NORMAL_TYPE_BY_TYPE.get(type_, type_)
    message = f"{normal_type}\0{normalise_personal_text(type_, personal_text, regions)}".encode()
    tail = hmac.new(key, message, hashlib.sha256).hexdigest()[:HEX_DIGITS]
    return f"[{type_}_{tail}]"


def mask(type_: str, text: str) -> str:
    """Mask personal data as a report may show it. Only the shape of numbers and the first letters of names remain.

    EMAIL jane@example.com -> j***@e***.com; PERSON "Jane Doe" -> J*** D***; PHONE 555-0123 -> ***-****; SECRET -> ***. No four
    letters or digits in a row of the text are ever shown, and of secrets nothing.
    """
    if type_ == "SECRET":
        return "***"
    text = " ".join(text.split())
    if type_ in MASKED_BY_WORDS:
        local, at_sign, domain = text.rpartition("@")
        if type_ == "EMAIL" and at_sign:
            host, _, top_level = domain.rpartition(".")
            shown_top_level = top_level if len(top_level) <= 3 else "***"  # never four letters
            return f"{local[:1]}***@{host[:1]}***.{shown_top_level}"
        return " ".join(f"{word[:1]}***" for word in text.split()[:4])
    shape = "".join("*" if character.isalnum() else character for character in text)
    if len(shape) > MAX_MASK_CHARACTERS:
        return shape[:MAX_MASK_CHARACTERS] + "..."
    return shape


def secret_key() -> bytes:
    """The secret key of pseudonyms, from the environment; empty if none is set."""
    return os.environ.get(KEY_VARIABLE, "").encode()


def key_identity() -> str:
    """A digest that differs between secret keys of pseudonyms, for the fingerprint. The key cannot be found from it."""
    return hmac.new(secret_key(), b"identity of the key", hashlib.sha256).hexdigest()


def privacy_problems(config: PrivacyConfig) -> Iterator[str]:
    """Find what is wrong with `data.privacy`: types and regions that are not known, types nothing looks for, a missing key.

    Each problem is one sentence with the setting and what to do.
    """
    if config.mode == PrivacyMode.none:
        return
    not_looked_for = privacy_coverage(config)["not_looked_for"]
    remedy_by_reason = {
        _NEEDS_PRESIDIO_ENGINE: f"set it ({install_command('pii')}), or leave the type out",
        _FOUND_BY_NO_ENGINE: "leave it out; LOCATION finds places in addresses with data.privacy.engine=presidio",
    }
    for pii_type in config.types:
        if pii_type not in TYPES:
            yield f"data.privacy.types: {pii_type!r} is not a type; the types are {', '.join(TYPES)}"
            continue
        reason = not_looked_for.get(pii_type, NOT_ASKED)  # a type that is looked for has no reason
        if reason != NOT_ASKED:
            remedy = remedy_by_reason.get(reason, "add it, or leave the type out")
            yield f"data.privacy.types: {pii_type} {reason}; {remedy}"
    if not config.types and config.preset == PrivacyPreset.none:
        yield "data.privacy.preset=none with an empty data.privacy.types looks for nothing; name types, or set mode=none"
    # Imported only where it is needed: the regions that we know ourselves are right.
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
            f"variable {KEY_VARIABLE}; make one with: openssl rand -hex 32"
        )
