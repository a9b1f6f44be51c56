"""Finds the measurement that a gate names: metrics of training's evaluations, of evaluation reports, of reviews.

A gate may name a report's metric by `TASK/METRIC` (`eval/` before it or not), by one name if task and metric are
called alike, by `KIND/METRIC`, by `METRIC`, or by a task or kind, which stands for its first metric. The first of
these forms that matches anything counts, with everything that it matches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trainer.reporting.results import (
    EVALUATION_REPORT,
    REVIEW_REPORT,
    TEST_REPORT,
    KeptReport,
    held_out_metrics_at_step,
    kept_reports,
    read_metric_rows,
)

FORGETTING_METRIC = "forgetting"
GENERAL_TASK_PREFIXES = (FORGETTING_METRIC, "general")
"""A task whose name begins with one of these measures what the base model knew."""


class MetricNames(NamedTuple):
    """A metric's name in each of the forms in which a gate can name it, in their order. Empty if it has none in a form."""

    full_name: str
    """`TASK/METRIC`, such as `summaries/rouge_l`."""
    common_name: str = ""
    """The one name of a task and its metric that are called alike, such as `memorised`."""
    kind_and_metric: str = ""
    """`KIND/METRIC`, such as `rouge/rouge_l`."""
    metric: str = ""
    """Such as `rouge_l`."""
    task_or_kind: str = ""
    """Of a task's first metric only, such as `summaries`."""


@dataclass(frozen=True, slots=True)
class MeasuredMetric:
    """One metric that was measured of some weights of a run."""

    names: MetricNames
    value: float
    source: str
    """Where it was measured, in words, such as `training's evaluation at step 200`."""
    is_of_these_weights: bool
    """Whether it was measured of the weights that are to be exported, which alone are judged by it."""
    low: float | None = None
    high: float | None = None
    """The confidence interval, if there is one."""

    @property
    def name(self) -> str:
        """The full name, `TASK/METRIC`, by which messages list it."""
        return self.names.full_name


def measured_metrics(run_dir: Path, step: int | None, weights_sha256: str | None) -> list[MeasuredMetric]:
    """Collect all metrics that a run has measured, to judge gates by: of reports, newest first, then of training.

    Reports are of evaluations, of reviews by people, and of the test documents.

    `step`, `weights_sha256`: of the weights that are to be exported; None if unknown. A gate counts only what was measured of
    these weights: `is_of_these_weights` is set by the hash for a report, and by the step for training's evaluations and for a
    test report without a hash.
    """
    metrics: list[MeasuredMetric] = []
    read_metrics_by_report_kind = {
        EVALUATION_REPORT: _metrics_of_evaluation,
        REVIEW_REPORT: _metrics_of_review,
        TEST_REPORT: _metrics_of_test,
    }
    # The newest first; a report that cannot be read is passed over.
    for report in kept_reports(run_dir):
        is_of_these_weights = weights_sha256 is not None and report.artefact == weights_sha256
        # A run that writes no checkpoint of its last step tests weights without a hash; an export of that step has none either.
        if report.artefact is None and report.kind == TEST_REPORT:
            is_of_these_weights = weights_sha256 is None and step == (report.report.get("model") or {}).get("step")
        metrics += read_metrics_by_report_kind[report.kind](report, is_of_these_weights)
    return metrics + _metrics_of_training(run_dir, step)


def _metrics_of_training(run_dir: Path, step: int | None) -> list[MeasuredMetric]:
    """Collect the metrics of the evaluations that training logged: those at `step` first, then the others from the newest."""
    evaluated_steps = []
    for row in read_metric_rows(run_dir):
        if any(name.startswith("eval/") for name in row):
            evaluated_steps.append(row["step"])
    metrics = []
    for evaluated_step in dict.fromkeys([step, *reversed(evaluated_steps)]):
        if evaluated_step is None:
            continue
        for name, value in held_out_metrics_at_step(run_dir, evaluated_step).items():
            if not isinstance(value, int | float):
                continue
            short_name = name.removeprefix("eval/")
            # Training's evaluations know neither tasks nor kinds.
            names = MetricNames(short_name, metric=short_name.rpartition("/")[2])
            source = f"training's evaluation at step {evaluated_step}"
            metrics.append(MeasuredMetric(names, float(value), source, is_of_these_weights=evaluated_step == step))
    return metrics


def matching_metrics(gate_name: str, metrics: list[MeasuredMetric]) -> list[MeasuredMetric]:
    """Find the metrics that a gate's name stands for, the newest of each; empty if none does. `metrics`: newest first.

    The forms of names are tried in the order of `MetricNames`. The first form in which any metric has this name decides:
    "loss" is a metric of that full name if there is one, else the metric `loss` of every task.
    """
    name = gate_name.removeprefix("eval/") or gate_name
    for form_index in range(len(MetricNames._fields)):
        newest_by_name: dict[str, MeasuredMetric] = {}
        for metric in metrics:
            if metric.names[form_index] == name:
                newest_by_name.setdefault(metric.name, metric)
        if newest_by_name:
            return [*newest_by_name.values()]
    return []


