"""Rules for data that the words beside it give away: records, policies, accounts, licences, vehicles, user names; for dates.

Dates, ages and postcodes are known as they are written in the US, the UK, Germany and France.
"""

# ruff: noqa: RUF001

from __future__ import annotations

import re

from trainer.data.stages.privacy.patterns import compact, npi
from trainer.data.stages.privacy.rule import NOT_PERSONAL, Rule, rule, words

CODE = r"(?=[\w./-]*\d)[A-Za-z0-9](?:[\w./-]{1,28}[A-Za-z0-9])(?![\w-])"
"""A number of an office: a digit in it, three characters or more."""
SPACED = r"(?=[\w ./-]*\d)[A-Za-z0-9]{1,12}(?:[ ./-]?(?=[\w.-]*\d)[A-Za-z0-9]{2,12}){0,4}(?![\w-])"
"""The same, perhaps written in groups, each with a digit."""
IS = (
    r"(?:[\"')\]]*[ \t]*(?:[:#=]|n[o°º]\.?:?|num(?:ber|éro)?\b:?|nr\.?:?|id\b:?|code\b:?|is\b:?|was\b:?|"
    r"\([A-Z]{2,5}\)){0,3}[ \t]*[\"']?){1,2}"
)
"""What may stand between the word and the number."""


def _after(type_: str, names: str, value: str, score: float, hints: str) -> Rule:
    return rule(type_, rf"(?i)(?<!\w)(?:{names}){IS}({value})", score, hints=hints, needs="digit")


VIN_VALUES = dict(
    zip("ABCDEFGHJKLMNPRSTUVWXYZ", (1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 7, 9, 2, 3, 4, 5, 6, 7, 8, 9), strict=True)
)
VIN_WEIGHTS = (8, 7, 6, 5, 4, 3, 2, 10, 0, 9, 8, 7, 6, 5, 4, 3, 2)


def vin(text: str) -> bool:
    """Vehicle identification number with the check digit of 49 CFR 565 (ninth place)."""
    value = compact(text)
    if len(value) != 17 or len(set(value)) < 5 or any(not (c.isdecimal() or c in VIN_VALUES) for c in value):
        return False
    total = sum(w * (int(c) if c.isdecimal() else VIN_VALUES[c]) for c, w in zip(value, VIN_WEIGHTS, strict=True))
    return value[8] == "0123456789X"[total % 11]


