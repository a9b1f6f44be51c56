"""The contract of `audit.json`: what preparation hands to everything in this package, and how it is read safely.

Every key may be missing; what is missing is left out of the reports. Counts are whole numbers, shares lie in 0..1,
places are "file:line".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

SCHEMA = 1


class SourceFile(TypedDict, total=False):
    """One input file."""

    path: str
    bytes: int
    sha256: str
    rows: int


class Source(TypedDict, total=False):
    """One source of `data.sources`, or the whole of `data.path`."""

    name: str
    files: list[SourceFile]
    format: str
    rows: int
    kept: int
    weight: float
    licence: str
    tokens: int
    supervised_tokens: int


FlowStage = TypedDict(  # not a class: `in` is no name that a class body could spell
    "FlowStage",
    {
        "stage": str,
        "in": int,
        "out": int,
        "dropped": dict[str, int],
        "noted": dict[str, int],
        "examples": dict[str, list[str]],
    },
    total=False,
)
"""Documents that went into a stage and came out of it, by reason; `examples` has a few places of each reason."""


class Histogram(TypedDict):
    """`counts[i]` values lie in `edges[i]` .. `edges[i + 1]`; one edge more than counts."""

    edges: list[float]
    counts: list[int]


class Split(TypedDict, total=False):
    """One split, as in the manifest's report, and its distributions."""

    documents: int
    tokens: int
    supervised_tokens: int
    supervised_share: float
    labelled: bool
    length_p50: int
    length_p90: int
    length_max: int
    ends_supervised: int
    doubled_bos: int
    length_histogram: Histogram
    supervised_histogram: Histogram
    turns_histogram: Histogram


class Piece(TypedDict):
    """A run of decoded text that is learned, or not."""

    text: str
    learned: bool


class DecodedSample(TypedDict, total=False):
    """A tokenised document as text."""

    where: str
    pieces: list[Piece]
    label: str


class Audit(TypedDict, total=False):
    """The whole file.

    `words` resolved settings by dotted name. `conserved` {"rows_in", "kept", "dropped"}. `quarantine` {"rows", "file"}.
    `labels` {"before", "after"}: name -> documents. `balance` group -> {"before", "after", "share_before",
    "share_after", "share_target"}. `mixing` source -> {"weight", "requested", "documents", "tokens", "share_documents",
    "share_tokens"}. `duplicates` {"exact" | "normalized" | "near": {"documents", "groups", "policy", "examples",
    "threshold"}} with examples {"a", "b", "jaccard"}. `leakage` split -> {"exact", "normalized", "near", "prompt",
    "policy", "examples"}. `privacy` {"mode", "preset", "engine", "documents_scanned" and "documents_with_findings"
    by source, "types"}, types -> {"findings", "documents", "examples" (masked)}.
    """

    schema: int
    created: str
    shardtune: str
    fingerprint: str
    words: dict[str, Any]
    sources: list[Source]
    flow: list[FlowStage]
    conserved: dict[str, int]
    quarantine: dict[str, Any]
    splits: dict[str, Split]
    labels: dict[str, dict[str, int]]
    balance: dict[str, dict[str, float]]
    mixing: dict[str, dict[str, float]]
    duplicates: dict[str, dict[str, Any]]
    leakage: dict[str, dict[str, Any]]
    decontamination: dict[str, Any]
    privacy: dict[str, Any]
    languages: dict[str, int]
    quality: dict[str, Any]
    samples: list[DecodedSample]


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def items(value: Any) -> Sequence[Any]:
    """`value` if it is a list or tuple, else an empty list."""
    return value if isinstance(value, list | tuple) else []


def number(value: Any, default: float = 0.0) -> float:
    """`value` as a finite float of moderate size, else `default`: nothing that could spoil a drawing."""
    if not isinstance(value, int | float):
        return default
    try:
        made = float(value)
    except OverflowError:
        return default
    return made if math.isfinite(made) and abs(made) < 1e18 else default


def count(value: Any) -> int:
    """`value` as a whole number of things, at least 0."""
    return max(0, round(number(value)))


def share(part: float, whole: float) -> float:
    """part / whole, 0 of nothing."""
    return part / whole if whole else 0.0


def rows_in(audit: Mapping[str, Any]) -> int:
    """Rows that were read, from whichever part of the audit tells it."""
    conserved = mapping(audit.get("conserved"))
    if "rows_in" in conserved:
        return count(conserved["rows_in"])
    flow = items(audit.get("flow"))
    if flow:
        return count(mapping(flow[0]).get("in"))
    return sum(count(mapping(source).get("rows")) for source in items(audit.get("sources")))


def quarantined(audit: Mapping[str, Any]) -> int | None:
    """Rows in quarantine; None where the audit does not tell."""
    if "quarantine" in audit:
        return count(mapping(audit["quarantine"]).get("rows"))
    stages = [mapping(stage) for stage in items(audit.get("flow"))]
    if not stages:
        return None
    return sum(
        count(dropped)
        for stage in stages
        if stage.get("stage") in ("read", "checks")
        for dropped in mapping(stage.get("dropped")).values()
    )


def duplicate_documents(audit: Mapping[str, Any]) -> int:
    """Documents that are copies or near copies of another; each counts under one kind."""
    return sum(count(mapping(kind).get("documents")) for kind in mapping(audit.get("duplicates")).values())


LEAKS = ("exact", "normalized", "near", "prompt")
"""Kinds of leakage, the strictest first; a document counts under one."""


def leaks(split: Any) -> tuple[int, ...]:
    """Training documents found in a held-out split, for each of `LEAKS`."""
    found = mapping(split)
    return tuple(count(found.get(kind, found.get(kind.replace("z", "s")))) for kind in LEAKS)


def leaked_documents(audit: Mapping[str, Any]) -> int:
    """Training documents found in a held-out split, over all splits and kinds."""
    return sum(sum(leaks(split)) for split in mapping(audit.get("leakage")).values())


def privacy(audit: Mapping[str, Any]) -> dict[str, Any]:
    """The privacy part with one number each for `scanned` and `documents`, and `count` for each of its `types`.

    Numbers by source, as the search counts them, are added up and kept under their own names. Empty where there is none.
    """
    found = dict(mapping(audit.get("privacy")))
    if not found:
        return {}
    for key, by_source in (("scanned", "documents_scanned"), ("documents", "documents_with_findings")):
        if key not in found:
            found[key] = sum(count(number) for number in mapping(found.get(by_source)).values())
    found["types"] = {
        str(name): {**mapping(part), "count": count(mapping(part).get("count", mapping(part).get("findings")))}
        for name, part in mapping(found.get("types")).items()
    }
    return found


UNTOUCHED = frozenset({"keep", "report", "off", "warn", "note", "none", "count", "ignore", "allow", ""})
"""Policies that leave what was found where it is."""


def handled(policies: Sequence[Any]) -> bool:
    """Whether every policy takes what it finds out of the data; an unknown or missing one does not."""
    return bool(policies) and all(p is not None and str(p).lower() not in UNTOUCHED for p in policies)
