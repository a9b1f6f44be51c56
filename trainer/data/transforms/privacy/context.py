"""Data that the words beside it give away: records, policies, accounts, licences, vehicles, user names; dates; telephone numbers.

Dates, ages and postcodes are known as they are written in the US, the UK, Germany and France. Telephone and fax numbers of
all countries come from phonenumbers: sure when written internationally, likely when the groups are those of the country, and
doubtful otherwise: a bare run of digits is a telephone number only beside a word that says so.
"""

# ruff: noqa: RUF001

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from trainer.data.transforms.privacy.patterns import is_npi
from trainer.data.transforms.privacy.rule import (
    CHARACTERS_AFTER,
    CHARACTERS_BEFORE,
    NOT_PERSONAL_WORDS_REGEX,
    SCORE_AFTER_CONTRARY_WORDS,
    PrivacyFinding,
    PrivacyRule,
    privacy_rule,
    whole_words,
)

if TYPE_CHECKING:
    from phonenumbers import PhoneNumberMatch

CODE = r"(?=[\w./-]*\d)[A-Za-z0-9](?:[\w./-]{1,28}[A-Za-z0-9])(?![\w-])"
"""A number as offices give it: a digit in it, three characters or more."""
SPACED_CODE = r"(?=[\w ./-]*\d)[A-Za-z0-9]{1,12}(?:[ ./-]?(?=[\w.-]*\d)[A-Za-z0-9]{2,12}){0,4}(?![\w-])"
"""The same, perhaps written in groups, each with a digit."""
BETWEEN_NAME_AND_CODE = (
    r"(?:[\"')\]]*[ \t]*(?:[:#=]|n[o°º]\.?:?|num(?:ber|éro)?\b:?|nr\.?:?|id\b:?|code\b:?|is\b:?|was\b:?|"
    r"\([A-Z]{2,5}\)){0,3}[ \t]*[\"']?){1,2}"
)
"""What may stand between the word and the number, such as `no.:` or ` is `."""


VIN_DIGITS = str.maketrans("ABCDEFGHJKLMNPRSTUVWXYZ", "12345678123457923456789")
VIN_WEIGHTS = (8, 7, 6, 5, 4, 3, 2, 10, 0, 9, 8, 7, 6, 5, 4, 3, 2)
"""What each letter counts for, and the weight of each of the 17 places (49 CFR 565)."""


def is_vin(text: str) -> bool:
    """Whether the 17 characters of a vehicle identification number have the check digit of 49 CFR 565 (ninth place).

    So other codes of 17 letters and digits are mostly not taken for one.
    """
    digits = text.translate(VIN_DIGITS)
    weighted_sum = sum(weight * int(digit) for digit, weight in zip(digits, VIN_WEIGHTS, strict=True))
    has_check_digit = text[8] == "0123456789X"[weighted_sum % 11]
    return has_check_digit and len(set(text)) > 4  # few different characters are an example, not a vehicle


