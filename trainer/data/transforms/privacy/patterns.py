"""Rules for data with a shape of its own: network addresses, cards, accounts, identity numbers, secrets; and check digits.

Shapes follow the standards that are named here, those of API keys what their issuers document. A check takes the text as
found. If it returns False, the number cannot have been issued. python-stdnum has most checks; here are separators that it does
not accept, and numbers that it does not know.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from importlib import import_module

from stdnum import numdb

from trainer.data.transforms.privacy.rule import (
    NOT_PERSONAL_WORDS_REGEX,
    VERSION_WORDS_REGEX,
    PrivacyRule,
    privacy_rule,
)

CARD_LENGTHS = (
    ("34", "34", {15}),
    ("37", "37", {15}),
    ("300", "305", {14}),
    ("36", "36", {14}),
    ("38", "39", {14}),
    ("3528", "3589", {16}),
    ("4", "4", {13, 16, 19}),
    ("50", "55", {16}),
    ("2221", "2720", {16}),
    ("56", "59", {*range(12, 20)}),
    ("60", "60", {16, 19}),
    ("62", "62", {16, 17, 18, 19}),
    ("63", "65", {16, 19}),
)
"""First digits (from, to) of card numbers and the lengths issued (ISO/IEC 7812 ranges of the large networks)."""
IBAN_LENGTHS: dict[str, int] = {
    country: 4 + sum(map(int, re.findall(r"(\d+)!", about["bban"])))
    for _, country, _, about, _ in numdb.get("iban").prefixes
    if "bban" in about
}
"""Length of an IBAN by country (ISO 13616 registry, as stdnum has it)."""


def letters_and_digits(text: str) -> str:
    """The letters and digits of a text, in capitals."""
    return "".join(character for character in text if character.isalnum()).upper()


def stdnum_check(module: str, **options: bool) -> Callable[[str], bool]:
    """Make a check from a module of the library stdnum, such as "us.ssn": whether a text is a valid number of that kind.

    The number may be written with any separators. One repeated digit is nobody's number. `options` go to the module's `is_valid`.
    """
    is_valid = import_module(f"stdnum.{module}").is_valid

    def is_valid_number(text: str) -> bool:
        number = letters_and_digits(text)
        return number.isascii() and len(set(number)) > 1 and is_valid(number, **options)

    return is_valid_number


has_luhn_digit = stdnum_check("luhn")
is_iban = stdnum_check("iban", check_country=False)
is_nie = stdnum_check("es.nie")
is_dni = stdnum_check("es.dni")


def is_card(text: str) -> bool:
    """Whether a number is that of a payment card: a known first range, a length issued there, and the Luhn digit."""
    number = letters_and_digits(text)
    for lowest, highest, lengths in CARD_LENGTHS:
        first_digits = number[: len(lowest)]
        if lowest <= first_digits <= highest and len(number) in lengths:
            return has_luhn_digit(number)
    return False


def is_spanish_nif(text: str) -> bool:
    """Whether a text is a Spanish NIE, or a DNI, which may lack its leading zeros."""
    return is_nie(text) or is_dni(letters_and_digits(text).rjust(9, "0"))


def is_nino(text: str) -> bool:
    """Whether the prefix of a UK national insurance number is one that is allocated."""
    return letters_and_digits(text)[:2] not in {"BG", "GB", "NK", "KN", "TN", "NT", "ZZ"}


def is_itin(text: str) -> bool:
    """Whether a number is a US ITIN: starts with 9, group 50-65, 70-88, 90-92 or 94-99.

    stdnum knows the groups before 2011 only.
    """
    number = letters_and_digits(text)
    group = int(number[3:5])
    is_issued_group = 50 <= group <= 65 or 70 <= group <= 88 or 90 <= group <= 92 or 94 <= group <= 99
    return number[0] == "9" and is_issued_group


def is_npi(text: str) -> bool:
    """Whether ten digits are a US National Provider Identifier: Luhn over 80840 and these."""
    return has_luhn_digit("80840" + letters_and_digits(text))


NUMBER_START = r"(?<![\w.])(?<!\w-)"
NUMBER_END = r"(?!\w|-\w|\.\d)"
"""Bounds of a number: not part of a longer word, decimal or hyphenated code."""


def _number_rule(
    type_: str,
    regex: str,
    score: float,
    check: Callable[[str], bool],
    nearby_words: str = "",
    score_near_words: float = 0.95,
) -> PrivacyRule:
    """Make a rule that finds identity numbers of one type, such as a tax number.

    `regex`: its form; `check`: tests the number, as by its check digit. A match has the `score` from 0 to 1. If one of the words
    `nearby_words` (separated by |) is close, it has `score_near_words`. A word right before that says otherwise, such as "order",
    lowers it.
    """
    return privacy_rule(
        type_,
        f"{NUMBER_START}({regex}){NUMBER_END}",
        score,
        check=check,
        nearby_words=nearby_words,
        score_near_words=score_near_words,
        contrary_words=NOT_PERSONAL_WORDS_REGEX,
        needs="number",
    )


def is_personal_ip(text: str) -> bool:
    """Whether a text is an IP address that could identify a person: not loopback or unspecified, which point at nobody.

    Private addresses count: within their network they may point at a person.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    # 127.0.0.1 and 0.0.0.0 are in every log.
    if address.is_loopback or address.is_unspecified:
        return False
    if address.version == 4:
        return True
    # An IPv6 address has a digit and three groups or more: `a::b` and the like are more often code than an address.
    num_groups = sum(1 for group in text.split(":") if group)
    return any(character.isdecimal() for character in text) and num_groups > 2