def _metrics_of_evaluation(kept_report: KeptReport, is_of_these_weights: bool) -> Iterator[MeasuredMetric]:
    """Collect the metrics of an evaluation's report, and how much was forgotten if it was compared with the base.

    `is_of_these_weights`: whether the report is of the weights that are to be exported.
    """
    report = kept_report.report
    comparison_with_base = report.get("against") or {}
    # {"tasks": {task: {"kind": ..., "metrics": {metric: entry}}}, "against": {"what": "base", "tasks": {task: ...}}}
    for task, task_report in (report.get("tasks") or {}).items():
        kind = str(task_report.get("kind"))
        for index, (metric, entry) in enumerate((task_report.get("metrics") or {}).items()):
            common_name = metric if task == metric else ""  # such as `rouge` for `rouge/rouge`
            # The first metric of a task can be named by the task or the kind alone, and so it comes twice.
            tasks_and_kinds = (task, kind) if index == 0 else ("",)
            for task_or_kind in tasks_and_kinds:
                names = MetricNames(
                    full_name=f"{task}/{metric}",
                    common_name=common_name,
                    kind_and_metric=f"{kind}/{metric}",
                    metric=metric,
                    task_or_kind=task_or_kind,
                )
                yield _metric_of_entry(kept_report, names, entry, is_of_these_weights)
        if comparison_with_base.get("what") == "base" and task.startswith(GENERAL_TASK_PREFIXES):
            task_comparison = (comparison_with_base.get("tasks") or {}).get(task) or {}
            forgetting_entry = _relative_forgetting(task_report, task_comparison)
            if forgetting_entry:
                names = MetricNames(f"{task}/{FORGETTING_METRIC}", metric=FORGETTING_METRIC)
                yield _metric_of_entry(kept_report, names, forgetting_entry, is_of_these_weights)


def _relative_forgetting(task_report: dict[str, Any], task_comparison: dict[str, Any]) -> dict[str, Any]:
    """The catastrophic forgetting of a task: how much worse its first metric became by fine-tuning, relative to the base.

    `task_report`: the task in the report; `task_comparison`: in its comparison with the base. Returns an entry like those of a
    report's metrics, such as {"value": 0.03, "low": 0.01, "high": 0.05} for 3 % worse; {} if the report does not compare this
    metric with the base, or the base has 0.
    """
    metric = next(iter(task_report.get("metrics") or {}), None)
    if metric is None:
        return {}
    # {"value": 0.60, "difference": 0.02, "low": 0.01, "high": 0.03}: of the base; of the model minus the base, and its interval.
    base_comparison = (task_comparison.get("metrics") or {}).get(metric)
    if not base_comparison or not base_comparison.get("value"):
        return {}
    greater_is_better = task_report["metrics"][metric].get("greater_is_better", True)
    # A fall is worse if greater is better, a rise otherwise.
    sign = -1 if greater_is_better else 1
    scale = sign / abs(base_comparison["value"])
    # A negative scale swaps the ends of the interval.
    low, high = sorted((base_comparison["low"] * scale, base_comparison["high"] * scale))
    return {"value": base_comparison["difference"] * scale, "low": low, "high": high}


def _metrics_of_review(kept_report: KeptReport, is_of_these_weights: bool) -> Iterator[MeasuredMetric]:
    """The metrics of a review by people, which have one name each."""
    for name, entry in (kept_report.report.get("metrics") or {}).items():
        yield _metric_of_entry(kept_report, MetricNames(f"review/{name}"), entry, is_of_these_weights)


def _metrics_of_test(kept_report: KeptReport, is_of_these_weights: bool) -> Iterator[MeasuredMetric]:
    """Collect the metrics of the test documents. A gate names them in full (`test/loss`): `loss` means evaluation documents."""
    for name, value in (kept_report.report.get("metrics") or {}).items():
        yield _metric_of_entry(kept_report, MetricNames(name), {"value": value}, is_of_these_weights)


def _metric_of_entry(
    kept_report: KeptReport, names: MetricNames, entry: dict[str, Any], is_of_these_weights: bool
) -> MeasuredMetric:
    """Read one metric from its entry in a report. A value of null is NaN, which passes no gate.

    `names`: the forms in which a gate can name it. `is_of_these_weights`: whether the report is of the weights that are to be
    exported.
    """
    value = float("nan") if entry.get("value") is None else float(entry["value"])
    source = f"{kept_report.kind} of {kept_report.checkpoint} ({kept_report.path.parent.name}/{kept_report.path.name})"
    return MeasuredMetric(
        names=names,
        value=value,
        source=source,
        is_of_these_weights=is_of_these_weights,
        low=entry.get("low"),
        high=entry.get("high"),
    )
