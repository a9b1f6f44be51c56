"""The facts for documents about a model: what its run recorded, what was measured, what the owner answered.

The model card, the papers and the hub's files of evaluation results all read this one model of facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.reporting.documents.compute import TrainingCompute, training_compute
from trainer.reporting.documents.licences import licence_conflicts
from trainer.reporting.documents.questions import QUESTIONS
from trainer.reporting.findings import RecordedFinding, findings_in
from trainer.reporting.numbers import format_times
from trainer.reporting.results import (
    EVALUATION_REPORT,
    REVIEW_REPORT,
    TEST_REPORT,
    KeptReport,
    kept_reports,
)
from trainer.reporting.run_record import RunRecord
from trainer.reporting.status import read_json_or_empty


@dataclass(kw_only=True, slots=True)
class ModelFacts:
    """What is known of the weights that an export is made of."""

    run: RunRecord = field(default_factory=RunRecord)
    """What the run recorded of itself (`run.json`)."""
    config_yaml: str = ""
    """The run's frozen configuration, as YAML."""
    audit: dict[str, Any] = field(default_factory=dict)
    """The audit of the data; empty if it is no longer where the run made it."""
    answers: dict[str, Any] = field(default_factory=dict)
    """The owner's answers, by question."""
    reports: list[KeptReport] = field(default_factory=list)
    """Every report that was kept of the run, the newest first, also those about other weights."""

    step: int = 0
    """Step of the checkpoint that has these weights."""
    metrics_at_step: dict[str, Any] = field(default_factory=dict)
    """Held-out metrics that training measured at that step; empty if it evaluated nothing there."""
    tokens: int = 0
    """Tokens that these weights were trained on, all ranks together."""
    artefact: str | None = None
    """SHA-256 of the checkpoint's manifest; None if no single checkpoint has these weights."""
    are_of_one_checkpoint: bool = True
    """Whether these are weights of a checkpoint, on the base they were trained on. A mean of checkpoints is not."""
    averaged_checkpoints: list[str] = field(default_factory=list)
    """Names of the checkpoints whose mean these weights are."""
    accepted: list[str] = field(default_factory=list)
    """Changes that the export accepted, beside those that the run accepted."""
    gates: dict[str, Any] = field(default_factory=dict)
    """What the run's gates decided for these weights (`Judged.record`); empty if the run has none."""
    benchmarks: dict[str, str] = field(default_factory=dict)
    """Data set of the hub (`<owner>/<name>[/<task there>]`) of each task that was evaluated on a local copy of it."""

    base_licence: str | None = None
    """Licence of the base model, which binds the export too; the export reads it from the base's own card."""
    resize_to: int | None = None
    """Vocabulary size that an adapter's base must be resized to before loading; set by the export."""
    custom_auto_class: str | None = None
    """transformers' class of the model if its Auto classes do not know it; set by the export."""

    def answer(self, question: str) -> str:
        """The owner's answer as text, else the question, marked as open: `*Open:* Who provides the model? (`provider`)`."""
        answer = self.answers.get(question)
        if answer is not None:
            return str(answer).strip()
        return f"*Open:* {QUESTIONS[question]} (`{question}`)"

    @property
    def licence(self) -> str | None:
        """Licence of these weights: the owner's answer, else the base's."""
        return self.answers.get("licence") or self.base_licence

    @property
    def held_out_metrics_before(self) -> dict[str, float]:
        """Held-out metrics before the first step; empty if `held_out_metrics` is, so that nothing stands beside them."""
        return self.run.outcome.before if self.held_out_metrics and self.run.outcome is not None else {}

    @property
    def held_out_metrics(self) -> dict[str, float]:
        """Held-out metrics of the weights that the documents describe, as training measured them: {"eval/loss": 1.9}.

        - Weights that are of no single checkpoint, or a run without a recorded end: empty.
        - Weights of the run's last step: the metrics of the last evaluation.
        - Weights of an earlier step: the metrics of the evaluation at that step; empty if there was none.
        """
        outcome = self.run.outcome
        if outcome is None or not self.are_of_one_checkpoint:
            return {}
        if outcome.progress.get("step") == self.step:
            return outcome.after
        # The row of that evaluation may hold texts and lists too, such as names of metrics that are not finite.
        return {name: value for name, value in self.metrics_at_step.items() if isinstance(value, int | float)}

    @property
    def findings(self) -> list[RecordedFinding]:
        """Problems that the run's detectors found, and that the run has not recovered from."""
        return findings_in(self.run.challenges)

    @property
    def data_counts(self) -> dict[str, dict[str, int]]:
        """What data preparation counted, for the model card: documents, tokens, and rows with each problem, by split.

        {"train": {"documents": 9, "tokens": 800, "too_long": 2}}. From the report of data preparation in `run.json`
        (`data_report`). A split that counted nothing has no entry.
        """
        counts_by_split = {}
        for split, split_report in self.run.data_report.items():
            if not isinstance(split_report, Mapping):  # an entry about all splits
                continue
            split_counts = _split_counts(split_report)
            if split_counts:
                counts_by_split[split] = split_counts
        return counts_by_split

    @property
    def compute(self) -> TrainingCompute:
        """Compute and energy of the training."""
        return training_compute(self.run, self.answers, self.tokens)

    @property
    def data_size(self) -> str | None:
        """Size of the training data, and how often it was seen, as the documents say it; None if the run did not record it.

        Such as "9,000 tokens in 120 documents; 27,000 tokens seen in training, each 3 times on average".
        """
        split = self.run.data_report.get("train") or {}
        tokens = split.get("tokens")
        documents = split.get("documents")
        if not tokens or documents is None:
            return None
        size = f"{tokens:,} tokens in {documents:,} documents"
        if not self.tokens:
            return size
        return f"{size}; {self.tokens:,} tokens seen in training, each {self.tokens / tokens:.3g} times on average"

    @property
    def licence_conflicts(self) -> list[str]:
        """What the stated licences say against giving these weights away, one line each."""
        return licence_conflicts(self.base_licence, self.audit.get("sources") or [], self.answers.get("licence"))

    @property
    def measured_metrics(self) -> list[dict[str, Any]]:
        """Every metric that `shardtune evaluate` measured of these very weights, for the documents.

        Such as {"name": "qa/accuracy", "value": 0.7, "base": 0.6}. `value` is from the newest report. `base` is the value of
        the base model on the same rows, from the newest report that has it; None if none has.
        """
        newest_by_name: dict[str, dict[str, Any]] = {}
        for report in self.reports_of_kind(EVALUATION_REPORT):
            for metric in _report_metrics(report.report):
                newest_metric = newest_by_name.setdefault(metric["name"], metric)  # reports come newest first
                # A newer report without the base does not hide what an older one measured of it on the same rows.
                if newest_metric["base"] is None and newest_metric["rows_sha256"] == metric["rows_sha256"]:
                    newest_metric |= {"base": metric["base"], "change": metric["change"]}
        return [*newest_by_name.values()]

    @property
    def review(self) -> dict[str, Any] | None:
        """The newest review of these weights by people."""
        reviews = self.reports_of_kind(REVIEW_REPORT)
        return reviews[0].report if reviews else None

    @property
    def test(self) -> KeptReport | None:
        """The newest report on the run's test documents with these weights; None if there is none."""
        test_reports = self.reports_of_kind(TEST_REPORT)
        return test_reports[0] if test_reports else None

    @property
    def test_looks_text(self) -> str:
        """How often the run's test documents were looked at, with any weights: `once`, `3 times`."""
        return format_times(sum(report.kind == TEST_REPORT for report in self.reports))

    @property
    def num_reports_on_other_weights(self) -> int:
        """Number of the run's evaluation reports and reviews that are about other weights than these."""
        num_reports = sum(report.kind != TEST_REPORT for report in self.reports)
        num_on_these_weights = sum(report.kind != TEST_REPORT for report in self._reports_on_these_weights())
        return num_reports - num_on_these_weights

    def reports_of_kind(self, kind: str) -> list[KeptReport]:
        """Reports of one kind (`evaluation` or `review`) on these very weights, the newest first."""
        return [report for report in self._reports_on_these_weights() if report.kind == kind]

    def _reports_on_these_weights(self) -> list[KeptReport]:
        """Reports whose weights have the same hash; none if these are of no single checkpoint."""
        if self.artefact is None:
            return []
        return [report for report in self.reports if report.artefact == self.artefact]


