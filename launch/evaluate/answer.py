"""Prints the report of an evaluation."""

from __future__ import annotations

from typing import Any

from launch.output import TableColumn, TableRow, format_table, wrap_text
from trainer.reporting.numbers import format_metric, format_times

COLUMNS = (
    TableColumn("task"),
    TableColumn("metric"),
    TableColumn("value", is_number=True),
    TableColumn("95 % interval", is_number=True),
)
COLUMNS_AGAINST = (
    TableColumn("other", is_number=True),
    TableColumn("difference", is_number=True),
    TableColumn("95 % interval", is_number=True),
    TableColumn("p", is_number=True),
    TableColumn("verdict"),
)
"""What a comparison adds."""


def report_text(report: dict[str, Any]) -> str:
    """An evaluation's report (evaluation.json) as a table of metrics with notes, for people.

    What is read of it: {"model": ..., "method": text, "tasks": {"qa": {"metrics": {"accuracy": {"value": 0.8, ...}}}}}, and after
    a comparison "against": {"what": "base", "tasks": as above}.
    """
    baseline = report.get("against")
    compared_tasks = baseline["tasks"] if baseline else {}
    title = _model_name(report["model"])
    lines = [f"{title}, against {baseline['what']}" if baseline else title]
    rows = []
    for name, task in report["tasks"].items():
        compared_metrics = compared_tasks.get(name, {}).get("metrics", {})
        for metric, estimate in task["metrics"].items():
            cells = [name, metric, _format_number(estimate["value"]), _format_interval(estimate)]
            if baseline:
                cells += _comparison_cells(compared_metrics.get(metric))
            rows.append(TableRow(cells))
    columns = (*COLUMNS, *COLUMNS_AGAINST) if baseline else COLUMNS
    lines += format_table(columns, rows)
    lines += ["", *wrap_text(str(report["method"]))]
    for note in _report_notes(report, compared_tasks):
        lines += wrap_text(note)
    return "\n".join(lines)


def test_text(result: dict[str, Any]) -> str:
    """What was measured on a run's test documents, for people."""
    documents = f"{result['documents']:,} test documents, looked at {format_times(result['looks'])} so far"
    lines = [f"{result['run']}, {result['checkpoint']}: {documents}"]
    metrics = result["metrics"]
    width = max(map(len, metrics))
    lines += [f"  {name:<{width}}  {format_metric(value)}" for name, value in metrics.items()]
    lines.append("Choose nothing by these numbers: compare and select on the evaluation documents.")
    return "\n".join(lines)


def _report_notes(report: dict[str, Any], compared_tasks: dict[str, Any]) -> list[str]:
    """What a reader must know about the numbers, a line each.

    - Differences between the evaluated model and the run that the user has accepted, such as another base.
    - Notes of the tasks.
    - `compared_tasks` (by name, how a task compares with the baseline): how many rows changed, or that rows cannot be paired.
    - Tasks that the baseline, the model compared with, does not have: `report["against"]["not_there"]`.
    """
    notes = [f"accepted: {difference}" for difference in report["model"].get("accepted", ())]
    for name, task in report["tasks"].items():
        notes += [f"{name}: {note}" for note in task.get("notes", ())]
    for name, compared_task in compared_tasks.items():
        notes += _comparison_notes(name, compared_task)
    baseline = report.get("against")
    if baseline and baseline["not_there"]:
        notes.append(f"not in {baseline['what']}: {', '.join(baseline['not_there'])}")
    return notes


def _model_name(model: dict[str, Any]) -> str:
    """The evaluated model in words: its run or path, checkpoint and adapters."""
    name = str(model["run"] or model["path"])
    if model["checkpoint"]:
        name += f", {model['checkpoint']}"
    if model["adapters"]:
        name += f" with {', '.join(model['adapters'])}"
    return name


def _comparison_cells(compared: dict[str, Any] | None) -> list[str]:
    """The table cells of a metric's comparison with another model, for `COLUMNS_AGAINST`; dashes if there is none.

    `compared`: {"value": 0.7, "difference": 0.1, "low": 0.02, "high": 0.18, "p": 0.01, "verdict": "better"}.
    """
    if compared is None:
        return ["-", "-", "", "", ""]
    return [
        _format_number(compared["value"]),
        _format_number(compared["difference"], "+"),
        _format_interval(compared),
        _format_number(compared["p"]),
        compared["verdict"],
    ]


def _comparison_notes(name: str, compared: dict[str, Any]) -> list[str]:
    """A note on the comparison of task `name`: how many rows changed, or that rows could not be paired."""
    if "changed" in compared:
        changed = compared["changed"]
        return [f"{name}: {changed['num_won']} rows right that were wrong, {changed['num_lost']} the other way"]
    if compared["paired"]:
        return []
    return [f"{name}: other rows than then, or rows that are not known: compared as numbers, not row by row"]


def _format_interval(estimate: dict[str, Any]) -> str:
    """The confidence interval of a metric as text; empty if it has none."""
    if "low" not in estimate:
        return ""
    return f"{_format_number(estimate['low'])} to {_format_number(estimate['high'])}"


def _format_number(number: float | None, sign: str = "") -> str:
    return "-" if number is None else f"{number:{sign}.4g}"