NAMED_CODES = {  # (type, shape of the value, score): words before it, and pieces of these one of which has to be there
    ("MEDICAL_RECORD", CODE, 0.9): (
        r"mrn|mr ?#|med(?:ical)? rec(?:ord)?s?|patient(?:[ -]?id(?:entifier)?| number| no\.?| #)|chart (?:number|no\.?|#|id)|"
        r"hospital (?:number|no\.?)|encounter (?:number|id|no\.?|#)|patientennummer|"
        r"numéro de dossier|accession (?:number|no\.?|#)",
        "mrn|mr#|mr #|record|rec|patient|chart|hospital|encounter|dossier|accession",
    ),
    ("HEALTH_PLAN", CODE, 0.85): (
        r"(?:health )?(?:plan|insurance|medicare|medicaid)(?: member)? (?:id|number|no\.?|#)|policy (?:number|no\.?|id|#)|"
        r"(?:member|subscriber|beneficiary)[ -]?(?:id|number|no\.?|#)|group (?:number|no\.?|#)|"
        r"versicherten ?(?:nummer|nr\.?)|krankenkasse(?:nnummer)?",
        "plan|insurance|medica|member|subscriber|beneficiary|policy|group n|group #|versicherten|krankenkasse",
    ),
    ("ACCOUNT", SPACED_CODE, 0.8): (
        r"(?:bank |checking |savings |customer |client )?(?:account|acct)\.?(?: (?:number|no\.?|id|#)|#|[ \t]*:|(?= [*\d]))|"
        r"a/c(?: no\.?)?|routing (?:number|no\.?|#)|sort code|customer (?:id|number|no\.?|#)|konto(?:nummer|-?nr\.?)|"
        r"kunden(?:nummer|-?nr\.?)|numéro de (?:compte|client)|bank ?leitzahl|blz",
        "account|acct|a/c|routing|sort code|customer|konto|kunden|compte|de client|leitzahl|blz",
    ),
    ("LICENSE", CODE, 0.8): (
        r"driv(?:er'?s?|er’s|ing)[ -]?licen[cs]e|dl(?= ?(?:#|no|number|:))|licen[cs]e (?:number|no\.?|id|#)|passport|"
        r"certificate (?:number|no\.?|#)|dea(?= ?(?:#|no|number|:))|führerschein(?:nummer)?|(?:reise)?pass(?:nummer|-?nr\.?)|"
        r"personalausweis(?:nummer)?|permis de conduire|passeport",
        "licen|dl|passport|certificate|dea|führerschein|pass|ausweis|permis",
    ),
    ("VEHICLE", r"[A-HJ-NPR-Z0-9]{11,17}(?!\w)", 0.85): ("vin|vehicle identification", "vin|vehicle"),
    ("VEHICLE", r"(?=[\w -]*\d)[A-ZÄÖÜ0-9]{1,4}(?:[ -]?[A-Z0-9]{1,4}){1,2}(?!\w)", 0.8): (
        r"(?:licen[cs]e|number|registration) plate|(?:vehicle )?registration(?= (?:number|no|mark))|"
        r"plate(?= (?:number|no|#)|[#:])|kennzeichen|immatriculation|reg\.? no\.?",
        "plate|registration|kennzeichen|immatriculation|reg",
    ),
    ("DEVICE", CODE, 0.8): (
        r"(?:device |implant )?serial(?: (?:number|no\.?|#)|#|:)|s/n|sn:|device (?:id|identifier|number|no\.?)|"
        r"(?:pacemaker|implant) (?:id|number|no\.?|#)|imei|meid|udi|seriennummer",
        "serial|s/n|sn:|device|pacemaker|implant|imei|meid|udi|serien",
    ),
}
VIN = r"(?<![\w-])([A-HJ-NPR-Z0-9]{8}[0-9X][A-HJ-NPR-Z0-9]{8})(?![\w-])"
NAMED_USER = (
    r"(?i)(?<!\w)(?:user ?(?:name|id)|login(?: name)?|screen ?name|handle|nickname|benutzername|identifiant|skype|telegram|"
    r"instagram|twitter|discord)[\"']?(?: is| was|:| :| =|=){1,2} ?[\"'“]?(@?[a-z][\w.#-]{1,30}\w)(?![\w@(])"
)
NAMING_WORDS = "user|login|screen|handle|nickname|benutzer|identifiant|skype|telegram|instagram|twitter|discord"
HANDLE = (
    r"(?<![\w@./`])@(?!(?:property|dataclass|staticmethod|classmethod|override|param|return|returns|throws|pytest|media|import|"
    r"abstractmethod|cached_property|app|test|charset|see|since|author|deprecated|types?|interface|everyone|here|channel)\b)"
    r"([A-Za-z_]\w{2,29}(?:\.\w{1,20}){0,2})(?![\w@(/])"
)
OFFICES = [
    *(
        privacy_rule(
            type_,
            rf"(?i)(?<!\w)(?:{names}){BETWEEN_NAME_AND_CODE}({shape})",
            score,
            required_texts=hints,
            needs="digit",
        )
        for (type_, shape, score), (names, hints) in NAMED_CODES.items()
    ),
    privacy_rule(
        "LICENSE",
        rf"(?i)(?<!\w)npi{BETWEEN_NAME_AND_CODE}(\d{{10}})(?!\d)",
        0.95,
        check=is_npi,
        required_texts="npi",
        needs="digit",
    ),
    privacy_rule("VEHICLE", VIN, 0.85, check=lambda text: is_vin(text) and not text.isdecimal(), needs="digit"),
    privacy_rule("USERNAME", NAMED_USER, 0.75, required_texts=NAMING_WORDS),
    privacy_rule("USERNAME", HANDLE, 0.6, contrary_words=re.compile(r"(?:^|\n)[ \t*]*@$"), needs="at"),
]

