"""`evaluation.json` and `evaluation_rows.jsonl`: the results of an evaluation, with which a later one is compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from strategies.errors import ConfigError
from trainer.evaluation.tasks.base import Task, TaskRow
from trainer.reporting.jsonl import json_text
from trainer.reporting.status import write_text_atomic

if TYPE_CHECKING:
    from trainer.evaluation.generate import GenerationThroughput

REPORT_FILE = "evaluation.json"
ROWS_FILE = "evaluation_rows.jsonl"
PAGE_FILE = "evaluation.html"
REPORT_VERSION = 1
TUNED, BASE = "tuned", "base"

EvaluationReport = dict[str, Any]
"""The content of `evaluation.json`: "model", "tasks" ({name: TaskRecord}), "method", versions.

After a comparison also "against": {"what": "base", "tasks": {name: TaskComparison}, "not_there": tasks that only this model
has}.
"""


class MetricRecord(TypedDict):
    """One metric of a task in `evaluation.json`."""

    value: float
    greater_is_better: bool | None
    """None: neither direction is better."""
    says: str
    """What the metric means."""
    low: NotRequired[float]
    """Lower end of the 95 % interval; `high` is the upper one."""
    high: NotRequired[float]
    stderr: NotRequired[float]
    signature: NotRequired[str]
    """What besides the rows decides the number, such as the prompt."""


class DifferenceRecord(TypedDict):
    """One metric of a comparison in `evaluation.json`: the fields of `intervals.MetricDifference`."""

    value: float
    """The metric of the OTHER model."""
    difference: float
    """The metric of this model minus that of the other; (low, high) is its 95 % interval."""
    low: float
    high: float
    p: float | None
    verdict: str


class TaskRecord(TypedDict):
    """One task in `evaluation.json`."""

    kind: str
    path: str | None
    num_rows: int
    rows_sha256: str
    seconds: float
    written: NotRequired[dict[str, Any]]
    """How fast answers were generated."""
    write: dict[str, Any]
    options: dict[str, Any]
    metrics: dict[str, MetricRecord]
    notes: list[str]


class TaskComparison(TypedDict):
    """One task in the comparison of `evaluation.json` with another model."""

    paired: bool
    """Whether both models answered the same rows, so that they were compared row by row."""
    metrics: dict[str, DifferenceRecord]
    changed: NotRequired[dict[str, Any]]
    """Rows that one model has right and the other wrong (`comparison.changed_rows`)."""
    notes: NotRequired[list[str]]
    """A sentence on metrics in which the models differ in few rows."""


@dataclass(slots=True)
class EvaluatedModel:
    """What one model answered in all tasks, and its metrics. Each dictionary is by name of the task."""

    rows: dict[str, list[TaskRow]] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    throughput: dict[str, GenerationThroughput] = field(default_factory=dict)
    """How fast answers were generated, for tasks that generate some."""


@dataclass(frozen=True, slots=True)
class EarlierEvaluation:
    """Another evaluation, read from its files."""

    name: str
    report: dict[str, Any]
    rows: dict[str, list[TaskRow]]
    """By task; empty if they are no longer next to the report."""


def rows_sha256(rows: Sequence[TaskRow]) -> str:
    """A hash of what a task asked: `file:line` and reference of each row.

    Two reports with the same one can be compared by rows.
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.where, row.reference]).encode())
    return digest.hexdigest()


def asked_the_same_rows(rows: Sequence[TaskRow], other_rows: Sequence[TaskRow]) -> bool:
    """Whether two models were asked the same, so that they can be compared row by row."""
    asked = [(row.where, row.reference) for row in rows]
    other_asked = [(row.where, row.reference) for row in other_rows]
    return asked == other_asked


def build_task_record(task: Task, model: EvaluatedModel, intervals: dict[str, tuple[float, float]]) -> TaskRecord:
    """Build what `evaluation.json` says of one task: kind, rows, settings, metrics, notes.

    `model`: the evaluated model, with its answers. `intervals`: the 95 % interval (low, high) of each metric by name.
    """
    rows = model.rows[task.name]
    # Left out for tasks that generate no answers.
    generation_throughput: Any = {}
    if task.name in model.throughput:
        generation_throughput = {"written": _throughput_record(model.throughput[task.name])}
    return {
        "kind": task.kind,
        "path": task.data_source,
        "num_rows": len(rows),
        "rows_sha256": rows_sha256(rows),
        "seconds": round(model.seconds[task.name], 3),
        **generation_throughput,
        "write": asdict(task.config.write),
        "options": task.option_values,
        "metrics": _metric_records(task, rows, model.metrics[task.name], intervals),
        "notes": list(task.notes(rows, intervals)),
    }


