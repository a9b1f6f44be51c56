"""`evaluation.json` and `evaluation_rows.jsonl`: the results of an evaluation, with which a later one is compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError
from trainer.evaluation.tasks.base import Task, TaskRow
from trainer.reporting.jsonl import json_text
from trainer.reporting.status import write_text_atomic

if TYPE_CHECKING:
    from trainer.evaluation.generate import GenerationThroughput

REPORT, ROWS, PAGE = "evaluation.json", "evaluation_rows.jsonl", "evaluation.html"
VERSION = 1
TUNED, BASE = "tuned", "base"


@dataclass(slots=True)
class EvaluatedModel:
    """The answers of one model to all tasks. Each dictionary is by name of the task."""

    rows: dict[str, list[TaskRow]] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    throughput: dict[str, GenerationThroughput] = field(default_factory=dict)
    """How fast answers were written, for tasks that have the model write."""


@dataclass(frozen=True, slots=True)
class EarlierEvaluation:
    """Another evaluation, read from its files."""

    name: str
    report: dict[str, Any]
    rows: dict[str, list[TaskRow]]
    """By task; empty if they are no longer next to the report."""


def rows_hash(rows: Sequence[TaskRow]) -> str:
    """SHA-256 of what was asked: `file:line` of each row and its reference. Equal hashes mean that rows can be compared."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.where, row.reference]).encode())
    return digest.hexdigest()


def same_rows(rows: Sequence[TaskRow], other_rows: Sequence[TaskRow]) -> bool:
    """Whether two models were asked the same, so that they can be compared row by row."""
    asked = [(row.where, row.reference) for row in rows]
    other_asked = [(row.where, row.reference) for row in other_rows]
    return asked == other_asked


def task_record(task: Task, model: EvaluatedModel, intervals: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """What `evaluation.json` says of one task; `intervals` are the 95 % intervals by metric."""
    rows = model.rows[task.name]
    record: dict[str, Any] = {
        "kind": task.kind,
        "path": task.data_source,
        "num_rows": len(rows),
        "rows_sha256": rows_hash(rows),
        "seconds": round(model.seconds[task.name], 3),
    }
    if task.name in model.throughput:
        record["written"] = _throughput_record(model.throughput[task.name])
    return record | {
        "write": asdict(task.config.write),
        "options": task.option_values,
        "metrics": _metric_records(task, rows, model.metrics[task.name], intervals),
        "notes": list(task.notes(rows, intervals)),
    }


def _metric_records(
    task: Task, rows: Sequence[TaskRow], values: dict[str, float], intervals: dict[str, tuple[float, float]]
) -> dict[str, dict[str, Any]]:
    """What `evaluation.json` says of each metric of a task, by name: value, interval, and what decides the number.

    `values`: the metrics by name; a name may end in `/SOURCE`. {"accuracy": 0.8} -> {"accuracy": {"value": 0.8,
    "greater_is_better": true, "says": "share of ...", "low": 0.7, "high": 0.88}}, with `stderr` and `signature` if there are any.
    """
    signatures = task.signatures()
    standard_errors = task.standard_errors(rows)
    # Reversed, so that of two metrics with one name the first one stays.
    known_metrics = {metric.name: metric for metric in reversed(task.metrics_for(rows))}
    records = {}
    for name, value in values.items():
        metric = known_metrics.get(name) or known_metrics[name.partition("/")[0]]
        record = {"value": value, "greater_is_better": metric.greater_is_better, "says": metric.description}
        if name in intervals:
            record["low"], record["high"] = intervals[name]
        if name in standard_errors:
            record["stderr"] = standard_errors[name]
        if metric.name in signatures:
            record["signature"] = signatures[metric.name]
        records[name] = record
    return records


def _throughput_record(throughput: GenerationThroughput) -> dict[str, Any]:
    """How answers were written, under the keys that reports have had from the first version on."""
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
    """Write `evaluation.json` and `evaluation_rows.jsonl` into a directory. Errors: StorageError.

    `models`: the evaluated models by arm (tuned or base).
    """
    lines = []
    for arm, model in models.items():
        for task, rows in model.rows.items():
            for row in rows:
                lines.append(json_text({"task": task, "arm": arm, **asdict(row)}, ensure_ascii=False))
    # The rows come first: a report without its rows could not be compared row by row.
    write_text_atomic(directory / ROWS, "".join(f"{line}\n" for line in lines))
    write_text_atomic(directory / REPORT, json_text(report, indent=1, ensure_ascii=False) + "\n")


def read_report(path: Path, key: str) -> EarlierEvaluation:
    """An earlier evaluation: `path` is its `evaluation.json`, and its rows are read if they are next to it.

    `key`: the setting that names the file. Errors: ConfigError if it is no report of this version.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(report, dict) and isinstance(report["tasks"], dict) and report["version"] == VERSION
    except OSError as error:
        raise ConfigError(f"{key}={path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, AssertionError):
        raise ConfigError(
            f"{key}={path}: is no report of shardtune evaluate of this version; name the {REPORT} of one"
        ) from None
    rows = _read_rows(path.parent / ROWS)
    for name, task in report["tasks"].items():
        # The directory may hold the rows of another report, which must not be paired with this one's.
        if name in rows and rows_hash(rows[name]) != task["rows_sha256"]:
            del rows[name]
    return EarlierEvaluation(str(path), report, rows)


def _read_rows(path: Path) -> dict[str, list[TaskRow]]:
    """The rows of the tuned model by task; none if the file is missing or cannot be read."""
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
