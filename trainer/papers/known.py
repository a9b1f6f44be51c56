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
    def data_size(self) -> str | None:
        """Size of the training data, and how often it was seen; None if the run did not record it."""
        split = (self.run.get("data_report") or {}).get("train") or {}
        tokens = split.get("tokens")
        documents = split.get("documents")
        if not tokens or documents is None:
            return None
        size = f"{tokens:,} tokens in {documents:,} documents"
        if not self.tokens:
            return size
        return f"{size}; {self.tokens:,} tokens seen in training, each {self.tokens / tokens:.3g} times on average"

    @property
    def conflicts(self) -> list[str]:
        """What licences stand against."""
        return told(self.base_licence, self.audit.get("sources") or [], self.answers.get("licence"))

    @property
    def measured(self) -> list[dict[str, Any]]:
        """Every metric of reports on these very weights: the newest value of each, and the newest value of the base."""
        newest: dict[str, dict[str, Any]] = {}
        for report in self.of_these(EVALUATION):
            for row in _rows_of(report.report):
                known = newest.setdefault(row["name"], row)
                # A newer report without the base does not hide what an older one measured of it on the same rows.
                if known["base"] is None and known["rows_sha256"] == row["rows_sha256"]:
                    known |= {"base": row["base"], "change": row["change"]}
        return [*newest.values()]

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


def _rows_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Every metric of one report, with that of the base if the report has it."""
    against = report.get("against") or {}
    base_tasks = (against.get("tasks") or {}) if against.get("what") == "base" else {}
    rows = []
    for task, record in (report.get("tasks") or {}).items():
        base_metrics = (base_tasks.get(task) or {}).get("metrics") or {}
        for metric, values in (record.get("metrics") or {}).items():
            change = base_metrics.get(metric)
            rows.append(
                {
                    **values,
                    "name": f"{task}/{metric}",
                    "kind": record.get("kind"),
                    "rows": record.get("num_rows"),
                    "rows_sha256": record.get("rows_sha256"),
                    "path": record.get("path"),
                    "base": (change or {}).get("value"),
                    "change": change,
                }
            )
    return rows


def gather(run_dir: Path, run: dict[str, Any], answers: dict[str, Any]) -> Known:
    """What is known of a run; the weights and the base's licence are filled in by the export."""
    directory = run.get("data_directory")
    audit = read_json(Path(directory) / "audit.json") if directory else {}
    return Known(run=run, audit=audit, answers=answers, reports=kept(run_dir))