MONTH = (
    r"(?:jan(?:uary|uar|vier)?|feb(?:ruary|ruar)?|févr(?:ier)?|enero|febrero|mar(?:ch|s|zo)?|märz|"
    r"apr(?:il)?|avr(?:il)?|abril|may|mai|mayo|june?|juni|juin|junio|"
    r"july?|juli|juillet|julio|aug(?:ust)?|août|agosto|sept?(?:ember|embre)?|septiembre|oct(?:ober|obre)?|"
    r"okt(?:ober)?|octubre|"
    r"nov(?:ember|embre|iembre)?|dec(?:ember)?|dez(?:ember)?|déc(?:embre)?|diciembre)"
)
DAY = r"(?:0?[1-9]|[12]\d|3[01])"
YEAR = r"(?:1[89]|20)\d{2}"
DATE_SHAPE = "|".join(
    (
        rf"{YEAR}([-/.])(?:0?[1-9]|1[0-2])\2{DAY}(?=\D|T|$)",
        rf"{DAY}([-/.])(?:0?[1-9]|1[0-2])\3(?:{YEAR}|\d{{2}})",
        rf"(?:0?[1-9]|1[0-2])([-/])(?:{DAY})\4(?:{YEAR}|\d{{2}})",
        rf"(?i:{MONTH})\.? {DAY}(?:st|nd|rd|th)?(?:,? (?:of )?(?:{YEAR}|'\d{{2}}))?",
        rf"{DAY}(?:st|nd|rd|th|er|\.)?[ -](?:of |de )?(?i:{MONTH})\.?(?:,?[ -](?:de )?(?:{YEAR}|'\d{{2}}))?",
        rf"(?i:{MONTH})\.?,? (?:of |de )?{YEAR}",
        rf"(?:0?[1-9]|1[0-2])/{YEAR}",
    )
)
"""A date more precise than a year; groups 2 to 4 hold its separators, so group 1 has to be the whole."""
BIRTH = whole_words(
    r"dob|d\.o\.b\.?|date[ -]of[ -]birth|birth ?dates?|birth ?days?|born(?: on| in)?|geb(?:oren|\.)?(?: am)?|geburtsdatum|"
    r"née?(?: le)?|date de naissance|nacid[oa](?: el)?|fecha de nacimiento|nat[oa] il|geboortedatum"
).pattern
NINETY = r"(?:9\d|1[01]\d|12[0-5])"
OLD = r"(?=[ -]?(?:years?|yrs?|yr)[ -]old\b|[ -]?y/?o\b|[ -]year[ -]old|[ -]?ans\b|[ -]Jahre)"
BORN = rf"(?i:{BIRTH})[\"')\]]*[ \t]*[:=–-]?[ \t]*[\"(]?(?<![\w.])({DATE_SHAPE})(?![\w])(?!\.\d)"
MOMENT = rf"(?<![\w./-])({YEAR}-(?:0[1-9]|1[0-2])-{DAY}T\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:?\d\d)?)(?!\w)"
DATED = rf"(?<![\w./-])(?=[0-9adefjmnosADEFJMNOS])({DATE_SHAPE})(?!\w|[./-]\d)"
DATES = [
    privacy_rule(
        "DATE_OF_BIRTH", BORN, 0.95, needs="digit", required_texts="birth|born|dob|d.o.b|geb|né|naci|nato|nata|naiss"
    ),
    privacy_rule("DATE", DATED, 0.8, needs="digit", contrary_words=NOT_PERSONAL_WORDS_REGEX),
    privacy_rule("DATE", MOMENT, 0.85, needs="digit"),
    privacy_rule(
        "AGE", rf"(?i)(?<![\w.,/-])({NINETY}){OLD}", 0.85, needs="digit", required_texts="old|yo|y/o|ans|jahre"
    ),
    privacy_rule(
        "AGE",
        rf"(?i)(?<!\w)age[ds]?(?: of|:| is|=)? ?({NINETY})(?![\w.,]?\d|\w|%)",
        0.85,
        needs="digit",
        required_texts="age",
    ),
]

