"""What was found, in numbers and in masked examples: picklable, and added up over blocks and processes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from trainer.data.document import EXAMPLES


@dataclass(slots=True)
class Findings:
    """Personal data seen by the privacy stage. Holds no value that was found, only masks of a few."""

    scanned: Counter[str] = field(default_factory=Counter)
    """Documents looked into, by source."""
    documents: Counter[str] = field(default_factory=Counter)
    """Documents with at least one finding, by source."""
    counts: Counter[str] = field(default_factory=Counter)
    """Findings by type."""
    documents_by_type: Counter[str] = field(default_factory=Counter)
    """Documents with at least one finding of a type."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first few of each type, as `file:line mask`."""

    def add(self, source: str, where: str, seen: list[tuple[str, str]]) -> None:
        """Count one document: (type, mask) of each of its findings."""
        self.scanned[source] += 1
        self.documents[source] += bool(seen)
        self.counts.update(type_ for type_, _ in seen)
        self.documents_by_type.update({type_ for type_, _ in seen})
        for type_, shown in seen:
            kept = self.examples.setdefault(type_, [])
            if len(kept) < EXAMPLES:
                kept.append(f"{where} {shown}")

    def merge(self, other: Findings) -> None:
        """Add a later block's findings."""
        for name in ("scanned", "documents", "counts", "documents_by_type"):
            getattr(self, name).update(getattr(other, name))
        for type_, places in other.examples.items():
            kept = self.examples.setdefault(type_, [])
            kept.extend(places[: EXAMPLES - len(kept)])

    def state(self) -> dict[str, Any]:
        """Everything as plain tables, for a file."""
        return {name: dict(getattr(self, name)) for name in self.__slots__}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Findings:
        """What `state` was taken of."""
        examples = state.pop("examples")
        return cls(**{name: Counter(counts) for name, counts in state.items()}, examples=examples)

    def total(self) -> int:
        """All findings."""
        return sum(self.counts.values())

    def as_dict(self) -> dict[str, Any]:
        """For a report in JSON; types in order of how often they were found."""
        return {
            "documents_scanned": dict(sorted(self.scanned.items())),
            "documents_with_findings": dict(sorted((k, v) for k, v in self.documents.items() if v)),
            "types": {
                type_: {
                    "findings": count,
                    "documents": self.documents_by_type[type_],
                    "examples": self.examples.get(type_, []),
                }
                for type_, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
            },
        }
