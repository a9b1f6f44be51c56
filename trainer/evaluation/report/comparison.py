"""Compares two evaluations: differences with intervals, rows that turned from right to wrong or back, broken limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from trainer.evaluation.report.intervals import (
    TOO_FEW_CASES,
    WORSE,
    Bootstrap,
    MetricDifference,
    paired_difference,
    resample_metrics,
    share_counts,
    unpaired_difference,
    unpaired_share_difference,
    with_corrected_p_value,
)
from trainer.evaluation.report.permutation_test import family_p_values
from trainer.evaluation.report.record import EvaluatedModel, asked_the_same_rows
from trainer.evaluation.tasks.base import Task, TaskMetric, TaskRow, shorten_prompt

MAX_CHANGED_ROWS = 20
"""Most rows that are listed of those that turned right, and of those that turned wrong."""


def compare_task(
    task: Task,
    model: EvaluatedModel,
    resampled: dict[str, np.ndarray],
    other_rows: Sequence[TaskRow] | None,
    other_metrics: dict[str, float],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """What `evaluation.json` says of one task in comparison with another model: `metrics` by name, and rows that `changed`.

    `resampled`: this model's metrics, float64 [resamples] each. `other_rows`: None if only the other model's metrics are known.
    If both models answered the same rows, they are compared row by row.

    {"paired": true, "metrics": {"accuracy": {"value": 0.5, "difference": 0.1, "low": 0.02, "high": 0.18, "p": 0.01, "verdict":
    "better"}}, "changed": {"num_won": 9, "won": [...], ...}}; `changed` only if paired, and each row is right or wrong.
    """
    rows = model.rows[task.name]
    paired_rows = None
    if other_rows is not None and asked_the_same_rows(rows, other_rows):
        paired_rows = other_rows
    common_metrics = [metric for metric in task.metrics_for(rows) if metric.name in other_metrics]
    if paired_rows is None:
        differences = _unpaired_differences(task, model, common_metrics, resampled, other_metrics)
    else:
        differences = _paired_differences(task, model, common_metrics, resampled, paired_rows, other_metrics, bootstrap)

    metric_records = {}
    for metric in common_metrics:
        record = asdict(differences[metric.name])
        if _num_cases_of_metric(metric, rows) < metric.min_cases:
            record["verdict"] = TOO_FEW_CASES
        metric_records[metric.name] = record
    comparison: dict[str, Any] = {"paired": paired_rows is not None, "metrics": metric_records}
    if paired_rows is not None:
        score = right_or_wrong_score(task, [*rows, *paired_rows])
        if score is not None:
            comparison["changed"] = changed_rows(rows, paired_rows, score)
    return comparison


def _paired_differences(
    task: Task,
    model: EvaluatedModel,
    metrics: Sequence[TaskMetric],
    resampled: dict[str, np.ndarray],
    other_rows: Sequence[TaskRow],
    other_metrics: dict[str, float],
    bootstrap: Bootstrap,
) -> dict[str, MetricDifference]:
    """The difference of two models in each metric, from the same resamples of the rows that both answered.

    If several of the metrics are one family (one for each group of people, say), their p-values are corrected together.
    """
    other_resampled = resample_metrics(task, other_rows, bootstrap)
    rows = model.rows[task.name]
    family = [metric for metric in metrics if metric.in_correction_family]
    corrected_p = {}
    if len(family) > 1:
        corrected_p = family_p_values(task, family, rows, other_rows, bootstrap.seed)
    differences = {}
    for metric in metrics:
        name = metric.name
        difference = paired_difference(
            model.metrics[task.name][name],
            other_metrics[name],
            resampled[name],
            other_resampled[name],
            greater_is_better=metric.greater_is_better,
        )
        if name in corrected_p:
            difference = with_corrected_p_value(
                difference, corrected_p[name], greater_is_better=metric.greater_is_better
            )
        differences[name] = difference
    return differences


def _unpaired_differences(
    task: Task,
    model: EvaluatedModel,
    metrics: Sequence[TaskMetric],
    resampled: dict[str, np.ndarray],
    other_metrics: dict[str, float],
) -> dict[str, MetricDifference]:
    """The difference of two models in each metric, from this model's rows and the other one's metrics alone.

    A metric of a family gets a wider interval, by the number of its members.
    """
    rows = model.rows[task.name]
    num_in_family = sum(metric.in_correction_family for metric in metrics)
    differences = {}
    for metric in metrics:
        name = metric.name
        value = model.metrics[task.name][name]
        family_size = num_in_family if metric.in_correction_family else 1
        counts = share_counts(metric, rows)
        if counts is None:
            differences[name] = unpaired_difference(
                value,
                other_metrics[name],
                resampled[name],
                greater_is_better=metric.greater_is_better,
                family_size=family_size,
            )
        else:
            differences[name] = unpaired_share_difference(
                value,
                other_metrics[name],
                counts,
                greater_is_better=metric.greater_is_better,
                family_size=family_size,
            )
    return differences


def _num_cases_of_metric(metric: TaskMetric, rows: Sequence[TaskRow]) -> int:
    """How many rows are cases of a metric: those with its `case_score`, else its denominator, above 0; without either, all."""
    case_score = metric.case_score
    if case_score is None and metric.ratio_of_sums is not None:
        _, case_score = metric.ratio_of_sums  # the denominator
    if case_score is None:
        return len(rows)
    return sum(row.scores.get(case_score, 0.0) > 0 for row in rows)


def right_or_wrong_score(task: Task, rows: Sequence[TaskRow]) -> str | None:
    """The name of the score that says whether a row is right (1) or wrong (0): the numerator of the task's first metric.

    None if that metric is not the mean of a score over all rows, or the score has other values than 0 and 1.
    """
    first_metric = task.metrics_for(rows)[0]
    if first_metric.ratio_of_sums is None:
        return None
    score, denominator = first_metric.ratio_of_sums
    if denominator is not None:
        return None
    has_other_values = any(row.scores[score] not in (0.0, 1.0) for row in rows)
    return None if has_other_values else score


def changed_rows(rows: Sequence[TaskRow], other_rows: Sequence[TaskRow], score: str) -> dict[str, Any]:
    """Rows that one of two models has right and the other wrong, as `evaluation.json` has them.

    {"num_won": 1, "num_lost": 0, "won": [{"where": "rows.jsonl:3", "prompt": "2 + 2?", "answer": "4", "other": "5"}], "lost":
    []}: `won` are rows that only this model has right, `lost` those that only the other one has; the lists have the first
    `MAX_CHANGED_ROWS`. Both models answered the same rows, in the same order. `score`: the name of the score that is 1 for a
    right row.
    """
    changed: dict[str, list[dict[str, str]]] = {"won": [], "lost": []}
    for row, other_row in zip(rows, other_rows, strict=True):
        if row.scores[score] == other_row.scores[score]:
            continue
        side = "won" if row.scores[score] > other_row.scores[score] else "lost"
        changed[side].append(
            {
                "where": row.where,
                "prompt": shorten_prompt(row.prompt),
                "answer": row.answer,
                "other": other_row.answer,
            }
        )
    return {
        "num_won": len(changed["won"]),
        "num_lost": len(changed["lost"]),
        "won": changed["won"][:MAX_CHANGED_ROWS],
        "lost": changed["lost"][:MAX_CHANGED_ROWS],
    }


def regression_lines(task: Task, metrics: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each metric of a task that became worse than allowed.

    - The task has a `limit` for the metric: it is worse by more than the limit. If neither direction is better, any change
      counts.
    - Else: the whole 95 % interval of the difference is on the worse side.

    `metrics`: the records that `compare_task` returns under `metrics`. A metric without a record is left out.
    """
    lines = []
    for metric in task.metrics:
        difference = metrics.get(metric.name)
        if difference is None:
            continue
        change = difference["difference"]
        if metric.greater_is_better is None:
            worsening = abs(change)
        else:
            worsening = -change if metric.greater_is_better else change
        limit = task.config.limit.get(metric.name)
        new_value = difference["value"] + change
        line = f"{task.name}: {metric.name} {new_value:.4g}, was {difference['value']:.4g}"
        if limit is not None and worsening > limit:
            lines.append(f"{line}: worse by {worsening:.4g}, more than {task.config_key}.limit.{metric.name}={limit:g}")
        elif limit is None and difference["verdict"] == WORSE:
            interval = f"[{difference['low']:.4g}, {difference['high']:.4g}]"
            lines.append(f"{line}: the 95 % interval of the difference, {interval}, is wholly on the worse side")
    return lines
