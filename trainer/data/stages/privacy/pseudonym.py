"""Pseudonyms and masks: what is written in place of a value, and what may be shown of it."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import unicodedata
from collections.abc import Sequence

from trainer.data.stages.privacy.checksums import compact
from trainer.data.stages.privacy.phones import canonical

HEX_DIGITS = 8
"""Length of a pseudonym's tail: 32 bits; of 9,000 different values two share one with a probability of about 1 %."""
SAME = {"FAX": "PHONE", "DATE_OF_BIRTH": "DATE"}
"""Types whose values are normalised alike, so that a number has one tail under both names."""
LONGEST_MASK = 32
SHOW_FIRST = frozenset({"EMAIL", "PERSON", "USERNAME", "LOCATION", "ORGANISATION"})


def normalise(type_: str, value: str, regions: Sequence[str]) -> str:
    """One spelling for all spellings of a value: case, spaces, separators and national telephone formats vanish."""
    text = " ".join(unicodedata.normalize("NFKC", value).split())
    kind = SAME.get(type_, type_)
    if kind == "PHONE":
        return canonical(text, regions)
    if kind == "IP":
        try:
            return str(ipaddress.ip_address(text))
        except ValueError:
            return text.casefold()
    if kind in {"EMAIL", "URL", "PERSON", "LOCATION", "ORGANISATION"}:
        return text.casefold()
    if kind == "SECRET":
        return text
    if kind == "USERNAME":
        return text.removeprefix("@").casefold()
    return compact(text)


def pseudonym(type_: str, value: str, key: bytes, regions: Sequence[str]) -> str:
    """`[PERSON_3fa9c01b]`: HMAC-SHA256 of the normalised value under a secret key, the same in every run with that key."""
    message = f"{SAME.get(type_, type_)}\0{normalise(type_, value, regions)}".encode()
    return f"[{type_}_{hmac.new(key, message, hashlib.sha256).hexdigest()[:HEX_DIGITS]}]"


def mask(type_: str, value: str) -> str:
    """What a report may show: `j***@e***.com`. The shape of numbers, first letters of names, no more than that.

    No four letters or digits in a row of the value are ever shown, and of secrets nothing.
    """
    if type_ == "SECRET":
        return "***"
    value = " ".join(value.split())
    if type_ in SHOW_FIRST:
        local, at, domain = value.rpartition("@")
        if type_ == "EMAIL" and at:
            host, _, top = domain.rpartition(".")
            return f"{local[:1]}***@{host[:1]}***.{top if len(top) <= 3 else '***'}"
        return " ".join(f"{word[:1]}***" for word in value.split()[:4])
    shape = "".join("*" if c.isalnum() else c for c in value)
    return shape if len(shape) <= LONGEST_MASK else shape[:LONGEST_MASK] + "..."