UK_POSTCODE = r"(?:GIR ?0AA|[A-PR-UWYZ](?:\d[\dA-HJKPSTUW]?|[A-HK-Y]\d[\dABEHMNPRVWXY]?) ?\d[ABD-HJLNP-UW-Z]{2})"
STATE = (
    r"(?:A[KLRZ]|C[AOT]|D[CE]|FL|GA|HI|I[ADLN]|K[SY]|LA|M[ADEINOST]|N[CDEHJMVY]|O[HKR]|PA|PR|RI|S[CD]|"
    r"T[NX]|UT|V[AT]|W[AIVY])"
)
NAMED_CODE = (
    r"(?i)(?<!\w)(?:zip|zip ?code|post(?:al)? ?code|postleitzahl|plz|code postal|código postal)(?: is)?[ \t]*:?[ \t]*"
    r"(\d{5}(?:-\d{4})?|\d{4} ?[A-Z]{2}|[A-Z]\d[A-Z] ?\d[A-Z]\d)(?!\w)"
)
POSTCODES = [
    privacy_rule("POSTCODE", rf"(?<![\w-])({UK_POSTCODE})(?![\w-])", 0.75, needs="digit"),
    privacy_rule("POSTCODE", rf"(?<!\w){STATE},?[ \t]+(\d{{5}}(?:-\d{{4}})?)(?![\w-])", 0.8, needs="digit"),
    privacy_rule("POSTCODE", NAMED_CODE, 0.85, needs="digit"),
]

RULES: tuple[PrivacyRule, ...] = (*OFFICES, *DATES, *POSTCODES)


PHONE_CANDIDATE_REGEX = re.compile(
    r"(?<![\w.,/$£€=#])(?<!\w-)((?:\+|00)?\(?[0-9][0-9 ()./\u00a0\u2010-\u2013-]{5,24}[0-9])(?![\w%]|"
    r"-[A-Za-z]|[.,]\d)"
    r"(?:[ ,]{0,2}(?:x|ext\.?|extension) ?[0-9]{1,6}\b)?"
)
"""A run of digits that may be a telephone number (group 1), and its extension."""
DATE_REGEX = re.compile(r"(?:\d{4}[-./ ]\d{1,2}[-./ ]\d{1,2}|\d{1,2}[-./]\d{1,2}[-./]\d{2,4})(?:\s+\d{1,2}.*)?$")
PHONE_WORDS_REGEX = whole_words(
    r"tel|tel\.|telephone|phones?|phone number|calls?|called|mobile|cell|cellphone|dial|ring|text|whatsapp|sms|contact|"
    r"reach(?: me| us| him| her)?|telefon|handy|rufnummer|téléphone|portable|móvil|teléfono|cellulare|telefono|telefoon|pager|"
    "hotline|ph|t:|m:|voicemail"
)
FAX_WORDS_REGEX = re.compile(
    r"(?<!\w)(?:tele)?(?:fax(?:ed)?|facsimile|telecopie|télécopie)(?:[ -]?(?:number|no|nr|nummer)\.?)?"
    r"(?: (?:it|them|this|that|the \w+))?(?: is| to| at| on)?[ \t]*[:.#]?[ \t(]*$",
    re.IGNORECASE,
)
PHONE_KIND_REGEX = re.compile(r"[ \t]*\(?(?:mobile|cell|home|work|office|fax)\b", re.IGNORECASE)
"""Stands behind a telephone number, as in `555-0123 (home)`."""
THOUSANDS_REGEX = re.compile(r"\d{1,3}(?:\.\d{3})+$")
"""A large number as it is written in Germany: 1.000.000."""