HEX = r"[0-9A-Fa-f]"
EMAIL = r"(?<![\w.+-])(\w(?:[\w.%+'-]{0,62}[\w+-])?@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,6}[^\W\d_]{2,24})(?![\w@])"
SPELLED_EMAIL = (
    r"(?i)(?<![\w.+-])([\w.+-]{1,64} ?(?:\(at\)|\[at\]|\{at\}| at ) ?[\w-]{1,63}"
    r"(?: ?(?:\(dot\)|\[dot\]|\{dot\}| dot ) ?[a-z]{2,24}){1,3})(?!\w)"
)
URL = r"(?i)(?<![\w@])((?:https?|ftp)://[^\s<>\"'`]+[^\s<>\"'`.,;:!?)\]}])"
WWW = r"(?i)(?<![\w@/.])(www\.(?:[\w-]+\.)+[a-z]{2,24}(?:/[^\s<>\"'`]*[^\s<>\"'`.,;:!?)\]}])?)"
IPV4 = r"(?<![\w.])(?<!\w-)((?:\d{1,3}\.){3}\d{1,3})(?!\w|\.\d|-\w)"
IPV6 = rf"(?<![\w:.])({HEX}{{0,4}}(?::{HEX}{{0,4}}){{2,7}}(?:(?<=:)(?:\d{{1,3}}\.){{3}}\d{{1,3}})?)(?![\w:])"
CISCO_MAC = rf"(?<![\w.])({HEX}{{4}}\.{HEX}{{4}}\.{HEX}{{4}})(?![\w.])"
NETWORK = [
    privacy_rule("EMAIL", EMAIL, 0.95, needs="at"),
    privacy_rule("EMAIL", SPELLED_EMAIL, 0.8, required_texts="dot)|dot]|dot}| dot "),
    privacy_rule("URL", URL, 0.9, required_texts="://"),
    privacy_rule("URL", WWW, 0.85, required_texts="www."),
    privacy_rule("IP", IPV4, 0.8, check=is_personal_ip, contrary_words=VERSION_WORDS_REGEX, needs="digit"),
    privacy_rule("IP", IPV6, 0.85, check=is_personal_ip, needs="digit"),
    privacy_rule("MAC", rf"(?<![\w:-])({HEX}{{2}}([:-])(?:{HEX}{{2}}\2){{4}}{HEX}{{2}})(?![\w:-])", 0.9),
    privacy_rule("MAC", CISCO_MAC, 0.7, check=lambda text: any(c.isalpha() for c in text)),
]


