"""Check digits of identity, card and account numbers. Each function takes the text as found and says whether it holds.

python-stdnum knows most; here are separators it does not bear, and numbers that it does not know. A false answer means
that the number cannot have been issued.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from stdnum import iban as _iban
from stdnum import luhn as _luhn
from stdnum import numdb
from stdnum.br import cpf as _cpf
from stdnum.de import idnr
from stdnum.es import dni, nie
from stdnum.fr import nir as _nir
from stdnum.gb import nhs as _nhs
from stdnum.in_ import aadhaar as _aadhaar
from stdnum.it import codicefiscale
from stdnum.nl import bsn as _bsn
from stdnum.pl import pesel as _pesel
from stdnum.us import ssn as _ssn

CARD_LENGTHS: tuple[tuple[str, str, frozenset[int]], ...] = (
    ("34", "34", frozenset({15})),
    ("37", "37", frozenset({15})),
    ("300", "305", frozenset({14})),
    ("36", "36", frozenset({14})),
    ("38", "39", frozenset({14})),
    ("3528", "3589", frozenset({16})),
    ("4", "4", frozenset({13, 16, 19})),
    ("50", "50", frozenset({16})),
    ("51", "55", frozenset({16})),
    ("2221", "2720", frozenset({16})),
    ("56", "59", frozenset({12, 13, 14, 15, 16, 17, 18, 19})),
    ("60", "60", frozenset({16, 19})),
    ("62", "62", frozenset({16, 17, 18, 19})),
    ("63", "65", frozenset({16, 19})),
)
"""First digits (from, to) of card numbers and the lengths issued (ISO/IEC 7812 ranges of the large networks)."""
IBAN_LENGTHS: dict[str, int] = {
    country: 4 + sum(map(int, re.findall(r"(\d+)!", about["bban"])))
    for _, country, _, about, _ in numdb.get("iban").prefixes
    if "bban" in about
}
"""Length of an IBAN by country (ISO 13616 registry, as stdnum has it)."""
VIN_VALUES = dict(
    zip("ABCDEFGHJKLMNPRSTUVWXYZ", (1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 7, 9, 2, 3, 4, 5, 6, 7, 8, 9), strict=True)
)
VIN_WEIGHTS = (8, 7, 6, 5, 4, 3, 2, 10, 0, 9, 8, 7, 6, 5, 4, 3, 2)


def compact(text: str) -> str:
    """The letters and digits of a text, in capitals."""
    return "".join(character for character in text if character.isalnum()).upper()


def _checked(is_valid: Callable[[str], bool]) -> Callable[[str], bool]:
    """A check of stdnum for numbers written with any separators; one repeated digit is nobody's number."""

    def holds(text: str) -> bool:
        number = compact(text)
        return number.isascii() and len(set(number)) > 1 and is_valid(number)

    return holds


luhn = _checked(_luhn.is_valid)
iban = _checked(lambda number: _iban.is_valid(number, check_country=False))
nhs = _checked(_nhs.is_valid)
ssn = _checked(_ssn.is_valid)
tax_id_de = _checked(idnr.is_valid)
nir = _checked(_nir.is_valid)
nif_es = _checked(lambda number: nie.is_valid(number) or dni.is_valid(number.rjust(9, "0")))
fiscal_code = _checked(codicefiscale.is_valid)
bsn = _checked(_bsn.is_valid)
pesel = _checked(_pesel.is_valid)
aadhaar = _checked(_aadhaar.is_valid)
cpf = _checked(_cpf.is_valid)


def card(text: str) -> bool:
    """A payment card number: a known first range, a length issued there, and the Luhn digit."""
    number = compact(text)
    return any(
        low <= number[: len(low)] <= high and len(number) in lengths for low, high, lengths in CARD_LENGTHS
    ) and luhn(number)


def nino(text: str) -> bool:
    """UK national insurance number: the prefix is one that is allocated."""
    return compact(text)[:2] not in {"BG", "GB", "NK", "KN", "TN", "NT", "ZZ"}


def itin(text: str) -> bool:
    """US ITIN: starts with 9, group 50-65, 70-88, 90-92 or 94-99; stdnum knows the groups before 2011 only."""
    number = compact(text)
    group = int(number[3:5])
    return number[0] == "9" and (50 <= group <= 65 or 70 <= group <= 88 or 90 <= group <= 92 or 94 <= group <= 99)


def vin(text: str) -> bool:
    """Vehicle identification number with the check digit of 49 CFR 565 (ninth place)."""
    value = compact(text)
    if len(value) != 17 or len(set(value)) < 5 or any(not (c.isdecimal() or c in VIN_VALUES) for c in value):
        return False
    total = sum(w * (int(c) if c.isdecimal() else VIN_VALUES[c]) for c, w in zip(value, VIN_WEIGHTS, strict=True))
    return value[8] == "0123456789X"[total % 11]


def npi(text: str) -> bool:
    """US National Provider Identifier: Luhn over 80840 and its ten digits."""
    return luhn("80840" + compact(text))
