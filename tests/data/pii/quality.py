"""Precision and recall of the search for personal data.

`python -m tests.data.pii.quality` prints the tables of docs/evidence/personal-data-found.md.

A labelled piece counts as found when findings of its own type cover all its letters and digits, as covered when
findings of any type do. A finding counts as right when it touches a labelled piece of its type.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.data.pii.synthetic import Item, synthetic
from trainer.data.config import PrivacyConfig, PrivacyEngine, PrivacyPreset
from trainer.data.transforms.privacy.rule import FOUND_BY_NONE, NEEDS_PRESIDIO, TYPES, PrivacyFinding
from trainer.data.transforms.privacy.stage import PersonalDataFinder

HERE = Path(__file__).parent


@dataclass
class Quality:
    """Counts by type."""

    gold: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    covered: Counter[str] = field(default_factory=Counter)
    findings: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)

    def recall(self, type_: str) -> float | None:
        return self.found[type_] / self.gold[type_] if self.gold[type_] else None

    def coverage(self, type_: str) -> float | None:
        return self.covered[type_] / self.gold[type_] if self.gold[type_] else None

    def precision(self, type_: str) -> float | None:
        return self.right[type_] / self.findings[type_] if self.findings[type_] else None


def hand_labelled(*sets: str) -> list[Item]:
    """Items of the sets `hand-written` and `held-out`."""
    rows = [json.loads(line) for line in (HERE / "real.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row["text"], [tuple(span) for span in row["spans"]]) for row in rows if row["set"] in sets]


def all_sets() -> list[list[Item]]:
    """Synthetic; the one that rules were corrected on; and the one that was written after the rules."""
    return [synthetic(), hand_labelled("hand-written"), hand_labelled("held-out")]


def finder(engine: str) -> PersonalDataFinder:
    """Every type that the engine looks for, but organisations, which are not labelled."""
    away = FOUND_BY_NONE | (NEEDS_PRESIDIO if engine == "patterns" else {"ORGANISATION"})
    types = [name for name in TYPES if name not in away]
    return PersonalDataFinder(PrivacyConfig(preset=PrivacyPreset.none, types=types, engine=PrivacyEngine(engine)))


def measure(search: PersonalDataFinder, items: list[Item]) -> Quality:
    quality = Quality()
    for text, gold in items:
        found = search.find(text)
        for start, end, type_ in gold:
            quality.gold[type_] += 1
            quality.found[type_] += covers(text, start, end, [f for f in found if f.type == type_])
            quality.covered[type_] += covers(text, start, end, found)
        for f in found:
            quality.findings[f.type] += 1
            quality.right[f.type] += any(t == f.type and f.start < end and start < f.end for start, end, t in gold)
    return quality


def covers(text: str, start: int, end: int, found: list[PrivacyFinding]) -> bool:
    return all(any(f.start <= i < f.end for f in found) for i in range(start, end) if text[i].isalnum())


def misses(search: PersonalDataFinder, items: list[Item]) -> list[str]:
    """One line for each labelled piece that is not found under its type, and each finding that is wrong."""
    out = []
    for text, gold in items:
        found = search.find(text)
        for start, end, type_ in gold:
            if not covers(text, start, end, [f for f in found if f.type == type_]):
                seen = [(f.type, text[f.start : f.end]) for f in found]
                out.append(f"MISSED {type_} {text[start:end]!r} in {text!r}; found {seen}")
        for f in found:
            if not any(t == f.type and f.start < end and start < f.end for start, end, t in gold):
                out.append(f"WRONG {f.type} {text[f.start : f.end]!r} in {text!r}")
    return out


def table(engine: str) -> list[str]:
    """Rows of Markdown: type, then number, recall and precision on each of the sets; and last the sums."""
    search = finder(engine)
    measured = [measure(search, items) for items in all_sets()]
    rows = []
    for type_ in TYPES:
        if any(q.gold[type_] or q.findings[type_] for q in measured):
            cells = [cell for q in measured for cell in (q.gold[type_] or "", q.recall(type_), q.precision(type_))]
            rows.append(_row(type_, cells))
    sums: list[int | float] = []
    for q in measured:
        sums += [q.gold.total(), q.found.total() / q.gold.total(), q.right.total() / q.findings.total()]
    covered: list[int | float | str] = []
    for q in measured:
        covered += ["", q.covered.total() / q.gold.total(), ""]
    return [*rows, _row("all", sums), _row("covered by any type", covered)]


def _row(name: str, cells: Sequence[object]) -> str:
    shown = ["" if c is None else f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells]
    return f"| {name} | {' | '.join(shown)} |"


if __name__ == "__main__":
    if sys.argv[1:2] == ["misses"]:
        for items in all_sets():
            print("\n".join(misses(finder(sys.argv[2]), items)))
    else:
        for engine in ("patterns", "presidio"):
            print(engine, *table(engine), sep="\n")