INTERNATIONAL_SCORE = 0.95
USUAL_GROUPS_SCORE = 0.75
NATIONAL_PREFIX_SCORE = 0.55
BARE_SCORE = 0.4
"""Scores of a telephone number by the way it is written."""
FAX_SCORE = 0.85
"""Least score of a number behind the word fax."""


def find_phone_numbers(text: str, regions: Sequence[str]) -> list[PrivacyFinding]:
    """Find telephone numbers in a text, each with a score from 0 to 1 for how certain it is; right after the word fax as FAX.

    `regions`: countries (ISO 3166-1 alpha-2) whose national numbers are looked for. The score is the one that the number's
    spelling gives, changed by what stands around it: words for telephone or fax raise it, words such as "order" lower it.
    """
    findings = []
    for match in PHONE_CANDIDATE_REGEX.finditer(text):
        candidate = match[1]
        num_digits = sum(character.isdecimal() for character in candidate)
        # A telephone number has 7 to 17 digits here, and dates look like one.
        if not 7 <= num_digits <= 17 or DATE_REGEX.match(candidate):
            continue
        numbers = _valid_numbers(candidate, tuple(regions))
        for index, number in enumerate(numbers):
            start = match.start(1) + number.begin
            end = match.start(1) + number.end
            is_last = index == len(numbers) - 1
            if is_last and number.end == len(candidate):
                end = match.end()  # the extension, which follows the last number, belongs to it
            before = text[max(0, start - CHARACTERS_BEFORE) : start]
            after = text[end : end + CHARACTERS_AFTER]
            is_fax = FAX_WORDS_REGEX.search(before) is not None
            score = _score_in_context(candidate, number.score, before, after, is_fax=is_fax)
            findings.append(PrivacyFinding("FAX" if is_fax else "PHONE", start, end, score))
    return findings


def _score_in_context(candidate: str, spelling_score: float, before: str, after: str, *, is_fax: bool) -> float:
    """How certain a telephone number is, from 0 to 1, by the first case that applies:

    - a word before it speaks against it ("order"), and it is not written internationally: lowered;
    - the word fax stands before it (`is_fax`): at least `FAX_SCORE`;
    - a word for telephone before it, or its kind behind it ("(home)"): at least `USUAL_GROUPS_SCORE`;
    - it is written like a large number (1.000.000): lowered;
    - else the `spelling_score` that its spelling gives.
    `candidate`: the number as written. `before`, `after`: the text around it.
    """
    is_international = spelling_score >= INTERNATIONAL_SCORE
    if not is_international and NOT_PERSONAL_WORDS_REGEX.search(before):
        return SCORE_AFTER_CONTRARY_WORDS
    if is_fax:
        return max(spelling_score, FAX_SCORE)
    if PHONE_WORDS_REGEX.search(before) or PHONE_KIND_REGEX.match(after):
        return max(spelling_score, USUAL_GROUPS_SCORE)
    if THOUSANDS_REGEX.match(candidate):
        return SCORE_AFTER_CONTRARY_WORDS
    return spelling_score


class PhoneNumberSpan(NamedTuple):
    """A valid telephone number in a run of digits."""

    begin: int
    end: int
    """In characters of the run."""
    score: float
    """0 to 1."""


