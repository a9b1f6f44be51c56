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
    """What one model answered: rows by task, and its metrics."""

    rows: dict[str, list[TaskRow]] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    throughput: dict[str, GenerationThroughput] = field(default_factory=dict)
    """How answers were written, of tasks that need some."""


@dataclass(frozen=True, slots=True)
class EarlierEvaluation:
    """Another evaluation, as it was written down."""

    name: str
    report: dict[str, Any]
    rows: dict[str, list[TaskRow]]
    """By task; none where they are no longer beside the report."""


def rows_hash(rows: Sequence[TaskRow]) -> str:
    """SHA-256 of what was asked: places and references."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.where, row.reference]).encode())
    return digest.hexdigest()


def same_rows(mine: Sequence[TaskRow], theirs: Sequence[TaskRow]) -> bool:
    """Whether two models were asked the same: then they are compared row by row."""
    return [(row.where, row.reference) for row in mine] == [(row.where, row.reference) for row in theirs]


def task_record(task: Task, found: EvaluatedModel, spans: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """What the report says of one task of the model that was evaluated."""
    rows, values, signatures = found.rows[task.name], found.metrics[task.name], task.signatures()
    errors = task.standard_errors(rows)
    metrics, known = {}, task.metrics_for(rows)
    for name, value in values.items():
        metric = next(metric for metric in known if metric.name in (name, name.partition("/")[0]))
        metrics[name] = {"value": value, "greater_is_better": metric.greater_is_better, "says": metric.description}
        if name in spans:
            metrics[name] |= {"low": spans[name][0], "high": spans[name][1]}
        if name in errors:
            metrics[name]["stderr"] = errors[name]
        if metric.name in signatures:
            metrics[name]["signature"] = signatures[metric.name]
    return {
        "kind": task.kind,
        "path": task.data_source,
        "num_rows": len(rows),
        "rows_sha256": rows_hash(rows),
        "seconds": round(found.seconds[task.name], 3),
        **({"written": _throughput_record(found.throughput[task.name])} if task.name in found.throughput else {}),
        "write": asdict(task.config.write),
        "options": task.option_values,
        "metrics": metrics,
        "notes": list(task.notes(rows, spans)),
    }


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


def write_report(to: Path, report: dict[str, Any], found: dict[str, EvaluatedModel]) -> None:
    """Both files into a directory. Errors: StorageError."""
    lines = [
        json_text({"task": task, "arm": arm, **asdict(row)}, ensure_ascii=False)
        for arm, model in found.items()
        for task, rows in model.rows.items()
        for row in rows
    ]
    write_text_atomic(to / ROWS, "".join(f"{line}\n" for line in lines))
    write_text_atomic(to / REPORT, json_text(report, indent=1, ensure_ascii=False) + "\n")


def read_report(path: Path, key: str) -> EarlierEvaluation:
    """A report, with its rows where they lie beside it. Errors: ConfigError where it is none."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(report, dict) and isinstance(report["tasks"], dict) and report["version"] == VERSION
    except OSError as error:
        raise ConfigError(f"{key}={path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, AssertionError):
        raise ConfigError(
            f"{key}={path}: is no report of shardtune evaluate of this version; name the {REPORT} of one"
        ) from None
    rows: dict[str, list[TaskRow]] = {}
    try:
        with (path.parent / ROWS).open(encoding="utf-8") as file:
            for line in file:
                each = json.loads(line)
                if each.pop("arm") == TUNED:
                    rows.setdefault(each.pop("task"), []).append(TaskRow(**each))
    except (OSError, ValueError, KeyError, TypeError):
        rows = {}
    for name, task in report["tasks"].items():  # the rows of another report would pair wrongly
        if name in rows and rows_hash(rows[name]) != task["rows_sha256"]:
            del rows[name]
    return EarlierEvaluation(str(path), report, rows)
