"""Results measured after a run's training, kept with the run: evaluation reports and reviews by people.

Every report is also kept in `reports/` of the run directory, so that a later one does not replace it. Each names its
weights, by the hash of the checkpoint's manifest.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.reporting.jsonl import json_text
from trainer.reporting.metric_rows import METRICS_FILE, read_rows
from trainer.reporting.status import read_json_or_empty, write_text_atomic

REPORTS_DIR_NAME = "reports"
EVALUATION_REPORT = "evaluation"
REVIEW_REPORT = "review"
TEST_REPORT = "test"
"""The kind of a report about the test documents."""
LAST_HELD_OUT = "held-out-last.json"
"""Sums of the last evaluation by micro-batch, in the run directory: two runs are compared by them in pairs."""


@dataclass(frozen=True, slots=True)
class KeptReport:
    """One report that `keep_report` wrote, read from `reports/` of a run."""

    kind: str
    """`evaluation`, `review` or `test`."""
    path: Path
    report: dict[str, Any]
    """Content of the file, such as {"time": 1.7e9, "model": {"artefact": ..., "checkpoint": ...}, "tasks": {...}}."""

    @property
    def time(self) -> float:
        """When the report was written, in seconds since 1970; 0 if it does not say."""
        return float(self.report.get("time") or 0)

    @property
    def artefact(self) -> str | None:
        """SHA-256 of the manifest of the checkpoint that the report is about; None if it names none."""
        sha256 = (self.report.get("model") or {}).get("artefact")
        return str(sha256) if sha256 else None

    @property
    def checkpoint(self) -> str:
        """The name of the checkpoint that the report is about, else `other weights`."""
        return str((self.report.get("model") or {}).get("checkpoint") or "other weights")


def keep_report(run_dir: Path, kind: str, report: dict[str, Any]) -> Path:
    """Keep a report about a run's model in `reports/`, beside the earlier ones, for its pages and documents; returns the file.

    Raises StorageError. `kind`: `evaluation`, `review` or `test`.
    """
    text = json_text(report, indent=1, ensure_ascii=False) + "\n"
    timestamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(report.get("time")))
    # Two reports of one second have different hashes, and the same report written twice has one file.
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    path = run_dir / REPORTS_DIR_NAME / f"{kind}-{timestamp}-{digest}.json"
    write_text_atomic(path, text)
    return path


def kept_reports(run_dir: Path, kind: str | None = None) -> list[KeptReport]:
    """Read the reports that were kept of a run (evaluations, reviews by people, test results), the newest first.

    `kind`: only those of this kind (`evaluation`, `review` or `test`); None for all. The name of a file begins with its kind. A
    file that cannot be read is passed over.
    """
    reports = []
    for path in sorted((run_dir / REPORTS_DIR_NAME).glob("*.json")):
        kind_of_file = path.name.partition("-")[0]
        if kind_of_file not in (EVALUATION_REPORT, REVIEW_REPORT, TEST_REPORT) or kind not in (None, kind_of_file):
            continue
        report = read_json_or_empty(path)
        if report:
            reports.append(KeptReport(kind=kind_of_file, path=path, report=report))
    return sorted(reports, key=lambda kept_report: kept_report.time, reverse=True)


def held_out_metrics_at_step(run_dir: Path, step: int) -> dict[str, Any]:
    """Look up what training itself measured on held-out data at a step: {"eval/loss": 2.1}; empty if it evaluated nothing there.

    Read from `metrics.jsonl` in the run's directory.
    """
    metrics: dict[str, Any] = {}
    for row in read_metric_rows(run_dir):
        if row.get("step") == step:
            metrics |= {name: value for name, value in row.items() if name.startswith("eval/")}
    return metrics


def read_metric_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl` that can be read, the oldest first; empty if there is no such file."""
    try:
        return read_rows(run_dir / METRICS_FILE).rows
    except OSError:
        return []


def add_to_run_record(run_dir: Path, key: str, value: Any) -> None:
    """Write a value under a key of the run's `run.json`, if there is a readable one. Errors: StorageError."""
    path = run_dir / "run.json"
    record = read_json_or_empty(path)
    if record:
        record[key] = value
        write_text_atomic(path, json_text(record, indent=1, default=str))
