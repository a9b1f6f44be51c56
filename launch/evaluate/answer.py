"""Prints the report of an evaluation."""

from __future__ import annotations

from typing import Any

from launch.output import Column, TableRow, fold, table

COLUMNS = (
    Column("task"),
    Column("metric"),
    Column("value", is_number=True),
    Column("95 % interval", is_number=True),
)
COLUMNS_AGAINST = (
    Column("other", is_number=True),
    Column("difference", is_number=True),
    Column("95 % interval", is_number=True),
    Column("p", is_number=True),
    Column("verdict"),
)
"""What a comparison adds."""


def text(report: dict[str, Any]) -> str:
    """The table of metrics, and what is to know of each task."""
    against = report.get("against")
    compared_tasks = against["tasks"] if against else {}
    head = _model_name(report["model"])
    lines = [f"{head}, against {against['what']}" if against else head]
    rows = []
    for name, task in report["tasks"].items():
        compared_metrics = compared_tasks.get(name, {}).get("metrics", {})
        for metric, estimate in task["metrics"].items():
            cells = [name, metric, _number(estimate["value"]), _interval(estimate)]
            cells += _comparison_cells(compared_metrics.get(metric)) if against else []
            rows.append(TableRow(cells))
    lines += table((*COLUMNS, *COLUMNS_AGAINST) if against else COLUMNS, rows)
    lines += ["", *fold(str(report["method"]))]
    for note in _notes(report, compared_tasks):
        lines += fold(note)
    return "\n".join(lines)


def _notes(report: dict[str, Any], compared_tasks: dict[str, Any]) -> list[str]:
    """What a reader must know of the numbers: accepted differences, notes of tasks, and what a comparison lacks."""
    notes = [f"accepted: {line}" for line in report["model"].get("accepted", ())]
    for name, task in report["tasks"].items():
        notes += [f"{name}: {note}" for note in task.get("notes", ())]
    for name, compared in compared_tasks.items():
        notes += _comparison_notes(name, compared)
    against = report.get("against")
    if against and against["not_there"]:
        notes.append(f"not in {against['what']}: {', '.join(against['not_there'])}")
    return notes


def _model_name(model: dict[str, Any]) -> str:
    name = str(model["run"] or model["path"])
    name += f", {model['checkpoint']}" if model["checkpoint"] else ""
    return name + (f" with {', '.join(model['adapters'])}" if model["adapters"] else "")


def _comparison_cells(compared: dict[str, Any] | None) -> list[str]:
    """The table cells of a metric's comparison with another model; dashes if there is none."""
    if compared is None:
        return ["-", "-", "", "", ""]
    return [
        _number(compared["value"]),
        _number(compared["difference"], "+"),
        _interval(compared),
        _number(compared["p"]),
        compared["verdict"],
    ]


def _comparison_notes(name: str, compared: dict[str, Any]) -> list[str]:
    if "changed" in compared:
        changed = compared["changed"]
        return [f"{name}: {changed['num_won']} rows right that were wrong, {changed['num_lost']} the other way"]
    if compared["paired"]:
        return []
    return [f"{name}: other rows than then, or rows that are not known: compared as numbers, not row by row"]


def _interval(estimate: dict[str, Any]) -> str:
    return f"{_number(estimate['low'])} to {_number(estimate['high'])}" if "low" in estimate else ""


def _number(number: float | None, sign: str = "") -> str:
    return "-" if number is None else f"{number:{sign}.4g}"
