"""In which words the terminal, the page and the card tell what was counted: numbers, reasons, the verdict, the gaps.

The verdict's rules are thresholds on what preparation counted. They point a reader to what to look at first; they are no gate.
Text that comes from the data is made visible before it is shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from trainer.data.report.audit import Audit

if TYPE_CHECKING:
    from jinja2 import Environment

    from trainer.data.config import CardConfig


JOINERS = "\u200c\u200d"
"""Invisible, but part of how words (Persian, Hindi) and emoji are spelled."""


def visible(text: object) -> str:
    """`text` with control characters, direction overrides and lone surrogates spelled out as \\xNN."""
    return "".join(
        c if c.isprintable() or c == "\n" or c in JOINERS else (" " if c == "\t" else f"\\x{ord(c):02x}")
        for c in str(text)
    )


def plural(amount: int, word: str) -> str:
    """`1 row`, `2 rows`; with thousands separators."""
    return f"{amount:,} {word if amount == 1 else word + 's'}"


def percent(value: float) -> str:
    """A share as a percentage that never rounds something to nothing, nor a part to the whole."""
    if 0 < value < 0.0005:
        return "<0.1%"
    if 0.9995 <= value < 1:
        return ">99.9%"
    return f"{value:.0%}" if value in (0, 1) else f"{value:.1%}"


def reason_text(code: str) -> str:
    """A reason for dropping or noting a document, in words where the code alone would not tell."""
    return REASON_TEXTS.get(code, code.replace("_", " "))


REASON_TEXTS = {
    "truncated": "truncated to data.max_length",
    "split": "split into pieces of data.max_length",
    "too_long": "longer than data.max_length",
    "nothing_to_learn": "nothing left to learn",
    "same_answers": "both answers of a pair are the same",
    "thumbs_down": "an answer marked as undesirable",
    "control_tokens_in_text": "text spells control tokens of the tokenizer",
    "control_tokens_as_text": "of these in prompts and texts, encoded as ordinary characters",
    "missing_eos": "the last learned token closes no turn",
}


@cache
def templates(shown: Callable[[str], str], *, autoescape: bool) -> Environment:
    """Jinja for the templates of this package: every text of an expression goes through `shown`, but for Markup.

    One for each `shown`, since to compile the templates takes longer than to fill them.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def finalize(value: Any) -> Any:
        return shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,  # a name that is not in the audit is an error, never an empty place
        autoescape=autoescape,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"percent": percent, "reason": reason_text, "file_name": lambda path: PurePath(path).name}
    made.filters |= {"count": lambda value: f"{value:,.0f}", "number": lambda value: f"{value:,.4g}"}
    made.filters |= {"weight": lambda value: f"{value:,.10g}"}
    made.globals |= {"plural": plural}
    return made


STAGE_SETTINGS = {
    "checks": "data.checks.quarantine",
    "filters": "data.filters",
    "privacy": "data.privacy.mode",
    "decontamination": "data.decontamination.policy",
    "duplicates": "data.duplicates",
    "leakage": "data.leakage.policy",
    "balance": "data.balance",
}
"""The setting behind what a stage drops."""
UNREQUESTED_STAGES = frozenset({"read", "checks", "cleaning", "tokenise"})
"""Stages whose drops nobody asked for by a setting."""
NOT_MEASURED = "\N{EN DASH}"
"""Value of a tile that was not measured."""
KEEPING_POLICIES = frozenset({"report", "none"})
"""Policies that leave what was found where it is."""
HARMFUL_TYPES = re.compile(
    "SECRET|PASSWORD|KEY|SSN|ITIN|NHS|NINO|TAX|NIR|NIF|FISCAL|BSN|PESEL|AADHAAR|CPF|CREDIT_CARD|IBAN|MEDICAL|HEALTH"
)
"""Parts of the names of types whose leaking does direct harm: left in the data, they call for action."""


class Level(StrEnum):
    """How a finding is to be taken."""

    good = "good"
    look = "look"
    act = "act"
    none = "none"


@dataclass(slots=True)
class Tile:
    """One finding in a few words; `anchor` is the section that has more, `advice` what can be done about it."""

    what: str
    value: str
    note: str
    level: Level
    anchor: str
    advice: str = ""


def tiles(audit: Audit) -> list[Tile]:
    """The findings in reading order; what was not measured says so."""
    return [
        _rows_lost_tile(audit),
        _learned_tile(audit),
        _truncated_tile(audit),
        _leakage_tile(audit),
        _duplicates_tile(audit),
        _personal_data_tile(audit),
    ]


