"""Settings of the search for personal data: types, sets of types that laws ask for, and what makes settings usable."""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import Any

from trainer.data.config import PrivacyConfig, PrivacyEngine, PrivacyMode, PrivacyPreset

TYPES: dict[str, str] = {
    "SECRET": "passwords, API keys, tokens, private keys",
    "US_SSN": "US social security number",
    "US_ITIN": "US individual taxpayer number",
    "UK_NHS": "UK National Health Service number",
    "UK_NINO": "UK national insurance number",
    "DE_TAX_ID": "German tax identification number",
    "FR_NIR": "French social security number",
    "ES_NIF": "Spanish DNI or NIE",
    "IT_FISCAL_CODE": "Italian codice fiscale",
    "NL_BSN": "Dutch burgerservicenummer",
    "PL_PESEL": "Polish PESEL",
    "IN_AADHAAR": "Indian Aadhaar number",
    "BR_CPF": "Brazilian CPF",
    "CREDIT_CARD": "payment card number",
    "IBAN": "international bank account number",
    "MEDICAL_RECORD": "medical record or patient number",
    "HEALTH_PLAN": "health plan, policy or member number",
    "ACCOUNT": "account, routing or customer number",
    "LICENSE": "driving licence, passport, certificate or practice number",
    "VEHICLE": "vehicle identification number or number plate",
    "DEVICE": "device serial number or IMEI",
    "FAX": "fax number",
    "PHONE": "telephone number",
    "EMAIL": "e-mail address",
    "URL": "web address",
    "IP": "IP address, version 4 or 6",
    "MAC": "network hardware address",
    "DATE_OF_BIRTH": "date of birth",
    "AGE": "age over 89",
    "DATE": "date more precise than a year",
    "ADDRESS": "street or postal address (found by no engine)",
    "POSTCODE": "postcode or ZIP code",
    "USERNAME": "user name or social media handle",
    "PERSON": "name of a person (engine=presidio)",
    "LOCATION": "name of a place (engine=presidio)",
    "ORGANISATION": "name of an organisation (engine=presidio)",
}
"""Type -> what it is. The order breaks ties: of two findings over the same characters with the same score, the earlier wins."""

NEEDS_PRESIDIO = frozenset({"PERSON", "LOCATION", "ORGANISATION"})
"""Types that only a language model finds."""
FOUND_BY_NONE = frozenset({"ADDRESS"})
"""Types that laws name and nothing here finds whole; what is asked for under them is reported as not looked for."""

NATIONAL_IDS: dict[str, str] = {
    "US_SSN": "US",
    "US_ITIN": "US",
    "UK_NHS": "GB",
    "UK_NINO": "GB",
    "DE_TAX_ID": "DE",
    "FR_NIR": "FR",
    "ES_NIF": "ES",
    "IT_FISCAL_CODE": "IT",
    "NL_BSN": "NL",
    "PL_PESEL": "PL",
    "IN_AADHAAR": "IN",
    "BR_CPF": "BR",
}
"""Identity numbers and their country."""


NOT_ASKED = "not asked for"
KEY_CHARACTERS = 16
"""Least length of a pseudonym key: short keys can be tried out, and then every pseudonym can be undone."""


GENERAL = frozenset(
    {"PERSON", "EMAIL", "PHONE", "FAX", "ADDRESS", "CREDIT_CARD", "IBAN", "ACCOUNT", "IP", "MAC", "DATE_OF_BIRTH"}
    | {"MEDICAL_RECORD", "HEALTH_PLAN", "LICENSE", "USERNAME", "SECRET", *NATIONAL_IDS}
)
"""What points at one person, and secrets; neither dates nor web addresses, of which ordinary texts are full."""

GDPR = GENERAL | {"VEHICLE", "DEVICE", "POSTCODE", "LOCATION"}
"""Art. 4(1): names, identification numbers, location data, online identifiers."""

HIPAA = frozenset(TYPES) - {"ORGANISATION"}
"""45 CFR 164.514(b)(2)(i): the textual ones of its eighteen identifiers; national numbers fall under (R), any other."""


def types_of(preset: PrivacyPreset) -> frozenset[str]:
    """The types of a preset."""
    sets = {PrivacyPreset.general: GENERAL, PrivacyPreset.gdpr: GDPR, PrivacyPreset.hipaa: HIPAA}
    return sets.get(preset, frozenset())


def coverage(config: PrivacyConfig) -> dict[str, Any]:
    """For the audit: `looked_for`, a list of types, and `not_looked_for`, every other known type with the reason."""
    wanted = frozenset() if config.mode == PrivacyMode.none else frozenset(config.types) or types_of(config.preset)
    looked_for, left_out = list[str](), dict[str, str]()
    for name in TYPES:
        region = NATIONAL_IDS.get(name)
        if name not in wanted:
            left_out[name] = NOT_ASKED
        elif name in FOUND_BY_NONE:
            left_out[name] = "found by no engine"
        elif name in NEEDS_PRESIDIO and config.engine == PrivacyEngine.patterns:
            left_out[name] = "needs data.privacy.engine=presidio"
        elif region is not None and region not in config.regions:
            left_out[name] = f"needs {region} in data.privacy.regions"
        else:
            looked_for.append(name)
    return {"looked_for": looked_for, "not_looked_for": left_out}


def key_identity(config: PrivacyConfig) -> str:
    """What tells one secret key of pseudonyms from another without giving it away."""
    return hmac.new(os.environ.get(config.key_env, "").encode(), b"identity of the key", hashlib.sha256).hexdigest()
