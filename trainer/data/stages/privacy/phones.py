"""Telephone and fax numbers, by the numbering plans of all countries (the phonenumbers library).

A number counts as sure when it is written internationally, as likely when its groups are those of its country, and as
doubtful otherwise: a bare run of digits is a telephone number only beside a word that says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from trainer.data.stages.privacy.rule import AFTER, AGAINST, BEFORE, NOT_PERSONAL, Finding, words

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