def overall_level(found: list[Tile]) -> tuple[Level, str]:
    """The level of the whole and a sentence on it."""
    for level, words in ((Level.act, "Calls for action"), (Level.look, "Worth a look")):
        names = [tile.what.lower() for tile in found if tile.level is level]
        if names:
            return level, f"{words}: {', '.join(names)}"
    return Level.good, "Nothing stands out"


def _level(share: float, look: float, act: float) -> Level:
    return Level.act if share > act else Level.look if share > look else Level.good


def _rows_lost_tile(audit: Audit) -> Tile:
    rows, dropped = audit.conserved["rows_in"], audit.conserved["dropped"]
    unasked = sum(sum(stage.dropped.values()) for stage in audit.flow if stage.stage in UNREQUESTED_STAGES)
    level = _level(unasked / max(rows, 1), 0.01, 0.1)
    if level is Level.good and audit.lost_share > 0.5:
        level = Level.look
    note, advice = f"{dropped:,} of {plural(rows, 'row')}", ""
    if dropped:
        # Where rows went that nobody asked to drop, these are what has to be looked at.
        stages = [stage for stage in audit.flow if stage.stage in UNREQUESTED_STAGES or not unasked]
        number, code, stage = max((n, code, stage.stage) for stage in stages for code, n in stage.dropped.items())
        note += f"; most: {reason_text(code) if stage in UNREQUESTED_STAGES else f'{stage}, {reason_text(code)}'} ({number:,})"
        advice = f"see the places below, and {STAGE_SETTINGS.get(stage, 'quarantine.jsonl and dropped.jsonl')}"
        if code == "too_long":
            advice = "raise data.max_length, or set data.over_length=truncate or split"
    return Tile("Rows lost", percent(audit.lost_share), note, level, "rows", advice)


def _learned_tile(audit: Audit) -> Tile:
    train = audit.splits["train"]
    if train.labelled:
        return Tile("Learned", plural(train.documents, "label"), "one a document", Level.good, "splits")
    share = percent(train.supervised_share)
    if train.doubled_bos:
        advice = "check model.chat_template"
        return Tile("Learned tokens", share, "documents begin with two BOS", Level.act, "splits", advice)
    level = Level.good if train.supervised_share >= 0.05 else Level.look if train.supervised_share else Level.act
    return Tile("Learned tokens", share, f"of {train.tokens:,} in training", level, "splits", "read the samples below")


def _truncated_tile(audit: Audit) -> Tile:
    number, kept = audit.truncated, max(audit.conserved["kept"], 1)
    if not number:
        return Tile("Truncated", "0", "every document is whole", Level.good, "splits")
    note = f"{plural(number, 'document')} cut to data.max_length={audit.words['data.max_length']}"
    advice = "raise data.max_length, or choose data.over_length; a cut answer does not teach to stop"
    return Tile("Truncated", percent(number / kept), note, _level(number / kept, 0, 0.1), "splits", advice)


def _leakage_tile(audit: Audit) -> Tile:
    if not audit.leakage:
        return Tile("Leakage", NOT_MEASURED, "no held-out split to compare with", Level.none, "leakage")
    documents = sum(found.documents for found in audit.leakage.values())
    prompts = sum(found.train["prompt"] for found in audit.leakage.values())
    shared = sum(part.in_training for part in audit.groups.values())
    if shared and all(found.policy in KEEPING_POLICIES for found in audit.leakage.values()):
        note = f"training documents of a {audit.words['data.group_by']} that is held out too"
        advice = "data.leakage.policy=drop_train takes them out"
        return Tile("Leakage", f"{shared:,}", note, Level.act, "leakage", advice)
    if documents and all(found.policy in KEEPING_POLICIES for found in audit.leakage.values()):
        advice = "data.leakage.policy=drop_train takes them out; until then the evaluation measures memory"
        note = f"training documents are in {' and '.join(audit.leakage)} too"
        return Tile("Leakage", f"{documents:,}", note, Level.act, "leakage", advice)
    if prompts:
        note = f"no shared document; {plural(prompts, 'prompt')} shared"
        note = f"taken out; {plural(prompts, 'shared prompt')} left" if documents else note
        return Tile("Leakage", f"{documents:,}", note, Level.look, "leakage", "read them: is it a fixed instruction?")
    note = "taken out of training" if documents else "no held-out document in training"
    return Tile("Leakage", f"{documents:,}", note, Level.good, "leakage")