def _metric_records(
    task: Task, rows: Sequence[TaskRow], value_by_metric: dict[str, float], intervals: dict[str, tuple[float, float]]
) -> dict[str, MetricRecord]:
    """Build what `evaluation.json` says of each metric of a task: value, interval, and what decides the number.

    `value_by_metric`: the metrics by name; a name may end in `/SOURCE`, for one source of the rows. {"accuracy": 0.8} ->
    {"accuracy": {"value": 0.8, "greater_is_better": true, "says": "share of ...", "low": 0.7, "high": 0.88}}, with `stderr`
    and `signature` if there are any.
    """
    # By metric: prompt, library versions and the like, which must be equal in a comparison.
    signatures = task.signatures()
    standard_errors = task.standard_errors(rows)
    # Reversed, so that of two metrics with the same name the first one is taken.
    metric_by_name = {metric.name: metric for metric in reversed(task.metrics_for(rows))}
    records = {}
    for name, value in value_by_metric.items():
        metric = metric_by_name.get(name) or metric_by_name[name.partition("/")[0]]
        record: MetricRecord = {
            "value": value,
            "greater_is_better": metric.greater_is_better,
            "says": metric.description,
        }
        if name in intervals:
            record["low"], record["high"] = intervals[name]
        if name in standard_errors:
            record["stderr"] = standard_errors[name]
        if metric.name in signatures:
            record["signature"] = signatures[metric.name]
        records[name] = record
    return records


def model_title(model: dict[str, Any]) -> str:
    """What an evaluated model is called in titles: "runs/a, step-000100 with adapters/b". `model`: the report's "model"."""
    title = str(model["run"] or model["path"])
    if model["checkpoint"]:
        title += f", {model['checkpoint']}"
    if model["adapters"]:
        title += f" with {', '.join(model['adapters'])}"
    return title


def _throughput_record(throughput: GenerationThroughput) -> dict[str, Any]:
    """The speed of generation as `evaluation.json` has it, under keys that stay as they are for older reports."""
    gathering = throughput.gathering
    return {
        "tokens": throughput.tokens,
        "seconds": throughput.seconds,
        "gathering": {
            "sharded": gathering.sharded,
            "whole": gathering.gathered_once,
            "says": gathering.description,
        },
    }


def write_report(directory: Path, report: dict[str, Any], models: dict[str, EvaluatedModel]) -> None:
    """Write the report of an evaluation into a directory: `evaluation.json`, and `evaluation_rows.jsonl` with all answers.

    `models`: the evaluated models by arm, "tuned" or "base". Raises StorageError if a file cannot be written.
    """
    lines = []
    for arm, model in models.items():
        for task, rows in model.rows.items():
            for row in rows:
                lines.append(json_text({"task": task, "arm": arm, **asdict(row)}, ensure_ascii=False))
    # The rows come first: a report without its rows could not be compared row by row.
    write_text_atomic(directory / ROWS_FILE, "".join(f"{line}\n" for line in lines))
    write_text_atomic(directory / REPORT_FILE, json_text(report, indent=1, ensure_ascii=False) + "\n")


def read_report(path: Path) -> EarlierEvaluation:
    """Read an earlier evaluation for a comparison: its `evaluation.json` (`path`), and the answers from the file next to it.

    The answers are left out if that file is missing, or if their hash differs from the report's, because they are another
    report's. Raises ConfigError if `path` cannot be read or is no report of this version.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"against={path}: cannot be read ({error.strerror})") from error
    except ValueError:
        report = None
    is_report = isinstance(report, dict) and isinstance(report.get("tasks"), dict)
    if not is_report or report.get("version") != REPORT_VERSION:
        raise ConfigError(
            f"against={path}: is no report of shardtune evaluate of this version; name the {REPORT_FILE} of one"
        )
    rows_by_task = _read_tuned_rows(path.parent / ROWS_FILE)
    for name, task in report["tasks"].items():
        # The rows are of another report, which was written into the same directory.
        if name in rows_by_task and rows_sha256(rows_by_task[name]) != task["rows_sha256"]:
            del rows_by_task[name]
    return EarlierEvaluation(str(path), report, rows_by_task)


def _read_tuned_rows(path: Path) -> dict[str, list[TaskRow]]:
    """Read the answers of the tuned model by task, from `evaluation_rows.jsonl`; {} if the file is missing or cannot be read.

    The file also has those of the base, if it was asked.
    """
    rows: dict[str, list[TaskRow]] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                fields = json.loads(line)
                if fields.pop("arm") == TUNED:
                    rows.setdefault(fields.pop("task"), []).append(TaskRow(**fields))
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return rows
