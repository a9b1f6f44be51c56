"""The types of personal data that are known, and the sets of them that laws and habits ask for.

The order of `TYPES` breaks ties: of two findings over the same characters with the same score, the earlier type wins.
"""

from __future__ import annotations

from enum import StrEnum

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
    "ADDRESS": "street or postal address",
    "POSTCODE": "postcode or ZIP code",
    "USERNAME": "user name or social media handle",
    "PERSON": "name of a person",
    "LOCATION": "name of a place (engine=presidio)",
    "ORGANISATION": "name of an organisation (engine=presidio)",
}
"""Type -> what it is."""

NER_ONLY = frozenset({"LOCATION", "ORGANISATION"})
"""Types that no pattern finds."""

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


class PrivacyPreset(StrEnum):
    """A named set of types."""

    none = "none"
    general = "general"
    hipaa = "hipaa"
    gdpr = "gdpr"


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