def _duplicates_tile(audit: Audit) -> Tile:
    if not audit.duplicates:
        return Tile("Duplicates", NOT_MEASURED, "not looked for", Level.none, "duplicates")
    found = sum(kind.documents for kind in audit.duplicates.values())
    left = {
        name: kind.documents
        for name, kind in audit.duplicates.items()
        if kind.policy in KEEPING_POLICIES and kind.documents
    }
    if not left:
        note = "taken out" if found else "none found"
        return Tile("Duplicates", f"{found:,}", note, Level.good, "duplicates")
    part = sum(left.values()) / max(audit.conserved["rows_in"], 1)
    advice = ", ".join(f"data.duplicates.{name}=drop" for name in left) + " takes them out"
    note = f"still in the data, {percent(part)} of the rows"
    return Tile("Duplicates", f"{sum(left.values()):,}", note, _level(part, 0.01, 0.1), "duplicates", advice)


def _personal_data_tile(audit: Audit) -> Tile:
    found = audit.privacy
    if found is None or not found.scanned:
        return Tile(
            "Personal data", NOT_MEASURED, "not looked for", Level.none, "privacy", "set data.privacy.mode=report"
        )
    limits = "" if found.people_and_places else "; people and places were not looked for"
    where = f"in {plural(found.scanned, 'document')} searched"
    if not found.documents:
        return Tile("Personal data", "0", f"none found {where}{limits}", Level.good, "privacy")
    done = {"redact": "redacted", "pseudonymise": "pseudonymised", "drop": "dropped"}.get(found.mode)
    value, grave = f"{found.documents:,}", [name for name in found.types if HARMFUL_TYPES.search(name)]
    if done:
        return Tile("Personal data", value, f"documents with findings, {done}{limits}", Level.good, "privacy")
    words = f"left in, with {', '.join(grave[:3])}" if grave else f"with findings {where}"
    level, advice = Level.act if grave else Level.look, "data.privacy.mode=redact replaces what was found"
    return Tile("Personal data", value, f"documents {words}{limits}", level, "privacy", advice)


def known_gaps(audit: Audit, stated: CardConfig) -> list[str]:
    """What is not known about the data set, as short sentences, what its owner alone can tell first."""
    asked = {
        "description": "what it was made for",
        "source_description": "how the data was collected",
        "intended_use": "what it may be used for",
        "contact": "who answers questions and requests for removal",
        "licence": "the licence of the whole",
    }
    gaps = [
        f"not stated: {words} (data.card.{name})"
        for name, words in asked.items()
        if not (getattr(stated, name) or "").strip()
    ]
    if open_ones := [source.name for source in audit.sources if not source.licence]:
        gaps.append(f"not stated: the licence of {', '.join(open_ones[:10])}{' and others' if open_ones[10:] else ''}")
    if not stated.languages and not audit.languages:
        gaps.append("languages neither stated nor detected (data.languages=true)")
    if "eval" not in audit.splits:
        gaps.append("there is no evaluation split")
    if bad := audit.quarantine["rows"]:
        gaps.append(f"{plural(bad, 'row')} could not be used, listed in {audit.quarantine['file']}")
    documents, found = sum(split.documents for split in audit.splits.values()), audit.privacy
    if found is None or not found.scanned:
        gaps.append("personal data was not looked for")
    elif found.scanned < documents:
        gaps.append(f"personal data was looked for in {found.scanned:,} of {plural(documents, 'document')}")
    if found is not None and not found.people_and_places:
        gaps.append("names of people, places and organisations were not looked for (data.privacy.engine=presidio)")
    for tile in (_leakage_tile(audit), _duplicates_tile(audit), _truncated_tile(audit)):
        if tile.level is not Level.good:
            gaps.append(f"{tile.what.lower()}: {tile.value if tile.level is not Level.none else ''} {tile.note}")
    for part, key in ((audit.leakage, "data.leakage.near"), (audit.duplicates, "data.duplicates.near")):
        if part and audit.words[key] in (False, "none"):
            gaps.append(f"near {'leaks' if part is audit.leakage else 'copies'} were not looked for ({key})")
    for source, names in audit.unread_columns.items():
        gaps.append(f"columns of {source} that nobody read: {', '.join(names)}")
    return gaps
