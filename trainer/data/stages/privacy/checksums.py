"""Check digits of identity, card and account numbers. Each function takes the text as found and says whether it holds.

Separators (spaces, dots, hyphens, slashes) are ignored. A false answer means the number cannot have been issued.
"""

from __future__ import annotations

from collections import Counter

VERHOEFF_PERMUTATION = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)
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
    key: int(length)
    for length, keys in {
        "15": "NO",
        "16": "BE",
        "18": "DK FO FI GL NL SD FK",
        "19": "MK SI",
        "20": "AT BA EE KZ LT LU XK MN",
        "21": "CH HR LI LV",
        "22": "BG BH CR DE GB GE IE ME RS VA",
        "23": "AE GI IL IQ OM SO TL",
        "24": "AD CZ ES MD PK RO SA SE SK TN VG",
        "25": "LY PT ST",
        "26": "IS TR",
        "27": "BI DJ FR GR IT MC MR SM",
        "28": "AL AZ BY CY DO GT HU LB NI PL SV",
        "29": "BR EG PS QA UA",
        "30": "JO KW MU YE",
        "31": "MT SC",
        "32": "LC",
        "33": "RU",
    }.items()
    for key in keys.split()
}
"""Length of an IBAN by country (ISO 13616 registry)."""
FISCAL_ODD = dict(
    zip(
        "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        (1, 0, 5, 7, 9, 13, 15, 17, 19, 21) * 2 + (2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23),
        strict=True,
    )
)
"""Values of characters in odd places of a codice fiscale (decree of 23 December 1976)."""
VIN_VALUES = dict(
    zip("ABCDEFGHJKLMNPRSTUVWXYZ", (1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 7, 9, 2, 3, 4, 5, 6, 7, 8, 9), strict=True)
)
VIN_WEIGHTS = (8, 7, 6, 5, 4, 3, 2, 10, 0, 9, 8, 7, 6, 5, 4, 3, 2)


def digits_of(text: str) -> list[int]:
    """The decimal digits of a text, in order."""
    return [int(character) for character in text if character.isdecimal()]


def compact(text: str) -> str:
    """The letters and digits of a text, in capitals."""
    return "".join(character for character in text if character.isalnum()).upper()


def luhn(text: str) -> bool:
    """The check digit of ISO/IEC 7812-1 annex B; texts of one repeated digit are refused."""
    digits = digits_of(text)
    doubled = (d if i % 2 == 0 else (2 * d - 9 if d > 4 else 2 * d) for i, d in enumerate(reversed(digits)))
    return len(set(digits)) > 1 and sum(doubled) % 10 == 0


def card(text: str) -> bool:
    """A payment card number: a known first range, a length issued there, and the Luhn digit."""
    number = "".join(map(str, digits_of(text)))
    return any(
        low <= number[: len(low)] <= high and len(number) in lengths for low, high, lengths in CARD_LENGTHS
    ) and luhn(number)


def iban(text: str) -> bool:
    """ISO 13616: a known country, its length, and remainder 1 modulo 97 (ISO/IEC 7064)."""
    value = compact(text)
    if not value.isascii() or IBAN_LENGTHS.get(value[:2]) != len(value):
        return False
    return int("".join(str(int(c, 36)) for c in value[4:] + value[:4])) % 97 == 1


def mod11(digits: list[int], weights: tuple[int, ...]) -> int:
    """Weighted sum modulo 11; shorter of the two decides how many digits count."""
    return sum(d * w for d, w in zip(digits, weights, strict=False)) % 11


def nhs(text: str) -> bool:
    """UK NHS number: ten digits, weights 10 to 2, check digit 11 - remainder (11 is 0, 10 is never issued)."""
    digits = digits_of(text)
    if len(digits) != 10 or len(set(digits)) == 1:
        return False
    return (11 - mod11(digits[:9], (10, 9, 8, 7, 6, 5, 4, 3, 2))) % 11 == digits[9]


def nino(text: str) -> bool:
    """UK national insurance number: the prefix is one that is allocated."""
    return compact(text)[:2] not in {"BG", "GB", "NK", "KN", "TN", "NT", "ZZ"}


def ssn(text: str) -> bool:
    """US social security number: area, group and serial that can be issued; advertised samples are refused."""
    number = "".join(map(str, digits_of(text)))
    area, group, serial = number[:3], number[3:5], number[5:]
    known_samples = {"078051120", "219099999", "457555462"}
    return (
        area not in {"000", "666"}
        and area < "900"
        and group != "00"
        and serial != "0000"
        and number not in known_samples
    )