ANNOUNCED = (
    _after(
        "MEDICAL_RECORD",
        r"mrn|mr ?#|med(?:ical)? rec(?:ord)?s?|patient(?:[ -]?id(?:entifier)?| number| no\.?| #)|"
        r"chart (?:number|no\.?|#|id)"
        r"|hospital (?:number|no\.?)|encounter (?:number|id|no\.?|#)|patientennummer|numéro de dossier|"
        r"accession (?:number|no\.?|#)",
        CODE,
        0.9,
        "mrn|mr#|mr #|record|rec|patient|chart|hospital|encounter|dossier|accession",
    ),
    _after(
        "HEALTH_PLAN",
        r"(?:health )?(?:plan|insurance|medicare|medicaid)(?: member)? (?:id|number|no\.?|#)|(?:member|"
        r"subscriber|beneficiary)[ -]?(?:id|number|no\.?|#)"
        r"|policy (?:number|no\.?|id|#)|group (?:number|no\.?|#)|versicherten ?(?:nummer|nr\.?)|"
        r"krankenkasse(?:nnummer)?",
        CODE,
        0.85,
        ("plan|insurance|medica|member|subscriber|beneficiary|policy|group n|group #|versicherten|krankenkasse"),
    ),
    _after(
        "ACCOUNT",
        r"(?:bank |checking |savings |customer |client )?(?:account|acct)\.?(?: (?:number|no\.?|id|#)|#|"
        r"[ \t]*:|(?= [*\d]))|a/c(?: no\.?)?|routing (?:number|no\.?|#)"
        r"|sort code|customer (?:id|number|no\.?|#)|konto(?:nummer|-?nr\.?)|kunden(?:nummer|-?nr\.?)|"
        r"numéro de (?:compte|client)|bank ?leitzahl|blz",
        SPACED,
        0.8,
        "account|acct|a/c|routing|sort code|customer|konto|kunden|compte|de client|leitzahl|blz",
    ),
    _after(
        "LICENSE",
        r"driv(?:er'?s?|er’s|ing)[ -]?licen[cs]e|dl(?= ?(?:#|no|number|:))|licen[cs]e (?:number|no\.?|id|#)|"
        r"passport|certificate (?:number|no\.?|#)"
        r"|dea(?= ?(?:#|no|number|:))|führerschein(?:nummer)?|(?:reise)?pass(?:nummer|-?nr\.?)|"
        r"personalausweis(?:nummer)?|permis de conduire|passeport",
        CODE,
        0.8,
        "licen|dl|passport|certificate|dea|führerschein|pass|ausweis|permis",
    ),
    rule("LICENSE", rf"(?i)(?<!\w)npi{IS}(\d{{10}})(?!\d)", 0.95, check=npi, hints="npi", needs="digit"),
    rule(
        "VEHICLE",
        r"(?<![\w-])([A-HJ-NPR-Z0-9]{8}[0-9X][A-HJ-NPR-Z0-9]{8})(?![\w-])",
        0.85,
        check=lambda text: vin(text) and not text.isdecimal(),
        needs="digit",
    ),
    _after("VEHICLE", r"vin|vehicle identification", r"[A-HJ-NPR-Z0-9]{11,17}(?!\w)", 0.85, "vin|vehicle"),
    _after(
        "VEHICLE",
        r"(?:licen[cs]e|number|registration) plate|(?:vehicle )?registration(?= (?:number|no|mark))|"
        r"plate(?= (?:number|no|#)|[#:])|kennzeichen|immatriculation|reg\.? no\.?",
        r"(?=[\w -]*\d)[A-ZÄÖÜ0-9]{1,4}(?:[ -]?[A-Z0-9]{1,4}){1,2}(?!\w)",
        0.8,
        "plate|registration|kennzeichen|immatriculation|reg",
    ),
    _after(
        "DEVICE",
        r"(?:device |implant )?serial(?: (?:number|no\.?|#)|#|:)|s/n|sn:|device (?:id|identifier|number|"
        r"no\.?)|(?:pacemaker|implant) (?:id|number|no\.?|#)|imei|meid|udi|seriennummer",
        CODE,
        0.8,
        "serial|s/n|sn:|device|pacemaker|implant|imei|meid|udi|serien",
    ),
    rule(
        "USERNAME",
        (
            r"(?i)(?<!\w)(?:user ?(?:name|id)|login(?: name)?|screen ?name|handle|nickname|benutzername|"
            r"identifiant|skype|telegram|instagram|twitter|discord)"
            r"[\"']?(?: is| was|:| :| =|=){1,2} ?[\"'“]?(@?[a-z][\w.#-]{1,30}\w)(?![\w@(])"
        ),
        0.75,
        hints="user|login|screen|handle|nickname|benutzer|identifiant|skype|telegram|instagram|twitter|discord",
    ),
    rule(
        "USERNAME",
        (
            r"(?<![\w@./`])@(?!(?:property|dataclass|staticmethod|classmethod|override|param|return|returns|"
            r"throws|pytest|media|import|"
            r"abstractmethod|cached_property|app|test|charset|see|since|author|deprecated|types?|interface|"
            r"everyone|here|channel)\b)"
            r"([A-Za-z_]\w{2,29}(?:\.\w{1,20}){0,2})(?![\w@(/])"
        ),
        0.6,
        against=re.compile(r"(?:^|\n)[ \t*]*@$"),
        needs="at",
    ),
)

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
BIRTH = words(
    "dob", r"d\.o\.b\.?", r"date[ -]of[ -]birth", "birth ?dates?", "birth ?days?", "born(?: on| in)?",
    r"geb(?:oren|\.)?(?: am)?", "geburtsdatum", "née?(?: le)?", "date de naissance", "nacid[oa](?: el)?",
    "fecha de nacimiento", "nat[oa] il", "geboortedatum",
).pattern  # fmt: skip
NINETY = r"(?:9\d|1[01]\d|12[0-5])"
DATES = [
    rule(
        "DATE_OF_BIRTH",
        rf"(?i:{BIRTH})[\"')\]]*[ \t]*[:=–-]?[ \t]*[\"(]?(?<![\w.])({DATE_SHAPE})(?![\w])(?!\.\d)",
        0.95,
        needs="digit",
        hints="birth|born|dob|d.o.b|geb|né|naci|nato|nata|naiss",
    ),
    rule(
        "DATE",
        rf"(?<![\w./-])(?=[0-9adefjmnosADEFJMNOS])({DATE_SHAPE})(?!\w|[./-]\d)",
        0.8,
        needs="digit",
        against=NOT_PERSONAL,
    ),
    rule(
        "DATE",
        rf"(?<![\w./-])({YEAR}-(?:0[1-9]|1[0-2])-{DAY}T\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:?\d\d)?)(?!\w)",
        0.85,
        needs="digit",
    ),
    rule(
        "AGE",
        rf"(?i)(?<![\w.,/-])({NINETY})(?=[ -]?(?:years?|yrs?|yr)[ -]old\b|[ -]?y/?o\b|[ -]year[ -]old|"
        rf"[ -]?ans\b|[ -]Jahre)",
        0.85,
        needs="digit",
        hints="old|yo|y/o|ans|jahre",
    ),
    rule(
        "AGE", rf"(?i)(?<!\w)age[ds]?(?: of|:| is|=)? ?({NINETY})(?![\w.,]?\d|\w|%)", 0.85, needs="digit", hints="age"
    ),
]

UK_POSTCODE = r"(?:GIR ?0AA|[A-PR-UWYZ](?:\d[\dA-HJKPSTUW]?|[A-HK-Y]\d[\dABEHMNPRVWXY]?) ?\d[ABD-HJLNP-UW-Z]{2})"
STATE = (
    r"(?:A[KLRZ]|C[AOT]|D[CE]|FL|GA|HI|I[ADLN]|K[SY]|LA|M[ADEINOST]|N[CDEHJMVY]|O[HKR]|PA|PR|RI|S[CD]|"
    r"T[NX]|UT|V[AT]|W[AIVY])"
)
POSTCODES = [
    rule("POSTCODE", rf"(?<![\w-])({UK_POSTCODE})(?![\w-])", 0.75, needs="digit"),
    rule("POSTCODE", rf"(?<!\w){STATE},?[ \t]+(\d{{5}}(?:-\d{{4}})?)(?![\w-])", 0.8, needs="digit"),
    rule(
        "POSTCODE",
        r"(?i)(?<!\w)(?:zip|zip ?code|post(?:al)? ?code|postleitzahl|plz|code postal|"
        r"código postal)(?: is)?[ \t]*:?[ \t]*(\d{5}(?:-\d{4})?|\d{4} ?[A-Z]{2}|[A-Z]\d[A-Z] ?\d[A-Z]\d)(?!\w)",
        0.85,
        needs="digit",
    ),
]

RULES: tuple[Rule, ...] = (*ANNOUNCED, *DATES, *POSTCODES)
