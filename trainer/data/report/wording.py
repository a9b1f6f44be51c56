"""Puts into words, for the terminal, the page and the card, what was counted: numbers, reasons, the verdict, the known gaps.

The rules of the verdict are thresholds on what preparation counted. They point a reader to what to look at first; they are no
gate. Invisible characters of the data are made visible before text is shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.data.config import DataFormat
from trainer.data.report.audit import Audit
from trainer.pages.numbers import format_percent

if TYPE_CHECKING:
    from jinja2 import Environment

    from trainer.data.config import CardConfig


JOINER_CHARACTERS = "\u200c\u200d"
"""Invisible, but part of how words (Persian, Hindi) and emoji are spelled."""


def escape_control_characters(text: object) -> str:
    r"""Make invisible characters of the data visible: control characters, direction overrides, lone surrogates as \xNN.

    Tabs become spaces. Line breaks, and joiners that words and emoji need, stay.
    """
    return "".join(map(_visible_character, str(text)))


def _visible_character(character: str) -> str:
    """A character as it is shown: a tab as a space, a control character as \\xNN, others as they are."""
    if character.isprintable() or character == "\n" or character in JOINER_CHARACTERS:
        return character
    if character == "\t":
        return " "
    return f"\\x{ord(character):02x}"


def plural(amount: int, noun: str) -> str:
    """An amount with its noun: "1 row", "2,000 rows"."""
    return f"{amount:,} {noun if amount == 1 else noun + 's'}"


def reason_text(code: str) -> str:
    """Put into words why a document was dropped or noted, from the code: "too_long" -> "longer than data.max_length".

    A code that speaks for itself gets blanks in place of its underscores.
    """
    return REASON_TEXT_BY_CODE.get(code, code.replace("_", " "))


REASON_TEXT_BY_CODE = {
    "truncated": "truncated to data.max_length",
    "split": "split into pieces of data.max_length",
    "too_long": "longer than data.max_length",
    "nothing_to_learn": "nothing left to learn",
    "same_answers": "both answers of a pair are the same",
    "thumbs_down": "an answer marked as undesirable",
    "control_tokens_in_text": "text contains special tokens of the tokenizer",
    "control_tokens_as_text": "of these in prompts and texts, tokenised as ordinary text",
    "missing_eos": "the last learned token closes no turn",
}


@cache
def template_environment(escape: Callable[[str], str]) -> Environment:
    """Make Jinja's environment for the templates of the reports. Every text is inserted as `escape(text)`, unless it is Markup.

    One environment is made for each `escape` and kept, since to compile the templates takes longer than to fill them.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def escape_plain_text(expression: Any) -> Any:
        """What is inserted for an expression of a template."""
        is_plain_text = isinstance(expression, str) and not isinstance(expression, Markup)
        return escape(expression) if is_plain_text else expression

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,  # an unknown name is an error, never an empty place
        autoescape=False,  # `escape` does it: these templates make no HTML
        finalize=escape_plain_text,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": format_percent,
        "reason": reason_text,
        "file_name": lambda path: PurePath(path).name,
        "count": lambda number: f"{number:,.0f}",
        "number": lambda number: f"{number:,.4g}",
        "weight": lambda number: f"{number:,.10g}",
    }
    environment.globals |= {"plural": plural}
    return environment


