"""What is not known about a data set, computed from its audit and from what its owner stated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.data.report.schema import (
    count,
    duplicate_documents,
    handled,
    items,
    leaked_documents,
    mapping,
    number,
    privacy,
    quarantined,
)
from trainer.data.report.svg import percent, plural
from trainer.data.stages.privacy.config import NOT_ASKED

STATED_BY_PEOPLE = {
    "description": "motivation not stated (data.card.description)",
    "source_description": "how the data was collected is not stated (data.card.source_description)",
    "intended_use": "intended use not stated (data.card.intended_use)",
    "contact": "nobody named who answers questions and removal requests (data.card.contact)",
}


def known_gaps(audit: Mapping[str, Any], stated: Mapping[str, Any]) -> list[str]:
    """Gaps as short sentences, the owner's first; `stated` is a `CardConfig` as a mapping."""
    gaps = [words for name, words in STATED_BY_PEOPLE.items() if not str(stated.get(name) or "").strip()]
    gaps += _licences(audit, stated)
    splits = {str(name): mapping(split) for name, split in mapping(audit.get("splits")).items()}
    if not stated.get("languages") and not audit.get("languages"):
        gaps.append("languages neither stated nor detected")
    if splits and "eval" not in splits:
        gaps.append("no evaluation split")
    if bad := quarantined(audit):
        gaps.append(f"{plural(bad, 'row')} quarantined: listed in quarantine.jsonl, not in the data set")
    gaps += _privacy(audit, sum(count(split.get("documents")) for split in splits.values()))
    gaps += _overlaps(audit, has_eval="eval" in splits)
    cut = sum(count(mapping(mapping(stage).get("noted")).get("truncated")) for stage in items(audit.get("flow")))
    if cut:
        gaps.append(f"{plural(cut, 'document')} truncated to data.max_length")
    for name, split in splits.items():
        if 0 < number(split.get("supervised_share")) < 0.05 and not split.get("labelled"):
            gaps.append(f"{name}: only {percent(number(split['supervised_share']))} of the tokens are learned")
    return gaps


def _licences(audit: Mapping[str, Any], stated: Mapping[str, Any]) -> list[str]:
    gaps = [] if stated.get("licence") else ["licence not stated (data.card.licence)"]
    open_ones = [
        str(mapping(source).get("name", "data"))
        for source in items(audit.get("sources"))
        if not mapping(source).get("licence")
    ]
    if open_ones:
        more = f" and {len(open_ones) - 10} more" if len(open_ones) > 10 else ""
        gaps.append(f"licence not stated for {plural(len(open_ones), 'source')}: {', '.join(open_ones[:10])}{more}")
    return gaps


def _privacy(audit: Mapping[str, Any], documents: int) -> list[str]:
    found = privacy(audit)
    scanned = count(found.get("scanned"))
    if not found or str(found.get("mode")) == "none" or not scanned:
        return ["not scanned for personal data"]
    gaps = []
    if scanned < documents:
        gaps.append(f"PII scan covered {scanned:,} of {plural(documents, 'document')}")
    if str(found.get("mode")) == "report" and count(found.get("documents")):
        gaps.append(f"personal data found in {plural(count(found.get('documents')), 'document')} and left in")
    unsought = {kind: why for kind, why in mapping(found.get("not_looked_for")).items() if why != NOT_ASKED}
    if unsought:
        gaps.append("not looked for: " + ", ".join(f"{kind} ({why})" for kind, why in unsought.items()))
    return gaps


def _overlaps(audit: Mapping[str, Any], *, has_eval: bool) -> list[str]:
    gaps = []
    if "duplicates" not in audit:
        gaps.append("duplicates were not looked for")
    else:
        kinds = [mapping(kind) for kind in mapping(audit["duplicates"]).values()]
        held = [kind.get("policy") for kind in kinds if count(kind.get("documents"))]
        if duplicate_documents(audit) and not handled(held):
            gaps.append(f"{plural(duplicate_documents(audit), 'duplicate')} found and left in")
    if has_eval and "leakage" not in audit:
        gaps.append("leakage between splits was not looked for")
    elif leaked_documents(audit) and not handled(
        [mapping(s).get("policy") for s in mapping(audit["leakage"]).values()]
    ):
        gaps.append(f"{plural(leaked_documents(audit), 'training document')} also in a held-out split, left there")
    return gaps
