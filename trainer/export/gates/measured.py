"""Finds the measurement that a gate names: metrics of training's evaluations, of evaluation reports, of reviews.

A gate may name a report's metric by `TASK/METRIC` (`eval/` before it or not), by one name if task and metric are
called alike, by `KIND/METRIC`, by `METRIC`, or by a task or kind, which stands for its first metric. The first of
these forms that matches anything counts, with everything that it matches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.reporting.results import EVALUATION, REVIEW, KeptReport, at_step, kept_reports, rows

FORGETTING = "forgetting"
GENERAL_TASK_PREFIXES = (FORGETTING, "general")
"""A task whose name begins with one of these measures what the base model knew."""
NAME_FORMS = 5
"""Number of forms in which a gate can name a metric, as above."""


@dataclass(frozen=True, slots=True)
class MeasuredMetric:
    """One number of some weights."""

    names: tuple[str, ...]
    """Its name in each of the forms; empty if it has none in a form."""
    value: float
    where: str
    """Where it was measured, in words."""
    of_these_weights: bool
    """Whether it was measured of the weights that are to be exported."""
    low: float | None = None
    high: float | None = None

    @property
    def name(self) -> str:
        """The name that it is listed by."""
        return self.names[0]


def measured_metrics(run_dir: Path, step: int | None, artefact: str | None) -> list[MeasuredMetric]:
    """All metrics that a run has measured, the newest first.

    `of_these_weights` is set for those of the weights at `step`, whose hash is `artefact`.
    """
    metrics: list[MeasuredMetric] = []
    for report in kept_reports(run_dir):
        of_these_weights = artefact is not None and report.artefact == artefact
        read_metrics = {EVALUATION: _of_evaluation, REVIEW: _of_review}[report.kind]
        metrics += read_metrics(report, of_these_weights)
    evaluated_steps = []
    for row in rows(run_dir):
        if any(name.startswith("eval/") for name in row):
            evaluated_steps.append(row["step"])
    # The asked step first, then the others from the newest.
    for evaluated in dict.fromkeys([step, *reversed(evaluated_steps)]):
        if evaluated is None:
            continue
        for name, value in at_step(run_dir, evaluated).items():
            if not isinstance(value, int | float):
                continue
            short_name = name.removeprefix("eval/")
            # Training's evaluations know neither tasks nor kinds: the first form is the whole name, the fourth its last part.
            names = (short_name, "", "", short_name.rpartition("/")[2], "")
            where = f"training's evaluation at step {evaluated}"
            metrics.append(MeasuredMetric(names, float(value), where, evaluated == step))
    return metrics


def matching_metrics(gate: str, metrics: list[MeasuredMetric]) -> list[MeasuredMetric]:
    """Everything that a gate means, the newest of each."""
    name = gate.removeprefix("eval/") or gate
    for form in range(NAME_FORMS):
        newest: dict[str, MeasuredMetric] = {}
        for metric in metrics:
            if metric.names[form] == name:
                newest.setdefault(metric.name, metric)
        if newest:
            return [*newest.values()]
    return []


def _of_evaluation(kept_report: KeptReport, of_these_weights: bool) -> Iterator[MeasuredMetric]:
    """The metrics of an evaluation's report, and how much was forgotten if it was compared with the base."""
    report = kept_report.report
    against = report.get("against") or {}
    for task, task_report in (report.get("tasks") or {}).items():
        kind = str(task_report.get("kind"))
        for number, (metric, entry) in enumerate((task_report.get("metrics") or {}).items()):
            common_name = metric if task == metric else ""
            # The first metric of a task can be named by the task or the kind alone.
            for task_or_kind in (task, kind) if number == 0 else ("",):
                names = (f"{task}/{metric}", common_name, f"{kind}/{metric}", metric, task_or_kind)
                yield _measured(kept_report, names, entry, of_these_weights)
        if against.get("what") == "base" and task.startswith(GENERAL_TASK_PREFIXES):
            comparison = (against.get("tasks") or {}).get(task) or {}
            forgotten = _forgotten(task_report, comparison)
            if forgotten:
                names = (f"{task}/{FORGETTING}", "", "", FORGETTING, "")
                yield _measured(kept_report, names, forgotten, of_these_weights)


def _forgotten(task_report: dict[str, Any], comparison: dict[str, Any]) -> dict[str, Any]:
    """How much worse the first metric is than the base's, as a share of the base's value; empty if that is unknown."""
    metric = next(iter(task_report.get("metrics") or {}), None)
    if metric is None:
        return {}
    difference = (comparison.get("metrics") or {}).get(metric)
    if not difference or not difference.get("value"):
        return {}
    greater_is_better = task_report["metrics"][metric].get("greater_is_better", True)
    scale = (-1 if greater_is_better else 1) / abs(difference["value"])
    low, high = sorted((difference["low"] * scale, difference["high"] * scale))
    return {"value": difference["difference"] * scale, "low": low, "high": high}


def _of_review(kept_report: KeptReport, of_these_weights: bool) -> Iterator[MeasuredMetric]:
    for name, entry in (kept_report.report.get("metrics") or {}).items():
        yield _measured(kept_report, (f"review/{name}", "", "", "", ""), entry, of_these_weights)


def _measured(
    kept_report: KeptReport, names: tuple[str, ...], entry: dict[str, Any], of_these_weights: bool
) -> MeasuredMetric:
    """A metric from its entry in a report. A value of null is NaN, which passes no gate."""
    value = float("nan") if entry.get("value") is None else float(entry["value"])
    where = f"{kept_report.kind} of {kept_report.checkpoint} ({kept_report.path.parent.name}/{kept_report.path.name})"
    return MeasuredMetric(names, value, where, of_these_weights, entry.get("low"), entry.get("high"))