@lru_cache(maxsize=4096)
def _valid_numbers(candidate: str, regions: tuple[str, ...]) -> tuple[PhoneNumberSpan, ...]:
    """Find the valid telephone numbers in a run of digits: "+49 30 123456" -> (PhoneNumberSpan(0, 13, 0.95),).

    Written internationally, a number needs no country. Else it is read as a number of the country of `regions` in which it is
    most certain.
    """
    numbers = _international_numbers(candidate) if candidate.startswith(("+", "00")) else ()
    return numbers or _best_national_numbers(candidate, regions)


def _international_numbers(candidate: str) -> tuple[PhoneNumberSpan, ...]:
    """Find the valid telephone numbers in a run of digits that begins with + or 00, the international prefix."""
    import phonenumbers

    # Without a country the library does not know that 00 is the international prefix.
    with_plus = "+" + candidate[2:] if candidate.startswith("00") else candidate
    shift = len(candidate) - len(with_plus)
    numbers = []
    for match in phonenumbers.PhoneNumberMatcher(with_plus, None):
        # A match at 0 begins with the prefix that was replaced, and takes in both zeros.
        begin = match.start + shift if match.start else 0
        numbers.append(PhoneNumberSpan(begin, match.end + shift, INTERNATIONAL_SCORE))
    return tuple(numbers)


def _best_national_numbers(candidate: str, regions: tuple[str, ...]) -> tuple[PhoneNumberSpan, ...]:
    """Find the valid telephone numbers in a run of digits, read as in the country of `regions` where one is most certain.

    The same digits may be a number in several countries. Empty if they are in none.
    """
    import phonenumbers

    best_numbers: list[PhoneNumberSpan] = []
    best_score = 0.0
    for region in regions:
        numbers = []
        for match in phonenumbers.PhoneNumberMatcher(candidate, region):
            numbers.append(PhoneNumberSpan(match.start, match.end, _national_score(match)))
        score = max((number.score for number in numbers), default=0.0)
        if score > best_score:
            best_numbers = numbers
            best_score = score
        if best_score >= USUAL_GROUPS_SCORE:  # the highest that a national number can have
            break
    return tuple(best_numbers)


def _national_score(match: PhoneNumberMatch) -> float:
    """How certain a telephone number is that is not written internationally, from 0 to 1, by how its digits are grouped.

    0.75 if they are grouped as its country groups them (555-0123 in the US, 01 23 45 67 89 in France); 0.55 if they are in groups
    and begin with a national prefix, a bracket or the code of the country; else 0.4. `match`: what the library phonenumbers
    found.
    """
    import phonenumbers
    from phonenumbers import PhoneNumberFormat

    number = match.number
    raw = match.raw_string
    groups = re.findall(r"\d+", raw)
    for style in (PhoneNumberFormat.NATIONAL, PhoneNumberFormat.INTERNATIONAL):
        usual_groups = re.findall(r"\d+", phonenumbers.format_number(number, style))
        if groups == usual_groups and len(groups) > 1:
            return USUAL_GROUPS_SCORE
    has_prefix = raw.startswith(("0", "(")) or groups[0] == str(number.country_code)
    if len(groups) > 1 and has_prefix:
        return NATIONAL_PREFIX_SCORE
    return BARE_SCORE


def canonical_phone_number(text: str, regions: Sequence[str]) -> str:
    """E.164 of a telephone number (`+14155552671`) however it is written; its digits if it is valid in none of the countries.

    `regions`: the countries whose national numbers are read, such as "GB". Written internationally, a number needs none of them.
    """
    import phonenumbers

    with_plus = re.sub(r"^\s*00", "+", text)
    for region in (None, *regions):
        try:
            number = phonenumbers.parse(with_plus, region)
        except phonenumbers.NumberParseException:
            continue
        if phonenumbers.is_valid_number(number):
            return phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)
    return "".join(character for character in text if character.isdecimal())
