"""Settings of the search for personal data, and what a usable set of them must satisfy."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from dataclasses import dataclass, field
from enum import StrEnum

from trainer.data.stages.privacy.presets import NER_ONLY, TYPES, PrivacyPreset, types_of

REGIONS = ("US", "GB", "DE", "FR", "ES", "IT", "NL", "PL", "IN", "BR")
"""Countries whose own identity numbers are known, ISO 3166-1 alpha-2. Telephone numbers: any country."""
KEY_CHARACTERS = 16
"""Least length of a pseudonym key: short keys can be tried out, and then every pseudonym can be undone."""


class PrivacyMode(StrEnum):
    """What is done about personal data that is found."""

    none = "none"
    report = "report"
    redact = "redact"
    pseudonymise = "pseudonymise"
    drop = "drop"
    fail = "fail"


class PrivacyEngine(StrEnum):
    """What looks for personal data: patterns with checks, or these and Presidio with its name recognition."""

    patterns = "patterns"
    presidio = "presidio"


@dataclass(kw_only=True, slots=True)
class PrivacyConfig:
    """Personal data in texts: what is looked for, and what is done about it. The default only reports."""

    mode: PrivacyMode = PrivacyMode.report
    """`none`; `report` counts; `redact` puts `[TYPE]`, `pseudonymise` keyed names; `drop` the document; or `fail`."""
    preset: PrivacyPreset = PrivacyPreset.general
    """Types looked for when `types` is empty: `general`, `hipaa` (Safe Harbor identifiers), `gdpr`, or `none`."""
    types: list[str] = field(default_factory=list)
    """Types looked for, such as EMAIL or PHONE; an empty list takes those of the preset."""
    engine: PrivacyEngine = PrivacyEngine.patterns
    """`patterns`, or `presidio` for person, place and organisation names in English (extra `pii`, about 20x slower)."""
    min_score: float = 0.5
    """Findings less certain than this are ignored, 0 to 1; 0.35 also takes numbers that only look right."""
    regions: list[str] = field(default_factory=lambda: list(REGIONS))
    """Countries whose telephone and identity numbers are looked for, as two-letter ISO 3166 codes."""
    scan_documents: int = 1000
    """With `mode=report`, documents scanned of each source, from its start; 0 scans all. Other modes scan all."""
    max_findings: int = 0
    """With `mode=fail`, findings that are still allowed, over all documents."""
    key_env: str = "SHARDTUNE_PSEUDONYM_KEY"
    """With `mode=pseudonymise`, the environment variable that holds the secret key (16 characters or more)."""
    allow: list[str] = field(default_factory=list)
    """Regular expressions; what one of them matches as a whole is never a finding, e.g. `support@example\\.com`."""


def active_types(config: PrivacyConfig) -> tuple[str, ...]:
    """Types looked for, in the fixed order of `TYPES`."""
    wanted = set(config.types) or types_of(config.preset)
    return tuple(name for name in TYPES if name in wanted)


def problems(config: PrivacyConfig, prefix: str = "data.privacy") -> list[str]:
    """What makes the settings unusable, one line each: key and value, the constraint, what to do."""
    if config.mode == PrivacyMode.none:
        return []
    out = [
        f"{prefix}.types: {name!r} is not a type; the types are {', '.join(TYPES)}"
        for name in config.types
        if name not in TYPES
    ]
    if not config.types and config.preset == PrivacyPreset.none:
        out.append(f"{prefix}.preset=none with an empty {prefix}.types looks for nothing; name types, or set mode=none")
    ner_only = sorted(set(config.types) & NER_ONLY)
    if config.engine == PrivacyEngine.patterns and ner_only:
        out.append(f"{prefix}.types: {', '.join(ner_only)} needs {prefix}.engine=presidio")
    if not 0 <= config.min_score <= 1:
        out.append(f"{prefix}.min_score={config.min_score}: must lie between 0 and 1; the default is 0.5")
    for name in ("scan_documents", "max_findings"):
        if getattr(config, name) < 0:
            out.append(f"{prefix}.{name}={getattr(config, name)}: must be 0 or more")
    out += _bad_regions(config, prefix)
    for pattern in config.allow:
        try:
            re.compile(pattern)
        except re.error as error:
            out.append(f"{prefix}.allow: {pattern!r} is not a regular expression ({error})")
    if config.mode == PrivacyMode.pseudonymise and len(os.environ.get(config.key_env, "")) < KEY_CHARACTERS:
        out.append(
            f"{prefix}.mode=pseudonymise needs a secret key of at least {KEY_CHARACTERS} characters in the environment "
            f"variable {config.key_env} ({prefix}.key_env); make one with: openssl rand -hex 32"
        )
    return out


def key_identity(config: PrivacyConfig) -> str | None:
    """What tells one secret key from another without giving it away; None where the mode uses none."""
    if config.mode != PrivacyMode.pseudonymise:
        return None
    return hmac.new(os.environ.get(config.key_env, "").encode(), b"identity of the key", hashlib.sha256).hexdigest()


def _bad_regions(config: PrivacyConfig, prefix: str) -> list[str]:
    if set(config.regions) <= set(REGIONS):
        return []
    import phonenumbers

    known = phonenumbers.SUPPORTED_REGIONS
    return [
        f"{prefix}.regions: {region!r} is not a two-letter ISO 3166 code in capitals, such as US, GB or DE"
        for region in config.regions
        if region not in known
    ]
