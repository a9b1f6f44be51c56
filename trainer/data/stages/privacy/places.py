"""Rules for dates, ages, street addresses and postcodes, as written in the US, the UK, Germany and France."""

# ruff: noqa: RUF001

from __future__ import annotations

from trainer.data.stages.privacy.patterns import rule
from trainer.data.stages.privacy.rule import NOT_PERSONAL, Rule, words

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
        hints=("birth", "born", "dob", "d.o.b", "geb", "né", "naci", "nato", "nata", "naiss"),
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
        hints=("old", "yo", "y/o", "ans", "jahre"),
    ),
    rule(
        "AGE",
        rf"(?i)(?<!\w)age[ds]?(?: of|:| is|=)? ?({NINETY})(?![\w.,]?\d|\w|%)",
        0.85,
        needs="digit",
        hints=("age",),
    ),
]

UK_POSTCODE = r"(?:GIR ?0AA|[A-PR-UWYZ](?:\d[\dA-HJKPSTUW]?|[A-HK-Y]\d[\dABEHMNPRVWXY]?) ?\d[ABD-HJLNP-UW-Z]{2})"
STATE = (
    r"(?:A[KLRZ]|C[AOT]|D[CE]|FL|GA|HI|I[ADLN]|K[SY]|LA|M[ADEINOST]|N[CDEHJMVY]|O[HKR]|PA|PR|RI|S[CD]|"
    r"T[NX]|UT|V[AT]|W[AIVY])"
)
TOWN = r"[A-ZÄÖÜÉÈ][^\W\d_]+(?:[ -][A-ZÄÖÜÉÈ]?[^\W\d_]+){0,3}"
CITY = rf"(?:,|\n)[ \t]*{TOWN}"
NUMBER = r"\d{1,5}(?:[-/]\d{1,4})?[a-zA-Z]?"
UNIT = r"(?:,? (?:Apt|Apartment|Suite|Ste|Unit|Flat|Room|Floor|#)\.? ?[\w-]{1,6})?"
STREET = (
    r"(?:Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Place|Pl|Square|Sq|Terrace|"
    r"Ter|Way|Parkway|Pkwy|Highway|Hwy|Close|Crescent|Gardens|Grove|Mews|Hill|Circle|Cir|Trail)"
)
PLACES = [
    rule(
        "ADDRESS",
        rf"(?<![\w.$£€/-])((?:Flat \w{{1,4}},? )?{NUMBER},? (?:(?:[NSEW]|North|South|East|West)\.? )?"
        rf"(?:[A-Z0-9][\w'’.-]{{0,24}} ){{1,4}}{STREET}\b\.?{UNIT}(?:(?:{CITY},?|"
        rf",)[ \t]+{STATE},?[ \t]+\d{{5}}(?:-\d{{4}})?"
        rf"|(?:{CITY})?,?[ \t\n]*{UK_POSTCODE}|{CITY}(?:, {STATE}\b)?)?)",
        0.8,
        needs="digit",
    ),
    rule(
        "ADDRESS",
        r"(?i)(?<!\w)((?:P\.? ?O\.? Box|Post(?:al)? Box|Postfach) \d{1,7})(?!\w)",
        0.8,
        hints=("box ", "postfach"),
        needs="digit",
    ),
    rule(
        "ADDRESS",
        rf"(?<!\w)((?:[A-ZÄÖÜ][\w-]+(?:straße|strasse|str\.|weg|platz|allee|gasse|ufer|damm|ring)|"
        rf"(?:[A-ZÄÖÜ][\wäöüß-]+[ -]){{1,3}}(?:Straße|Strasse|Str\.|Weg|Platz|Allee|Gasse|Ufer|Damm|Ring))"
        rf" \d{{1,4}} ?[a-z]?\b(?:,?\s+(?:D-)?\d{{5}} {TOWN})?)",
        0.8,
        needs="digit",
        hints=("str", "weg", "platz", "allee", "gasse", "ufer", "damm", "ring"),
    ),
    rule(
        "ADDRESS",
        r"(?<!\w)(\d{1,4}(?: ?(?:bis|ter|quater))?,? (?i:rue|avenue|av\.|boulevard|bd|place|chemin|allée|"
        r"impasse|quai|route|cours|square)"
        r"(?: (?:de la|de l['’]|des|du|de|d['’]|la|le|les|l['’]))?(?:[ -]?(?:[A-ZÉÈÀÂÎÔÇ][\w'’-]*|\d{1,2}|de|"
        r"du|des|la|le)){1,5}"
        rf"(?:,?\s+\d{{5}} {TOWN})?)",
        0.8,
        needs="digit",
        hints=(
            "rue",
            "avenue",
            "av.",
            "boulevard",
            "bd",
            "place",
            "chemin",
            "allée",
            "impasse",
            "quai",
            "route",
            "cours",
            "square",
        ),
    ),
    rule("POSTCODE", rf"(?<![\w-])({UK_POSTCODE})(?![\w-])", 0.75, needs="digit"),
    rule("POSTCODE", rf"(?<!\w){STATE},?[ \t]+(\d{{5}}(?:-\d{{4}})?)(?![\w-])", 0.8, needs="digit"),
    rule(
        "POSTCODE",
        r"(?i)(?<!\w)(?:zip|zip ?code|post(?:al)? ?code|postleitzahl|plz|code postal|"
        r"código postal)(?: is)?[ \t]*:?[ \t]*(\d{5}(?:-\d{4})?|\d{4} ?[A-Z]{2}|[A-Z]\d[A-Z] ?\d[A-Z]\d)(?!\w)",
        0.85,
        needs="digit",
    ),
    rule("POSTCODE", rf"(?:,[ \t]*|\n[ \t]*|(?<!\w)(?:D|F|A|CH)-)(\d{{5}}) (?={TOWN})", 0.55, needs="digit"),
]

RULES: tuple[Rule, ...] = (*DATES, *PLACES)