def _iban_pattern() -> str:
    r"""Make a regular expression for IBANs that knows the length of each country's, so that it takes in no word that follows.

    Its part for 22 characters is such as `(?:BG|BH|...|VA)\d{2}(?:[ -]?[0-9a-z]){18}`.
    """
    countries_by_length: dict[int, list[str]] = {}
    for country, length in IBAN_LENGTHS.items():
        countries_by_length.setdefault(length, []).append(country)
    patterns = []
    for length, countries in sorted(countries_by_length.items()):
        patterns.append(rf"(?:{'|'.join(countries)})\d{{2}}(?:[ -]?[0-9a-z]){{{length - 4}}}")
    return "|".join(patterns)


MONEY = [
    _number_rule("CREDIT_CARD", r"\d(?:[ -]?\d){11,18}", 0.85, is_card, "card|visa|mastercard|amex"),
    privacy_rule("IBAN", rf"(?i)(?<![\w-])({_iban_pattern()})(?!\w)", 0.95, check=is_iban, needs="number"),
]

NINO = r"(?i)(?<![\w-])([a-ceghj-pr-tw-z][a-ceghj-npr-tw-z] ?(?:\d{2} ?){3}[a-d])(?![\w-])"
FISCAL_CODE = (
    r"(?i)(?<!\w)([a-z]{3} ?[a-z]{3} ?[0-9lmnp-v]{2}[abcdehlmprst][0-9lmnp-v]{2} ?[a-z][0-9lmnp-v]{3}[a-z])(?!\w)"
)
NIF = r"(?:[XYZ][-. ]?\d{7}|\d{8}|\d{1,2}\.\d{3}\.\d{3})[-. ]?[A-HJ-NP-TV-Z]"
SSN_WORDS = r"ssn|social security(?: number| no\.?)?"
AADHAAR_WORDS = "aadhaar|aadhar|uidai"
NATIONAL = [
    _number_rule("US_SSN", r"\d{3}-\d{2}-\d{4}", 0.85, stdnum_check("us.ssn"), SSN_WORDS),
    _number_rule("US_SSN", r"\d{3} \d{2} \d{4}", 0.55, stdnum_check("us.ssn"), SSN_WORDS),
    _number_rule("US_SSN", r"\d{9}", 0.2, stdnum_check("us.ssn"), SSN_WORDS, score_near_words=0.9),
    _number_rule("US_ITIN", r"9\d{2}[- ]?\d{2}[- ]?\d{4}", 0.4, is_itin, r"itin|taxpayer (?:id|identification)\w*"),
    _number_rule("US_ITIN", r"9\d{2}-\d{2}-\d{4}", 0.8, is_itin),
    _number_rule("UK_NHS", r"\d{3}[ -]\d{3}[ -]\d{4}", 0.6, stdnum_check("gb.nhs"), "nhs"),
    _number_rule("UK_NHS", r"\d{10}", 0.3, stdnum_check("gb.nhs"), "nhs"),
    privacy_rule(
        "UK_NINO", NINO, 0.75, check=is_nino, nearby_words="national insurance|ni (?:number|no)|nino", needs="digit"
    ),
    _number_rule(
        "DE_TAX_ID", r"[1-9]\d ?\d{3} ?\d{3} ?\d{3}", 0.6, stdnum_check("de.idnr"), r"steuer\S*|idnr|tax id|tin"
    ),
    _number_rule(
        "FR_NIR", r"[1-478] ?\d{2} ?\d{2} ?(?:\d{2}|2[ABab]) ?\d{3} ?\d{3} ?\d{2}", 0.85, stdnum_check("fr.nir")
    ),
    _number_rule("ES_NIF", NIF, 0.65, is_spanish_nif, "dni|nie|nif"),
    privacy_rule("IT_FISCAL_CODE", FISCAL_CODE, 0.95, check=stdnum_check("it.codicefiscale"), needs="digit"),
    _number_rule(
        "NL_BSN",
        r"\d{9}|\d{4}[. ]\d{2}[. ]\d{3}|\d{3}[. ]\d{3}[. ]\d{3}",
        0.3,
        stdnum_check("nl.bsn"),
        r"bsn|burgerservicenummer|sofi\S*",
    ),
    _number_rule("PL_PESEL", r"\d{11}", 0.55, stdnum_check("pl.pesel"), "pesel"),
    _number_rule("IN_AADHAAR", r"[2-9]\d{3}([ -])\d{4}\2\d{4}", 0.7, stdnum_check("in_.aadhaar"), AADHAAR_WORDS),
    _number_rule("IN_AADHAAR", r"[2-9]\d{11}", 0.3, stdnum_check("in_.aadhaar"), AADHAAR_WORDS),
    _number_rule("BR_CPF", r"\d{3}\.\d{3}\.\d{3}-\d{2}", 0.9, stdnum_check("br.cpf")),
    _number_rule("BR_CPF", r"\d{11}", 0.4, stdnum_check("br.cpf"), "cpf"),
]