def itin(text: str) -> bool:
    """US ITIN: starts with 9, group 50-65, 70-88, 90-92 or 94-99."""
    number = "".join(map(str, digits_of(text)))
    group = int(number[3:5])
    return number[0] == "9" and (50 <= group <= 65 or 70 <= group <= 88 or 90 <= group <= 92 or 94 <= group <= 99)


def tax_id_de(text: str) -> bool:
    """German tax number: of the first ten digits one is there two or three times, and ISO/IEC 7064 mod 11,10 holds."""
    digits = digits_of(text)
    if len(digits) != 11 or digits[0] == 0:
        return False
    repeated = [count for count in Counter(digits[:10]).values() if count > 1]
    if len(repeated) != 1 or repeated[0] > 3:
        return False
    product = 10
    for digit in digits[:10]:
        product = ((digit + product) % 10 or 10) * 2 % 11
    return (11 - product) % 10 == digits[10]


def nir(text: str) -> bool:
    """French NIR with its key: 97 - number mod 97; Corsica's 2A and 2B count as 19 and 18."""
    value = compact(text)
    value = value[:5] + {"2A": "19", "2B": "18"}.get(value[5:7], value[5:7]) + value[7:]
    return len(value) == 15 and value.isdecimal() and int(value[13:]) == 97 - int(value[:13]) % 97


def nif_es(text: str) -> bool:
    """Spanish DNI or NIE: the letter is that of the number modulo 23; X, Y, Z stand for 0, 1, 2."""
    value = compact(text)
    number = str("XYZ".index(value[0])) + value[1:-1] if value[0] in "XYZ" else value[:-1]
    return number.isdecimal() and "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23] == value[-1]


def fiscal_code(text: str) -> bool:
    """Italian codice fiscale: the last of its 16 characters is the check letter."""
    value = compact(text)
    if len(value) != 16 or not value.isascii():
        return False
    even = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    worth = [
        FISCAL_ODD[c] if i % 2 == 0 else (int(c) if c.isdecimal() else even.index(c) - 10)
        for i, c in enumerate(value[:15])
    ]
    return chr(ord("A") + sum(worth) % 26) == value[15]


def bsn(text: str) -> bool:
    """Dutch BSN: nine digits, weights 9 to 2 and -1, divisible by 11."""
    digits = digits_of(text)
    return len(digits) == 9 and len(set(digits)) > 1 and mod11(digits, (9, 8, 7, 6, 5, 4, 3, 2, -1)) == 0


def pesel(text: str) -> bool:
    """Polish PESEL: month and day exist (the month also carries the century), weights 1 3 7 9, sum modulo 10 is 0."""
    digits = digits_of(text)
    if len(digits) != 11:
        return False
    month, day = (digits[2] * 10 + digits[3]) % 20, digits[4] * 10 + digits[5]
    weights = (1, 3, 7, 9, 1, 3, 7, 9, 1, 3, 1)
    return 1 <= month <= 12 and 1 <= day <= 31 and sum(d * w for d, w in zip(digits, weights, strict=True)) % 10 == 0


def verhoeff(text: str) -> bool:
    """Verhoeff's check digit (dihedral group of ten), as Aadhaar uses it; a palindrome is never issued."""
    digits = digits_of(text)
    check = 0
    for place, digit in enumerate(reversed(digits)):
        for _ in range(place % 8):
            digit = VERHOEFF_PERMUTATION[digit]
        check = _dihedral(check, digit)
    return check == 0 and digits != digits[::-1]


def _dihedral(a: int, b: int) -> int:
    """Product of two elements of the dihedral group of order ten: 0 to 4 are turns, 5 to 9 reflections."""
    if a < 5:
        return (a + b) % 5 if b < 5 else 5 + (a + b) % 5
    return 5 + (a - b) % 5 if b < 5 else (a - b) % 5


def cpf(text: str) -> bool:
    """Brazilian CPF: two check digits modulo 11."""
    digits = digits_of(text)
    if len(digits) != 11 or len(set(digits)) == 1:
        return False
    first = mod11(digits[:9], (1, 2, 3, 4, 5, 6, 7, 8, 9)) % 10
    second = mod11([*digits[:9], first], (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)) % 10
    return digits[9:] == [first, second]


def vin(text: str) -> bool:
    """Vehicle identification number with the check digit of 49 CFR 565 (ninth place)."""
    value = compact(text)
    if len(value) != 17 or len(set(value)) < 5 or any(not (c.isdecimal() or c in VIN_VALUES) for c in value):
        return False
    total = sum(w * (int(c) if c.isdecimal() else VIN_VALUES[c]) for c, w in zip(value, VIN_WEIGHTS, strict=True))
    return value[8] == "0123456789X"[total % 11]


def npi(text: str) -> bool:
    """US National Provider Identifier: Luhn over 80840 and its ten digits."""
    return luhn("80840" + "".join(map(str, digits_of(text))))
