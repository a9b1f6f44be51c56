"""Sections of the audit page on what was found in the data: copies, leakage, personal data, quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.data.report.charts import Bar, bars
from trainer.data.report.markup import Limits, anything, details, drawn, figure, left_out, paragraph, table
from trainer.data.report.schema import LEAKS, count, items, leaks, mapping, privacy
from trainer.data.report.svg import plural


def duplicates_section(audit: Mapping[str, Any], limits: Limits) -> str:
    """Exact and near copies, with pairs to look at."""
    found = {str(kind): mapping(part) for kind, part in mapping(audit.get("duplicates")).items()}
    if not found:
        return ""
    rows = [
        (
            kind,
            count(part.get("documents")),
            count(part.get("groups")),
            part.get("policy", "not stated"),
            "" if part.get("threshold") is None else figure(part["threshold"]),
        )
        for kind, part in found.items()
    ]
    parts = [table(("kind", "documents", "groups", "policy", "threshold"), rows, limits)]
    for kind, part in found.items():
        parts.append(_pairs(f"{kind}: some of the pairs", items(part.get("examples")), limits))
        known = {"documents", "groups", "policy", "threshold", "examples"}
        parts.append(_rest(f"{kind}: more", part, known, limits))
    return "".join(parts)


def leakage_section(audit: Mapping[str, Any], limits: Limits) -> str:
    """Documents of held-out splits that training would see."""
    splits = {str(name): mapping(part) for name, part in mapping(audit.get("leakage")).items()}
    parts = []
    if splits:
        rows = [(name, *leaks(part), part.get("policy", "not stated")) for name, part in splits.items()]
        parts.append(table(("split", *LEAKS, "policy"), rows, limits))
        if not any(sum(row[1:5]) for row in rows):
            parts.append(paragraph("No training document was found in a held-out split."))
        for name, part in splits.items():
            parts.append(_pairs(f"{name}: some of the pairs", items(part.get("examples")), limits))
            parts.append(_rest(f"{name}: more", part, {*LEAKS, "normalised", "policy", "examples"}, limits))
    if decontamination := mapping(audit.get("decontamination")):
        parts.append(f"<h3>Benchmarks</h3>{anything(decontamination, limits, 'decontamination')}")
    return "".join(parts)


def _pairs(title: str, examples: Sequence[Any], limits: Limits) -> str:
    if not examples:
        return ""
    if not all(isinstance(example, Mapping) for example in examples):
        return details(title, table(("place",), [(_words(example),) for example in examples], limits))
    heads = list(dict.fromkeys(str(key) for example in examples for key in example))[:8]
    return details(title, table(heads, [[_words(e.get(head)) for head in heads] for e in examples], limits))


def _words(value: Any) -> Any:
    return " ↔ ".join(map(str, value)) if isinstance(value, list | tuple) else value


def _rest(title: str, part: Mapping[str, Any], known: set[str], limits: Limits) -> str:
    """Folded: what is there beyond the known keys."""
    return (
        details(title, anything({k: v for k, v in part.items() if k not in known}, limits)) if set(part) - known else ""
    )


def privacy_section(audit: Mapping[str, Any], limits: Limits) -> str:
    """Personal data by type, masked."""
    found = privacy(audit)
    if not found:
        return ""
    scanned, documents = count(found.get("scanned")), count(found.get("documents"))
    told = ", ".join(f"{key} {found[key]}" for key in ("mode", "preset", "engine") if found.get(key) is not None)
    covered = sum(count(mapping(part).get("documents")) for part in mapping(audit.get("splits")).values())
    words = f"{plural(documents, 'document')} with findings in {scanned:,} scanned ({told})."
    if 0 < scanned < covered:
        words += f" The data set has {covered:,} documents: what was not scanned is not known."
    parts = [paragraph(words, "" if scanned >= covered else "warn")]
    types = {str(name): mapping(part) for name, part in mapping(found.get("types")).items()}
    ranked = sorted(types.items(), key=lambda entry: -count(entry[1].get("count")))
    if ranked:
        rows = [
            Bar(
                name.replace("_", " ").lower(),
                [
                    (
                        count(part.get("count")),
                        "lost",
                        f"{count(part.get('count')):,} in {plural(count(part.get('documents')), 'document')}",
                    )
                ],
            )
            for name, part in ranked[: limits.rows // 2]
        ]
        parts.append(drawn(bars(rows, "Personal data by type", plural(len(types), "type"))))
        parts.append(left_out(len(ranked) - limits.rows // 2))
        examples = [
            (
                name,
                count(part.get("count")),
                count(part.get("documents")),
                ", ".join(map(str, items(part.get("examples")))),
            )
            for name, part in ranked
        ]
        heads = ("type", "findings", "documents", "masked examples")
        parts.append(details("With masked examples", table(heads, examples, limits)))
    known = {"mode", "preset", "engine", "scanned", "documents", "types"}
    parts.append(_rest("More on the scan", found, known, limits))
    return "".join(parts)


def quality_section(audit: Mapping[str, Any], limits: Limits) -> str:
    """Whatever was measured about the quality of texts."""
    found = mapping(audit.get("quality"))
    return anything(found, limits, "quality") if found else ""