SETTING_BY_STAGE = {
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
"""Stages whose drops nobody asked for by a setting: rows that cannot be read, for example."""
_WARNING_ABOVE_SHARE = 0.01
_CRITICAL_ABOVE_SHARE = 0.1
"""Shares of the rows that are lost, or are copies, above which that is a warning, and critical."""
NOT_MEASURED = "\N{EN DASH}"
"""Value of a tile that was not measured."""
KEEPING_POLICIES = frozenset({"report", "none"})
"""Policies that leave what was found where it is."""
HARMFUL_TYPES_REGEX = re.compile(
    "SECRET|PASSWORD|KEY|SSN|ITIN|NHS|NINO|TAX|NIR|NIF|FISCAL|BSN|PESEL|AADHAAR|CPF|CREDIT_CARD|IBAN|MEDICAL|HEALTH"
)
"""Parts of the names of types whose leaking does direct harm: left in the data, they call for action."""


class Severity(StrEnum):
    """How serious a finding about prepared data is."""

    good = "good"
    warning = "warning"
    """A person should look at it."""
    critical = "critical"
    """The data, or a setting, should be changed."""
    not_measured = "not_measured"


@dataclass(slots=True)
class Tile:
    """One finding in a few words, as at the top of the audit page."""

    title: str
    value: str
    """The number in large type, such as "3 %"."""
    note: str
    severity: Severity
    anchor: str
    """The section of the page with more."""
    advice: str = ""
    """What can be done about it."""


def audit_tiles(audit: Audit) -> list[Tile]:
    """The tiles at the top of the audit page, in reading order: findings such as lost rows, each with how serious it is.

    A tile says so if its part was not measured.
    """
    return [
        _rows_lost_tile(audit),
        _learned_tile(audit),
        _truncated_tile(audit),
        _leakage_tile(audit),
        _duplicates_tile(audit),
        _personal_data_tile(audit),
    ]


def overall_verdict(all_tiles: list[Tile]) -> tuple[Severity, str]:
    """How serious the findings are together: (severity of the gravest tile, a sentence that names the tiles of that severity).

    Such as (Severity.warning, "Worth a look: leakage").
    """
    for severity, verdict in ((Severity.critical, "Calls for action"), (Severity.warning, "Worth a look")):
        names = [tile.title.lower() for tile in all_tiles if tile.severity is severity]
        if names:
            return severity, f"{verdict}: {', '.join(names)}"
    return Severity.good, "Nothing stands out"


def _severity_of_share(share: float, warning_above: float, critical_above: float) -> Severity:
    """How serious a share is, such as that of lost rows: good up to `warning_above`, critical beyond `critical_above`.

    In between it is a warning.
    """
    if share > critical_above:
        return Severity.critical
    if share > warning_above:
        return Severity.warning
    return Severity.good


def few_ends_learned(num_ends: int, num_documents: int) -> bool:
    """Whether fewer than half of the documents end with a learned end-of-turn token: the model may not learn to stop.

    The end is not learned if a document is cut to `data.max_length`, or if the chat template writes no end of turn. A document
    that is split into several sequences has one end.
    """
    return 2 * num_ends < num_documents


def _rows_lost_tile(audit: Audit) -> Tile:
    """Make the tile of the audit page on rows that are not in the data set: how many, and the most frequent reason.

    The severity goes by rows that no setting asked to drop: more than 1 % are a warning, more than 10 % critical. Half of all
    rows gone may be a surprise even if a setting asked for it: a warning.
    """
    num_rows = audit.conserved["rows_in"]
    num_dropped = audit.conserved["dropped"]
    num_unrequested = 0
    for stage in audit.flow:
        # Reading and tokenising, for example, drop what cannot be used; a filter drops what it was set to drop.
        if stage.stage in UNREQUESTED_STAGES:
            num_unrequested += sum(stage.dropped.values())
    unrequested_share = num_unrequested / max(num_rows, 1)
    severity = _severity_of_share(
        unrequested_share, warning_above=_WARNING_ABOVE_SHARE, critical_above=_CRITICAL_ABOVE_SHARE
    )
    if severity is Severity.good and audit.lost_share > 0.5:
        severity = Severity.warning
    note = f"{num_dropped:,} of {plural(num_rows, 'row')}"
    advice = ""
    if num_dropped:
        most_frequent = _most_frequent_drop(audit, only_unrequested=num_unrequested > 0)
        note += f"; most: {most_frequent.cause_text()}"
        advice = most_frequent.advice()
    return Tile("Rows lost", format_percent(audit.lost_share), note, severity, anchor="rows", advice=advice)


class _Drop(NamedTuple):
    """How many rows a stage dropped for one reason: (12, "too_long", "tokenise")."""

    num_rows: int
    reason: str
    stage: str

    def cause_text(self) -> str:
        """The reason of a drop in words, with the number of rows: "longer than data.max_length (12)".

        The stage is named first if a setting asked for the drop, since reasons of such stages say little: "filters, ...".
        """
        cause = reason_text(self.reason)
        if self.stage not in UNREQUESTED_STAGES:
            cause = f"{self.stage}, {cause}"
        return f"{cause} ({self.num_rows:,})"

    def advice(self) -> str:
        """What can be done against it."""
        if self.reason == "too_long":
            return "raise data.max_length, or set data.over_length=truncate or split"
        return f"see the places below, and {SETTING_BY_STAGE.get(self.stage, 'quarantine.jsonl and dropped.jsonl')}"


def _most_frequent_drop(audit: Audit, *, only_unrequested: bool) -> _Drop:
    """Find by which stage, and for which reason, most rows were dropped. Call it only if some were.

    `only_unrequested`: of the stages whose drops no setting asked for, since these have to be looked at.
    """
    drops: list[_Drop] = []
    for stage in audit.flow:
        if stage.stage in UNREQUESTED_STAGES or not only_unrequested:
            drops += [_Drop(count, reason, stage.stage) for reason, count in stage.dropped.items()]
    return max(drops)


def _learned_tile(audit: Audit) -> Tile:
    """Make the tile of the audit page on the share of training tokens that is learned (supervised), with its severity:

    - The data has labels: how many; good.
    - Documents begin with two BOS: critical.
    - Few documents teach the model where to stop: a warning.
    - 5 % or more: good. Less: a warning, because the prompts are much longer than the answers, or the mask is wrong. None:
      critical.
    """
    train = audit.splits["train"]
    if train.labelled:
        return Tile("Learned", plural(train.documents, "label"), "one a document", Severity.good, anchor="splits")
    share = format_percent(train.supervised_share)
    if train.doubled_bos:
        advice = "check model.chat_template"
        return Tile(
            "Learned tokens", share, "documents begin with two BOS", Severity.critical, anchor="splits", advice=advice
        )
    if train.supervised_tokens and few_ends_learned(train.ends_supervised, train.documents):
        note = f"only {train.ends_supervised:,} of {plural(train.documents, 'document')} teach where to stop"
        advice = "check the end of turn in model.chat_template, and data.max_length"
        return Tile("Learned tokens", share, note, Severity.warning, anchor="splits", advice=advice)
    if train.supervised_share >= 0.05:
        severity = Severity.good
    elif train.supervised_share > 0:
        severity = Severity.warning
    else:
        severity = Severity.critical
    note = f"of {train.tokens:,} in training"
    return Tile("Learned tokens", share, note, severity, anchor="splits", advice="read the samples below")


def _truncated_tile(audit: Audit) -> Tile:
    """Make the tile of the audit page on documents that lost something to `data.max_length`: good if none did.

    Above 10 % of the documents it is critical, otherwise a warning.
    """
    if not audit.num_truncated:
        return Tile("Truncated", "0", "every document is whole", Severity.good, anchor="splits")
    share = audit.num_truncated / max(audit.conserved["kept"], 1)
    note = f"{plural(audit.num_truncated, 'document')} cut to data.max_length={audit.words['data.max_length']}"
    advice = "raise data.max_length, or choose data.over_length; a cut answer does not teach to stop"
    severity = _severity_of_share(share, warning_above=0, critical_above=0.1)
    return Tile("Truncated", format_percent(share), note, severity, anchor="splits", advice=advice)


def _leakage_tile(audit: Audit) -> Tile:
    """Make the tile of the audit page on training documents that are in a held-out split too, or of a group that is.

    The first case that applies, from the gravest on:
    - there is no held-out split: not measured;
    - the policy keeps leaks in training, and there are documents of a held-out group, or documents that leak: critical;
    - prompts are shared: a warning, since they may be a fixed instruction;
    - nothing is left: good.
    """
    if not audit.leakage:
        return Tile(
            "Leakage", NOT_MEASURED, "no held-out split to compare with", Severity.not_measured, anchor="leakage"
        )
    all_leaks = audit.leakage.values()  # one for each held-out set
    num_documents = sum(leaks.num_leaked for leaks in all_leaks)
    num_prompts = sum(leaks.train["prompt"] for leaks in all_leaks)
    num_of_held_out_groups = sum(groups.in_training for groups in audit.groups.values())
    # All have the same policy, `data.leakage.policy`.
    are_leaks_kept = all(leaks.policy in KEEPING_POLICIES for leaks in all_leaks)
    if num_of_held_out_groups and are_leaks_kept:
        note = f"training documents of a {audit.words['data.group_by']} that is held out too"
        advice = "data.leakage.policy=drop_train takes them out"
        return Tile("Leakage", f"{num_of_held_out_groups:,}", note, Severity.critical, anchor="leakage", advice=advice)
    if num_documents and are_leaks_kept:
        advice = "data.leakage.policy=drop_train takes them out; until then the evaluation measures memory"
        note = f"training documents are in {' and '.join(audit.leakage)} too"
        return Tile("Leakage", f"{num_documents:,}", note, Severity.critical, anchor="leakage", advice=advice)
    if num_prompts:
        if num_documents:
            note = f"taken out; {plural(num_prompts, 'shared prompt')} left"
        else:
            note = f"no shared document; {plural(num_prompts, 'prompt')} shared"
        advice = "read them: is it a fixed instruction?"
        return Tile("Leakage", f"{num_documents:,}", note, Severity.warning, anchor="leakage", advice=advice)
    note = "taken out of training" if num_documents else "no held-out document in training"
    return Tile("Leakage", f"{num_documents:,}", note, Severity.good, anchor="leakage")


def _duplicates_tile(audit: Audit) -> Tile:
    """Make the tile of the audit page on copies within the training data: how many, and whether they are still there.

    Not measured if not looked for, good if all were taken out or none were found. Else the severity goes by the share of rows
    that are copies still in the data.
    """
    if not audit.duplicates:
        return Tile("Duplicates", NOT_MEASURED, "not looked for", Severity.not_measured, anchor="duplicates")
    num_found = sum(copies.documents for copies in audit.duplicates.values())
    # Copies that are still in the data, by kind ("exact", "normalized", "near").
    num_left_in_by_kind: dict[str, int] = {}
    for kind, copies in audit.duplicates.items():
        if copies.policy in KEEPING_POLICIES and copies.documents:
            num_left_in_by_kind[kind] = copies.documents
    num_left_in = sum(num_left_in_by_kind.values())
    if not num_left_in:
        note = "taken out" if num_found else "none found"
        return Tile("Duplicates", f"{num_found:,}", note, Severity.good, anchor="duplicates")
    share = num_left_in / max(audit.conserved["rows_in"], 1)
    advice = ", ".join(f"data.duplicates.{kind}=drop" for kind in num_left_in_by_kind) + " takes them out"
    note = f"still in the data, {format_percent(share)} of the rows"
    severity = _severity_of_share(share, warning_above=_WARNING_ABOVE_SHARE, critical_above=_CRITICAL_ABOVE_SHARE)
    return Tile("Duplicates", f"{num_left_in:,}", note, severity, anchor="duplicates", advice=advice)


def _personal_data_tile(audit: Audit) -> Tile:
    """Make the tile of the audit page on documents with personal data: how many, and what was done about it.

    Not measured without a search; good if nothing was found or all of it was treated. Else a warning, or critical for types in
    `HARMFUL_TYPES_REGEX`.
    """
    privacy = audit.privacy
    if privacy is None or not privacy.num_scanned:
        advice = "set data.privacy.mode=report"
        return Tile(
            "Personal data", NOT_MEASURED, "not looked for", Severity.not_measured, anchor="privacy", advice=advice
        )
    limits = "" if privacy.looked_for_names else "; people and places were not looked for"
    scope = f"in {plural(privacy.num_scanned, 'document')} searched"
    if not privacy.num_with_findings:
        return Tile("Personal data", "0", f"none found {scope}{limits}", Severity.good, anchor="privacy")
    shown_number = f"{privacy.num_with_findings:,}"
    treatment = {"redact": "redacted", "pseudonymise": "pseudonymised", "drop": "dropped"}.get(privacy.mode)
    if treatment:
        note = f"documents with findings, {treatment}{limits}"
        return Tile("Personal data", shown_number, note, Severity.good, anchor="privacy")
    harmful_types = [type_name for type_name in privacy.types if HARMFUL_TYPES_REGEX.search(type_name)]
    severity = Severity.warning
    note = f"documents with findings {scope}{limits}"
    if harmful_types:
        severity = Severity.critical
        note = f"documents left in, with {', '.join(harmful_types[:3])}{limits}"
    advice = "data.privacy.mode=redact replaces what was found"
    return Tile("Personal data", shown_number, note, severity, anchor="privacy", advice=advice)


def known_gaps(audit: Audit, data_statement: CardConfig) -> list[str]:
    """List what is not known about the data set, as short sentences for page and card: "there is no evaluation split".

    In order: what its owner did not state; what it lacks; what the tiles of the page say is not good; what was not looked for.
    `data_statement`: what the owner states in `data.card`.
    """
    gaps = _unstated_gaps(audit, data_statement)
    if "eval" not in audit.splits:
        gaps.append("there is no evaluation split")
    num_unusable = audit.quarantine["rows"]
    if num_unusable:
        gaps.append(f"{plural(num_unusable, 'row')} could not be used, listed in {audit.quarantine['file']}")
    gaps += _privacy_gaps(audit)
    for tile in (_leakage_tile(audit), _duplicates_tile(audit), _truncated_tile(audit)):
        if tile.severity is not Severity.good:
            shown_value = "" if tile.severity is Severity.not_measured else tile.value
            gaps.append(f"{tile.title.lower()}: {shown_value} {tile.note}")
    setting_values = audit.words  # by name
    if audit.leakage and setting_values["data.leakage.near"] is False:
        gaps.append("near leaks were not looked for (data.leakage.near)")
    if audit.duplicates and setting_values["data.duplicates.near"] == "none":
        gaps.append("near copies were not looked for (data.duplicates.near)")
    for source, names in audit.unread_columns.items():
        gaps.append(f"unused columns of {source}: {', '.join(names)}")
    return gaps


_MAX_LISTED_SOURCES = 10
"""Sources that a gap names at most."""


def _unstated_gaps(audit: Audit, data_statement: CardConfig) -> list[str]:
    """List what the owner did not state in `data.card`, and what nobody detected either: questions, licences, languages.

    Each is a short sentence, such as "not stated: the licence of the whole (data.card.licence)".
    """
    question_by_field = {
        "description": "what it was made for",
        "source_description": "how the data was collected",
        "intended_use": "what it may be used for",
        "contact": "who answers questions and requests for removal",
        "licence": "the licence of the whole",
    }
    gaps = []
    for field_name, question in question_by_field.items():
        answer = getattr(data_statement, field_name) or ""
        if not answer.strip():
            gaps.append(f"not stated: {question} (data.card.{field_name})")
    unlicensed = [source.name for source in audit.sources if not source.licence]
    if unlicensed:
        more = " and others" if len(unlicensed) > _MAX_LISTED_SOURCES else ""
        gaps.append(f"not stated: the licence of {', '.join(unlicensed[:_MAX_LISTED_SOURCES])}{more}")
    if not data_statement.languages and not audit.languages:
        gaps.append("languages neither stated nor detected (data.languages=true)")
    return gaps


def _privacy_gaps(audit: Audit) -> list[str]:
    """List what the search for personal data left out: documents, names of people and places, columns kept for rewards.

    Each is a short sentence, such as "personal data was not looked for".
    """
    gaps = []
    privacy = audit.privacy
    num_documents = sum(split.documents for split in audit.splits.values())
    if privacy is None or not privacy.num_scanned:
        gaps.append("personal data was not looked for")
    elif privacy.num_scanned < num_documents:
        gaps.append(f"personal data was looked for in {privacy.num_scanned:,} of {plural(num_documents, 'document')}")
    if privacy is not None and not privacy.looked_for_names:
        gaps.append("names of people, places and organisations were not looked for (data.privacy.engine=presidio)")
    if any(source.format == DataFormat.prompt for source in audit.sources):
        gaps.append("personal data was not looked for in columns that are kept for rewards")
    return gaps
