"""Prints the report of an evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launch.output import TableColumn, TableRow, format_table, wrap_text
from trainer.reporting.numbers import format_metric, format_times

if TYPE_CHECKING:
    from trainer.evaluation.report.record import DifferenceRecord, EvaluationReport, MetricRecord, TaskComparison

METRIC_COLUMNS = (
    TableColumn("task"),
    TableColumn("metric"),
    TableColumn("value", is_number=True),
    TableColumn("95 % interval", is_number=True),
)
COMPARISON_COLUMNS = (
    TableColumn("other", is_number=True),
    TableColumn("difference", is_number=True),
    TableColumn("95 % interval", is_number=True),
    TableColumn("p", is_number=True),
    TableColumn("verdict"),
)
"""What a comparison adds."""


def report_text(report: EvaluationReport) -> str:
    """Write an evaluation's report (evaluation.json) for people: a table of metrics, the method, and notes.

    What is read of it: {"model": ..., "method": text, "tasks": {"qa": {"metrics": {"accuracy": {"value": 0.8, ...}}}}}, and
    after a comparison "against": {"what": "base", "tasks": {"qa": TaskComparison}, "not_there": [...]}.
    """
    from trainer.evaluation.report.record import model_title

    # What the model was compared with; None without a comparison.
    baseline = report.get("against")
    comparisons: dict[str, TaskComparison] = baseline["tasks"] if baseline else {}
    title = model_title(report["model"])
    lines = [f"{title}, against {baseline['what']}" if baseline else title]
    rows = []
    for name, task in report["tasks"].items():
        comparison = comparisons.get(name)
        differences = {} if comparison is None else comparison["metrics"]
        for metric, estimate in task["metrics"].items():
            cells = [name, metric, _format_number(estimate["value"]), _format_interval(estimate)]
            if baseline:
                cells += _comparison_cells(differences.get(metric))
            rows.append(TableRow(cells))
    columns = (*METRIC_COLUMNS, *COMPARISON_COLUMNS) if baseline else METRIC_COLUMNS
    lines += format_table(columns, rows)
    # How intervals and p-values were computed.
    lines += ["", *wrap_text(str(report["method"]))]
    for note in _report_notes(report, comparisons):
        lines += wrap_text(note)
    return "\n".join(lines)


def test_result_text(result: dict[str, Any]) -> str:
    """Write what was measured on a run's test documents, for people, with how often they were looked at so far.

    `result`: {"run": ..., "checkpoint": ..., "documents": 500, "looks": 2, "metrics": {"test/loss": 1.9, ...}}.
    """
    documents = f"{result['documents']:,} test documents, looked at {format_times(result['looks'])} so far"
    lines = [f"{result['run']}, {result['checkpoint']}: {documents}"]
    metrics = result["metrics"]
    width = max(map(len, metrics))
    lines += [f"  {name:<{width}}  {format_metric(value)}" for name, value in metrics.items()]
    lines.append("Choose nothing by these numbers: compare and select on the evaluation documents.")
    return "\n".join(lines)


def _report_notes(report: EvaluationReport, comparisons: dict[str, TaskComparison]) -> list[str]:
    """Collect what a reader must know about the numbers, a line each.

    - Differences between the evaluated model and the run that the user has accepted, such as another base.
    - Notes of the tasks.
    - Of each task of `comparisons` with the baseline, by name: the notes of `_comparison_notes`.
    - Tasks that the baseline, the model compared with, does not have.
    """
    notes = [f"accepted: {difference}" for difference in report["model"].get("accepted", ())]
    for name, task in report["tasks"].items():
        notes += [f"{name}: {note}" for note in task.get("notes", ())]
    for name, comparison in comparisons.items():
        notes += _comparison_notes(name, comparison)
    baseline = report.get("against")
    tasks_missing_in_baseline = baseline["not_there"] if baseline else []
    if baseline and tasks_missing_in_baseline:
        notes.append(f"not in {baseline['what']}: {', '.join(tasks_missing_in_baseline)}")
    return notes


def _comparison_cells(difference: DifferenceRecord | None) -> list[str]:
    """The cells that a comparison adds to a metric's row of the table (`COMPARISON_COLUMNS`); dashes if it was not compared.

    {"value": 0.7 of the other model, "difference": 0.1, "low": 0.02, "high": 0.18, "p": 0.01, "verdict": "better"} -> ["0.7",
    "+0.1", "0.02 to 0.18", "0.01", "better"].
    """
    if difference is None:
        return ["-", "-", "", "", ""]
    return [
        _format_number(difference["value"]),
        _format_number(difference["difference"], "+"),
        _format_interval(difference),
        _format_number(difference["p"]),
        difference["verdict"],
    ]


def _comparison_notes(name: str, comparison: TaskComparison) -> list[str]:
    """Notes on the comparison of task `name`: that few rows differ, how many changed, or that rows could not be paired."""
    notes = list(comparison.get("notes", ()))
    if "changed" in comparison:
        changed = comparison["changed"]
        notes.append(f"{changed['num_won']} rows right that were wrong, {changed['num_lost']} the other way")
    elif not comparison["paired"]:
        notes.append("other rows than then, or rows that are not known: compared as numbers, not row by row")
    return [f"{name}: {note}" for note in notes]


def _format_interval(estimate: MetricRecord | DifferenceRecord) -> str:
    """The confidence interval of a metric as text; empty if it has none."""
    if "low" not in estimate:
        return ""
    return f"{_format_number(estimate['low'])} to {_format_number(estimate['high'])}"


def _format_number(number: float | None, sign: str = "") -> str:
    return "-" if number is None else f"{number:{sign}.4g}"
