"""The data card: a datasheet of the prepared data set as Markdown, with the Hugging Face metadata block in front.

Follows the questions of Gebru et al., "Datasheets for Datasets" (2021, arXiv:1803.09010) and the fields of the Hugging
Face data set card. States what preparation counted and what its settings say; what nobody stated or measured is listed
under known gaps. No paths, only names of files: the card travels, the machine's layout does not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from trainer.data.report.gaps import known_gaps
from trainer.data.report.schema import LEAKS, count, items, leaks, mapping, number, privacy
from trainer.data.report.svg import percent, plural, visible

NOT_STATED = "Not stated."
HUB_LICENCES = re.compile(
    r"(apache-2\.0|mit|openrail|bigscience-.*|creativeml-.*|bsd(-.*)?|cc(-.*)?|cc0-1\.0|[al]?gpl(-.*)?|mpl-2\.0|odc-by|"
    r"odbl|pddl|cdla-.*|gfdl|isc|unlicense|wtfpl|zlib|llama.*|gemma|etalab-2\.0|afl-3\.0|artistic-2\.0|bsl-1\.0|"
    r"eupl-.*|epl-.*|ecl-2\.0|ms-pl|ncsa|osl-3\.0|postgresql|lppl-1\.3c|ofl-1\.1|unknown|other)"
)
"""Licence identifiers that the hub knows; any other is given as `other` with its name."""
SIZES = ((10**3, "1K"), (10**4, "10K"), (10**5, "100K"), (10**6, "1M"), (10**7, "10M"), (10**8, "100M"), (10**9, "1B"))
"""Bounds of the hub's size categories, in documents."""


@dataclass(kw_only=True, slots=True)
class CardConfig:
    """What only people know about a data set, for its card (`datacard.md`). Nothing here changes the data."""

    title: str | None = None
    """Name of the data set; the default is made of the names of its sources."""
    description: str | None = None
    """What the data set is and what it was made for, in a few sentences."""
    source_description: str | None = None
    """How, when and from whom the data was collected, and whether those people agreed."""
    licence: str | None = None
    """Licence of the whole, preferably an SPDX identifier such as `CC-BY-4.0`; each source may state its own."""
    contact: str | None = None
    """Who answers questions and requests for removal: a name, a team or an address."""
    intended_use: str | None = None
    """What the data may be used for, and what it must not be used for."""
    languages: list[str] = field(default_factory=list)
    """Languages of the texts as ISO 639 codes; an empty list takes those that were detected, if any."""


def datacard(audit: Mapping[str, Any], config: CardConfig) -> str:
    """The text of `datacard.md` for an audit of the form `schema.Audit`. Text from the data is escaped for Markdown."""
    names = [str(mapping(source).get("name", "data")) for source in items(audit.get("sources"))]
    title = config.title or f"Fine-tuning data: {', '.join(names[:5]) or 'unnamed'}"
    gaps = known_gaps(audit, {name: getattr(config, name) for name in CardConfig.__dataclass_fields__})
    parts = [
        _front_matter(audit, config, title),
        f"# {escape(title)}",
        f"## Motivation\n\n{_stated(config.description)}",
        "## Composition\n\n" + _composition(audit, config),
        "## Collection\n\n" + _collection(audit, config),
        "## Preprocessing and cleaning\n\n" + _preprocessing(audit),
        "## Personal data\n\n" + _privacy(audit),
        "## Splits and leakage\n\n" + _splits(audit),
        "## Balance\n\n" + _balance(audit),
        f"## Uses\n\n{_stated(config.intended_use)}",
        "## Distribution and licence\n\n" + _distribution(audit, config),
        "## Maintenance\n\n" + _maintenance(audit, config),
        "## Known gaps\n\n" + ("\n".join(f"- {escape(gap)}" for gap in gaps) or "None known."),
    ]
    return "\n\n".join(parts) + "\n"