MBI = "[AC-HJKMNP-RT-Y]"
PLANS_AND_DEVICES = [
    privacy_rule(
        "HEALTH_PLAN",
        rf"(?<![\w-])([1-9]{MBI}[AC-HJKMNP-RT-Y\d]\d-?{MBI}[AC-HJKMNP-RT-Y\d]\d-?{MBI}{{2}}\d{{2}})(?![\w-])",
        0.75,
        needs="digit",
    ),
    _number_rule("DEVICE", r"\d{2}-\d{6}-\d{6}-\d|\d{15}", 0.4, has_luhn_digit, "imei|device|handset|phone serial"),
]

TOKEN = r"[A-Za-z0-9_-]"
ISSUED_TOKENS = {  # prefixes of the tokens that issuers document -> the shape of the whole
    "akia|asia|abia|acca": r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}",
    "ghp_|gho_|ghu_|ghs_|ghr_|github_pat_": r"gh[pousr]_[A-Za-z0-9]{36,251}|github_pat_\w{60,90}",
    "glpat-": rf"glpat-{TOKEN}{{20,64}}",
    "xox|xapp-|sk-": rf"(?<!-)(?:xox[abeoprs]-[\w-]{{10,250}}|xapp-[\w-]{{20,250}}|sk-{TOKEN}{{20,200}})",
    "k_live_|k_test_": r"[sr]k_(?:live|test)_\w{16,200}",
    "aiza|ya29.": rf"AIza{TOKEN}{{35}}|ya29\.{TOKEN}{{20,200}}",
    "hf_|npm_|sg.": rf"hf_[A-Za-z]{{30,40}}|npm_[A-Za-z0-9]{{36}}|SG\.{TOKEN}{{16,32}}\.{TOKEN}{{32,64}}",
}
PRIVATE_KEY = (
    r"(-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----[\s\S]{0,20000}?"
    r"(?:-----END (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----|\Z))"
)
PASSWORD = (
    r"(?i)(?<![\w])(?:password|passwd|passphrase|passwort|mot de passe|contraseña|pwd|api[_ -]?key|secret[_ -]?key|"
    r"client[_ -]?secret|access[_ -]?token|auth[_ -]?token|bearer)[\"']?(?: is|:| =|=| :)? ?[\"'“]?"
    r"((?=[^\s\"'”]*[\d!#$%&*?@^])(?![$<{\[(])[^\s\"'”,;()<>{}\[\]]{6,200})(?<![.!?])"
)
SECRETS = [
    privacy_rule("SECRET", PRIVATE_KEY, 0.99, required_texts="-----begin "),
    *(
        privacy_rule("SECRET", rf"(?<!\w)({shape})(?!\w)", 0.95, required_texts=prefixes)
        for prefixes, shape in ISSUED_TOKENS.items()
    ),
    privacy_rule(
        "SECRET",
        rf"(?<![\w.])(eyJ{TOKEN}{{8,4000}}\.eyJ{TOKEN}{{8,8000}}\.{TOKEN}{{0,2000}})",
        0.95,
        required_texts="eyj",
    ),
    privacy_rule("SECRET", r"(?i)://[^\s:/@]{1,64}:([^\s:/@]{3,128})@", 0.9, required_texts="://", needs="at"),
    privacy_rule("SECRET", PASSWORD, 0.8, required_texts="pass|pwd|key|secret|token|bearer|contrase"),
]

RULES: tuple[PrivacyRule, ...] = (*NETWORK, *MONEY, *NATIONAL, *PLANS_AND_DEVICES, *SECRETS)
