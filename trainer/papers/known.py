"""Everything a paper may say of some weights: what their run recorded, what was measured of them, what the owner answered."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.papers.compute import Compute, compute
from trainer.papers.licences import told
from trainer.papers.questions import QUESTIONS
from trainer.records.results import EVALUATION, REVIEW, KeptReport, kept, read_json


@dataclass(kw_only=True, slots=True)
class Known:
    """What papers are written from."""

    run: dict[str, Any]
    """`run.json`."""
    audit: dict[str, Any] = field(default_factory=dict)
    """The audit of the data; empty where it is no longer there."""
    answers: dict[str, Any] = field(default_factory=dict)
    base_licence: str | None = None
    step: int | None = None
    tokens: int | None = None
    artefact: str | None = None
    """SHA-256 of the weights' checkpoint."""
    reports: list[KeptReport] = field(default_factory=list)
    """All that were kept of the run, the newest first."""

    def answer(self, question: str) -> str:
        """The owner's answer, or the question as open."""
        if (said := self.answers.get(question)) is not None:
            return str(said).strip()
        return f"*Open:* {QUESTIONS[question]} (`{question}`)"

    @property
    def compute(self) -> Compute:
        """What the training took."""
        return compute(self.run, self.answers, self.tokens)

    @property
    def conflicts(self) -> list[str]:
        """What licences stand against."""
        return told(self.base_licence, self.audit.get("sources") or [], self.answers.get("licence"))

    @property
    def measured(self) -> list[dict[str, Any]]:
        """Every metric of reports on these very weights, the newest of each."""
        found: dict[str, dict[str, Any]] = {}
        for report in self.of_these(EVALUATION):
            apart = ((report.report.get("against") or {}).get("tasks")) or {}
            base = (report.report.get("against") or {}).get("what") == "base"
            for task, said in (report.report.get("tasks") or {}).items():
                for metric, each in (said.get("metrics") or {}).items():
                    change = ((apart.get(task) or {}).get("metrics") or {}).get(metric) if base else None
                    row = {
                        **each,
                        "name": f"{task}/{metric}",
                        "kind": said.get("kind"),
                        "rows": said.get("num_rows"),
                        "path": said.get("path"),
                    }
                    found.setdefault(row["name"], {**row, "base": (change or {}).get("value"), "change": change})
        return [*found.values()]

    @property
    def review(self) -> dict[str, Any] | None:
        """The newest review of these weights by people."""
        return next((each.report for each in self.of_these(REVIEW)), None)

    @property
    def elsewhere(self) -> int:
        """Reports of the run that are about other weights, and say nothing here."""
        return sum(each.artefact != self.artefact or self.artefact is None for each in self.reports)

    def of_these(self, kind: str) -> list[KeptReport]:
        """Reports on these very weights."""
        return [r for r in self.reports if r.kind == kind and self.artefact is not None and r.artefact == self.artefact]


def gather(run_dir: Path, run: dict[str, Any], answers: dict[str, Any]) -> Known:
    """What is known of a run; the weights and the base's licence are filled in by the export."""
    directory = run.get("data_directory")
    audit = read_json(Path(directory) / "audit.json") if directory else {}
    return Known(run=run, audit=audit, answers=answers, reports=kept(run_dir))