def escape(words: object) -> str:
    """`words` on one line, with nothing that Markdown or HTML would act on."""
    shown = " ".join(visible(words).split())
    shown = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", shown).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"^(#+|[-+]|\d+[.)])(?= )", r"\\\1", shown)


def _stated(words: str | None) -> str:
    """What the user wrote, as Markdown of their own; control characters shown."""
    return visible(words).strip() if words and words.strip() else NOT_STATED


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    lines = [f"| {' | '.join(heads)} |"]
    lines.append("|" + "|".join(" ---: " if _is_number(value) else " --- " for value in rows[0]) + "|")
    for row in rows:
        lines.append("| " + " | ".join(f"{v:,}" if _is_number(v) else escape(v) for v in row) + " |")
    return "\n".join(lines)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _joined(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part) or NOT_STATED


def _documents(audit: Mapping[str, Any]) -> int:
    return sum(count(mapping(split).get("documents")) for split in mapping(audit.get("splits")).values())


def _languages(audit: Mapping[str, Any], config: CardConfig) -> list[str]:
    """Codes as stated, else as detected in at least one document of a hundred."""
    found = mapping(audit.get("languages"))
    total = sum(count(amount) for amount in found.values())
    detected = sorted(found, key=lambda code: -count(found[code]))
    return list(config.languages) or [
        c for c in detected if re.fullmatch("[a-z]{2,3}", str(c)) and c != "und" and count(found[c]) >= total / 100
    ]


def _front_matter(audit: Mapping[str, Any], config: CardConfig, title: str) -> str:
    lines = ["---", f"pretty_name: {json.dumps(title)}"]
    licence = (config.licence or "").strip()
    if licence:
        known = HUB_LICENCES.fullmatch(licence.lower())
        lines.append(f"license: {json.dumps(licence.lower() if known else 'other')}")
        if not known:
            lines.append(f"license_name: {json.dumps(licence)}")
    if languages := _languages(audit, config):
        lines += ["language:", *(f"- {json.dumps(code)}" for code in languages)]
    if documents := _documents(audit):
        lines += ["size_categories:", f"- {json.dumps(_size(documents))}"]
    labelled = any(mapping(split).get("labelled") for split in mapping(audit.get("splits")).values())
    lines += ["task_categories:", f"- {'text-classification' if labelled else 'text-generation'}"]
    return "\n".join([*lines, "tags:", "- shardtune", "- fine-tuning", "---"])


def _size(documents: int) -> str:
    """The hub's size category."""
    below = "n<"
    for bound, words in SIZES:
        if documents < bound:
            return f"{below}{words}"
        below = f"{words}<n<"
    return "1B<n<10B"


def _composition(audit: Mapping[str, Any], config: CardConfig) -> str:
    splits = [(str(name), mapping(split)) for name, split in mapping(audit.get("splits")).items()]
    rows = [
        (
            name,
            *(
                count(split.get(key))
                for key in ("documents", "tokens", "supervised_tokens", "length_p50", "length_max")
            ),
            percent(number(split.get("supervised_share"))),
        )
        for name, split in splits
    ]
    heads = ("split", "documents", "tokens", "learned tokens", "median length", "longest", "learned share")
    sources = [
        (
            mapping(s).get("name", "data"),
            mapping(s).get("format", ""),
            count(mapping(s).get("rows")),
            count(mapping(s).get("kept")),
            count(mapping(s).get("tokens")),
        )
        for s in items(audit.get("sources"))
    ]
    mixing = [
        (
            name,
            count(p.get("documents")),
            percent(number(p.get("share_documents"))),
            percent(number(p.get("share_tokens"))),
        )
        for name, p in ((str(k), mapping(v)) for k, v in mapping(audit.get("mixing")).items())
    ]
    languages = ", ".join(map(escape, _languages(audit, config)))
    return _joined(
        _table(heads, rows),
        _table(("source", "format", "rows", "kept", "tokens"), sources),
        _table(("mixed source", "documents", "share of documents", "share of tokens"), mixing),
        f"Languages: {languages} ({'as stated' if config.languages else 'as detected'})." if languages else "",
    )


def _collection(audit: Mapping[str, Any], config: CardConfig) -> str:
    files = [
        (
            mapping(s).get("name", "data"),
            PurePath(str(f.get("path", ""))).name,
            count(f.get("rows")),
            str(f.get("sha256", "")),
        )
        for s in items(audit.get("sources"))
        for f in map(mapping, items(mapping(s).get("files")))
    ]
    more = f"and {plural(len(files) - 50, 'more file')}, in audit.json" if len(files) > 50 else ""
    return _joined(_stated(config.source_description), _table(("source", "file", "rows", "sha256"), files[:50]), more)


def _preprocessing(audit: Mapping[str, Any]) -> str:
    rows = []
    for stage in map(mapping, items(audit.get("flow"))):
        said = [
            ", ".join(
                f"{str(k).replace('_', ' ')} {count(v):,}" for k, v in mapping(stage.get(key)).items() if count(v)
            )
            for key in ("dropped", "noted")
        ]
        rows.append((stage.get("stage", ""), count(stage.get("in")), count(stage.get("out")), *said))
    conserved = mapping(audit.get("conserved"))
    total = ""
    if conserved:
        numbers = [count(conserved.get(key)) for key in ("rows_in", "kept", "dropped")]
        total = f"{plural(numbers[0], 'row')} read = {numbers[1]:,} kept + {numbers[2]:,} dropped."
    copies = [
        f"{kind} copies: {plural(count(part.get('documents')), 'document')} in {plural(count(part.get('groups')), 'group')}"
        f" (policy: {escape(part.get('policy', 'not stated'))})"
        for kind, part in ((escape(k), mapping(v)) for k, v in mapping(audit.get("duplicates")).items())
    ]
    return _joined(
        total, _table(("stage", "in", "out", "dropped", "noted"), rows), "\n".join(f"- {line}" for line in copies)
    )


def _privacy(audit: Mapping[str, Any]) -> str:
    found = privacy(audit)
    if not found or str(found.get("mode")) == "none":
        return "The texts were not searched for personal data."
    scanned, documents = count(found.get("scanned")), count(found.get("documents"))
    how = ", ".join(f"{key} {escape(found[key])}" for key in ("mode", "preset", "engine") if found.get(key) is not None)
    rows = [
        (name, count(mapping(part).get("count")), count(mapping(part).get("documents")))
        for name, part in mapping(found.get("types")).items()
    ]
    head = f"{plural(scanned, 'document')} searched ({how}); findings in {documents:,}."
    limit = "A search finds what it has a pattern or a model for; that it found nothing is no proof of absence."
    return _joined(head, _table(("type", "findings", "documents"), rows), limit)


def _splits(audit: Mapping[str, Any]) -> str:
    rows = [(str(k), count(mapping(v).get("documents"))) for k, v in mapping(audit.get("splits")).items()]
    leaking = [
        (str(k), *leaks(v), mapping(v).get("policy", "not stated")) for k, v in mapping(audit.get("leakage")).items()
    ]
    searched = _table(("split", *LEAKS, "policy"), leaking)
    told = (
        "Training documents that were found in a held-out split too:"
        if leaking
        else "Leakage between splits was not looked for."
    )
    benchmarks = mapping(audit.get("decontamination"))
    shown = f"Benchmarks: {escape(json.dumps(benchmarks, default=str)[:500])}" if benchmarks else ""
    return _joined(_table(("split", "documents"), rows), told, searched, shown)


def _balance(audit: Mapping[str, Any]) -> str:
    labels = mapping(audit.get("labels"))
    before, after = mapping(labels.get("before")), mapping(labels.get("after"))
    names = sorted({*before, *after}, key=lambda name: -max(count(before.get(name)), count(after.get(name))))
    rows = [(str(name), count(before.get(name)), count(after.get(name))) for name in names[:50]]
    more = f"and {plural(len(names) - 50, 'more label')}, in audit.json" if len(names) > 50 else ""
    groups = [
        (str(k), *(percent(number(mapping(v).get(key))) for key in ("share_before", "share_after", "share_target")))
        for k, v in list(mapping(audit.get("balance")).items())[:50]
    ]
    made = _joined(
        _table(("label", "before", "after"), rows),
        more,
        _table(("group", "before", "after", "target"), groups),
    )
    return "Not measured." if made == NOT_STATED else made


def _distribution(audit: Mapping[str, Any], config: CardConfig) -> str:
    sources = [
        (mapping(s).get("name", "data"), mapping(s).get("licence") or "not stated") for s in items(audit.get("sources"))
    ]
    whole = (
        f"Licence of the whole: {escape(config.licence)}." if config.licence else "Licence of the whole: not stated."
    )
    return _joined(whole, _table(("source", "licence"), sources))


def _maintenance(audit: Mapping[str, Any], config: CardConfig) -> str:
    lines = [f"- contact: {escape(config.contact) if config.contact else 'not stated'}"]
    for key, words in (("created", "made"), ("shardtune", "shardtune"), ("fingerprint", "fingerprint")):
        if audit.get(key):
            lines.append(f"- {words}: {escape(audit[key])}")
    lines.append("- made anew from the same files and settings, the data set is the same: compare the fingerprint")
    return "\n".join(lines)