def _split_counts(split_report: Mapping[str, Any]) -> dict[str, int]:
    """Flatten the data report of a split into counts: its sizes, then how many rows had each problem, if any had.

    {"documents": 9, "tokens": 800, "too_long": {"count": 2}} gives {"documents": 9, "tokens": 800, "too_long": 2}.
    """
    counts = {}
    for name in ("documents", "tokens", "supervised_tokens"):
        if name in split_report:
            counts[name] = split_report[name]
    for name, problem in split_report.items():
        if isinstance(problem, Mapping) and problem.get("count"):
            counts[name] = problem["count"]
    return counts


def _report_metrics(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Flatten an evaluation report into one dictionary a metric, with the base model's value beside it if the report has it.

    A report looks like {"tasks": {"qa": {"num_rows": 200, "metrics": {"accuracy": {"value": 0.7}}}}, "against": {"what":
    "base", "tasks": {"qa": {"metrics": {"accuracy": {"value": 0.6}}}}}}, and its metric here is `qa/accuracy`. `change` is
    the record of the comparison with the base, and `base` the base's value; both are None without one.
    """
    comparison = report.get("against") or {}
    base_record_by_task: dict[str, Any] = {}
    if comparison.get("what") == "base":  # it may be a comparison with another model
        base_record_by_task = comparison.get("tasks") or {}
    metrics = []
    for task, record in (report.get("tasks") or {}).items():
        base_metrics = (base_record_by_task.get(task) or {}).get("metrics") or {}
        for name, metric in (record.get("metrics") or {}).items():
            comparison_with_base = base_metrics.get(name)
            metrics.append(
                {
                    **metric,
                    "name": f"{task}/{name}",
                    "kind": record.get("kind"),
                    "rows": record.get("num_rows"),
                    "rows_sha256": record.get("rows_sha256"),
                    "path": record.get("path"),
                    "base": (comparison_with_base or {}).get("value"),
                    "change": comparison_with_base,
                }
            )
    return metrics


def read_model_card_facts(run_dir: Path, run: RunRecord, answers: dict[str, Any]) -> ModelFacts:
    """Gather what a run knows of itself, for the model card and the papers of an export. The caller adds facts about the weights.

    Read from the run's directory and that of its data. `run`: its record (`run.json`). `answers`: what the owner answered, by
    question, such as {"licence": "apache-2.0"}.
    """
    facts = ModelFacts(run=run, answers=answers, reports=kept_reports(run_dir))
    config_file = run_dir / "config.yaml"
    if config_file.exists():
        facts.config_yaml = config_file.read_text(encoding="utf-8")
    if run.data_directory:
        facts.audit = read_json_or_empty(Path(run.data_directory) / "audit.json")
    return facts
