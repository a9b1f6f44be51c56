"""The verdict on a data set: a few tiles, each good, worth a look or calling for action, by fixed rules.

The rules are thresholds on what preparation counted. They point a reader to what to look at first; they are no gate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from trainer.data.report.schema import (
    count,
    duplicate_documents,
    handled,
    leaked_documents,
    mapping,
    number,
    privacy,
    quarantined,
    rows_in,
    share,
)
from trainer.data.report.svg import percent, plural

PRIVACY_TAKES_OUT = frozenset({"redact", "pseudonymise", "drop"})
GRAVE = re.compile(
    "SECRET|PASSWORD|KEY|SSN|ITIN|NHS|NINO|TAX|NIR|NIF|FISCAL|BSN|PESEL|AADHAAR|CPF|CREDIT_CARD|IBAN|MEDICAL|HEALTH",
    re.IGNORECASE,
)
"""Parts of the names of types whose leaking does direct harm: left in the data, they call for action."""


class Level(StrEnum):
    """How a tile is to be taken."""

    good = "good"
    look = "look"
    act = "act"
    none = "none"


NOTHING = "\N{EN DASH}"
"""Value of a tile that was not measured."""
SIGNS = {
    Level.good: ("✓", "good"),
    Level.look: ("!", "worth a look"),
    Level.act: ("✕", "act"),
    Level.none: (NOTHING, ""),
}


@dataclass(slots=True)
class Tile:
    """One finding in a few words; `anchor` is the section that has more."""

    what: str
    value: str
    note: str
    level: Level
    anchor: str


def tiles(audit: Mapping[str, Any]) -> list[Tile]:
    """The tiles of an audit, in reading order; what was not measured says so."""
    return [_kept(audit), _supervised(audit), _duplicates(audit), _leakage(audit), _privacy(audit), _quarantine(audit)]


def overall(found: list[Tile]) -> tuple[Level, str]:
    """The level of the whole and a sentence on it."""
    for level, words in ((Level.act, "calls for action"), (Level.look, "worth a look")):
        names = [tile.what.lower() for tile in found if tile.level is level]
        if names:
            return level, f"{words[0].upper()}{words[1:]}: {', '.join(names)}"
    if all(tile.level is Level.none for tile in found):
        return Level.none, "Nothing was measured"
    return Level.good, "Nothing stands out"


def _kept(audit: Mapping[str, Any]) -> Tile:
    rows, conserved = rows_in(audit), mapping(audit.get("conserved"))
    flow = audit.get("flow")
    last = mapping(flow[-1]).get("out") if isinstance(flow, list) and flow else None
    kept = count(conserved.get("kept", last))
    if not rows:
        return Tile("Rows kept", NOTHING, "no rows were read", Level.none, "flow")
    part = share(kept, rows)
    note = f"{kept:,} of {plural(rows, 'row')}"
    if conserved and kept + count(conserved.get("dropped")) != rows:
        return Tile("Rows kept", percent(part), f"{note}; kept and dropped do not add up", Level.act, "flow")
    level = Level.good if part >= 0.9 else Level.look if part >= 0.5 else Level.act
    return Tile("Rows kept", percent(part), note, level, "flow")


def _supervised(audit: Mapping[str, Any]) -> Tile:
    train = mapping(mapping(audit.get("splits")).get("train"))
    if train.get("labelled"):
        return Tile("Learned", plural(count(train.get("documents")), "label"), "one a document", Level.good, "splits")
    if "supervised_share" not in train:
        return Tile("Learned tokens", NOTHING, "not measured", Level.none, "splits")
    part = number(train["supervised_share"])
    level = Level.good if part >= 0.05 else Level.look if part > 0 else Level.act
    if train.get("doubled_bos"):
        return Tile(
            "Learned tokens", percent(part), "documents begin with two BOS: check the template", Level.act, "splits"
        )
    return Tile(
        "Learned tokens", percent(part), f"of {plural(count(train.get('tokens')), 'train token')}", level, "splits"
    )


def _duplicates(audit: Mapping[str, Any]) -> Tile:
    if "duplicates" not in audit:
        return Tile("Duplicates", NOTHING, "not looked for", Level.none, "duplicates")
    found, rows = duplicate_documents(audit), rows_in(audit)
    kinds = [mapping(kind) for kind in mapping(audit["duplicates"]).values() if count(mapping(kind).get("documents"))]
    if not found:
        return Tile("Duplicates", "0", "none found", Level.good, "duplicates")
    if handled([kind.get("policy") for kind in kinds]):
        return Tile("Duplicates", f"{found:,}", "found and taken out", Level.good, "duplicates")
    part = share(found, rows)
    level = Level.good if part <= 0.01 else Level.look if part <= 0.1 else Level.act
    return Tile("Duplicates", f"{found:,}", f"still in the data, {percent(part)} of rows", level, "duplicates")


def _leakage(audit: Mapping[str, Any]) -> Tile:
    if "leakage" not in audit:
        return Tile("Leakage", NOTHING, "not looked for", Level.none, "leakage")
    found = leaked_documents(audit)
    if not found:
        return Tile("Leakage", "0", "no held-out document in train", Level.good, "leakage")
    policies = [mapping(split).get("policy") for split in mapping(audit["leakage"]).values()]
    if handled(policies):
        return Tile("Leakage", f"{found:,}", "found and taken out", Level.good, "leakage")
    return Tile("Leakage", f"{found:,}", "documents of held-out splits in train", Level.act, "leakage")


def _privacy(audit: Mapping[str, Any]) -> Tile:
    found = privacy(audit)
    mode, scanned = str(found.get("mode", "none")), count(found.get("scanned"))
    if not found or mode == "none" or not scanned:
        return Tile("Personal data", NOTHING, "not scanned", Level.none, "privacy")
    documents = count(found.get("documents"))
    where = f"in {plural(scanned, 'document')} scanned"
    if not documents:
        return Tile("Personal data", "0", f"none found {where}", Level.good, "privacy")
    if mode in PRIVACY_TAKES_OUT:
        done = {"redact": "redacted", "pseudonymise": "pseudonymised", "drop": "dropped"}[mode]
        return Tile("Personal data", f"{documents:,}", f"documents with findings, {done}", Level.good, "privacy")
    grave = sorted(name for name in mapping(found.get("types")) if GRAVE.search(str(name)))
    if grave:
        return Tile("Personal data", f"{documents:,}", f"left in, with {', '.join(grave[:3])}", Level.act, "privacy")
    return Tile("Personal data", f"{documents:,}", f"documents with findings {where}", Level.look, "privacy")


def _quarantine(audit: Mapping[str, Any]) -> Tile:
    bad = quarantined(audit)
    if bad is None:
        return Tile("Quarantine", NOTHING, "not counted", Level.none, "flow")
    if not bad:
        return Tile("Quarantine", "0", "every row could be used", Level.good, "flow")
    part = share(bad, rows_in(audit))
    level = Level.look if part <= 0.01 else Level.act
    return Tile("Quarantine", f"{bad:,}", f"{percent(part)} of rows, in quarantine.jsonl", level, "flow")
