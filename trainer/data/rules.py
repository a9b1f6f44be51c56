"""What of data's settings contradicts itself or cannot be used: one line a problem, with key, value, constraint and remedy.

Ranges of single numbers are `trainer/config/ranges.py`'s, what files there are is said where they are opened.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec

from trainer.data.config import (
    HELD_OUT,
    REGIONS,
    BalanceConfig,
    BalanceTarget,
    DataConfig,
    FilterConfig,
    Layout,
    PrivacyConfig,
    PrivacyMode,
    PrivacyPreset,
)
from trainer.data.stages.checks import KINDS
from trainer.data.stages.filters import LANGUAGES
from trainer.data.stages.privacy.config import KEY_CHARACTERS, NOT_ASKED, TYPES, coverage


def problems(data: DataConfig) -> Iterator[str]:
    """Everything that is wrong with the settings of data, whatever else is set."""
    if data.path in (None, "") and not data.sources:
        yield (
            "data.path: not set; name the training data: a file, a directory, a glob, or hub:<name>; or several under "
            "data.sources"
        )
    if data.path not in (None, "") and data.sources:
        yield f"data.path={data.path}: data.sources names the training data too; keep one of the two"
    for name, source in data.sources.items():
        if source.path in (None, ""):
            yield f"data.sources.{name}.path: not set; give the source's files"
    for split in HELD_OUT:
        share = getattr(data, f"{split}_share")
        if getattr(data, f"{split}_path") is not None and share:
            yield f"data.{split}_share={share:g}: data.{split}_path gives that split already; set one of the two"
    if data.group_by is not None and not any((data.eval_share, data.test_share, data.eval_path, data.test_path)):
        yield f"data.group_by={data.group_by}: nothing is held out; give data.eval_share=0.05 as well, or set it to null"
    weighted = [name for name, source in data.sources.items() if source.weight is not None]
    if weighted and len(weighted) < len(data.sources):
        without = ", ".join(sorted(data.sources.keys() - set(weighted)))
        yield f"data.sources: {without} has no weight, and others have; give every source one, or none"
    known = ", ".join(KINDS)
    for kind in data.checks.quarantine:
        if kind not in KINDS:
            yield f"data.checks.quarantine: {kind!r} is not looked for; known are {known}"
    yield from filter_problems(data.filters)
    yield from balance_problems(data.balance)
    if data.packing and data.layout is Layout.padded:
        yield "data.packing=true: needs rows without padding; set data.layout=auto, or data.packing=false"
    yield from privacy_problems(data.privacy)


def filter_problems(config: FilterConfig) -> Iterator[str]:
    """Of the filters: bounds that cross, empty phrases, languages that the detector does not know."""
    low, high = config.min_characters, config.max_characters
    if high is not None and high < low:
        yield f"data.filters.max_characters={high} is below data.filters.min_characters={low}: every row would go"
    if any(not phrase.strip() for phrase in config.drop_phrases):
        yield "data.filters.drop_phrases has an empty phrase, which every text contains; remove it"
    if config.languages and find_spec("py3langid") is None:
        yield "data.filters.languages needs the package py3langid, which is not installed: pip install py3langid"
    for code in config.languages:
        if code not in LANGUAGES:
            near = difflib.get_close_matches(code.lower(), sorted(LANGUAGES), n=1, cutoff=0.5)
            near = [code[:2].lower()] if code[:2].lower() in LANGUAGES else near
            hint = f"; did you mean {near[0]}?" if near else ""
            yield f"data.filters.languages: {code!r} is not an ISO 639 code the detector knows{hint}"


def balance_problems(config: BalanceConfig) -> Iterator[str]:
    """Of the balance: shares without their target, or the other way round, and shares that are none."""
    if config.target is BalanceTarget.shares and not config.shares:
        yield "data.balance.target=shares: data.balance.shares is empty; name every group with its share"
    if config.target is not BalanceTarget.shares and config.shares:
        yield (
            f"data.balance.shares is set but data.balance.target={config.target}; set data.balance.target=shares to use it"
        )
    for name, share in config.shares.items():
        if not (math.isfinite(share) and share >= 0):
            yield f"data.balance.shares.{name}={share:g}: must be a finite number of at least 0"


def privacy_problems(config: PrivacyConfig, prefix: str = "data.privacy") -> Iterator[str]:
    """Of the search for personal data: what is not known, what nothing would look for, a key that is missing."""
    if config.mode == PrivacyMode.none:
        return
    reasons = coverage(config)["not_looked_for"]
    for name in config.types:
        if name not in TYPES:
            yield f"{prefix}.types: {name!r} is not a type; the types are {', '.join(TYPES)}"
        elif (why := reasons.get(name, NOT_ASKED)) != NOT_ASKED:
            remedies = {
                "needs data.privacy.engine=presidio": "set it (pip install 'shardtune[pii]'), or leave the type out",
                "found by no engine": f"leave it out; LOCATION finds places in addresses with {prefix}.engine=presidio",
            }
            yield f"{prefix}.types: {name} {why}; {remedies.get(why, 'add it, or leave the type out')}"
    if not config.types and config.preset == PrivacyPreset.none:
        yield f"{prefix}.preset=none with an empty {prefix}.types looks for nothing; name types, or set mode=none"
    if not set(config.regions) <= set(REGIONS):
        import phonenumbers

        for region in config.regions:
            if region not in phonenumbers.SUPPORTED_REGIONS:
                yield f"{prefix}.regions: {region!r} is not a two-letter ISO 3166 code in capitals, such as US, GB or DE"
    for pattern in config.allow:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"{prefix}.allow: {pattern!r} is not a regular expression ({error})"
    if config.mode == PrivacyMode.pseudonymise and len(os.environ.get(config.key_env, "")) < KEY_CHARACTERS:
        yield (
            f"{prefix}.mode=pseudonymise needs a secret key of at least {KEY_CHARACTERS} characters in the environment "
            f"variable {config.key_env} ({prefix}.key_env); make one with: openssl rand -hex 32"
        )
