"""Compares two evaluations: differences with intervals, rows that turned from right to wrong or back, broken limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple, cast

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
    with_exact_p_value,
)
from trainer.evaluation.report.permutation_test import exact_sign_flip_test, family_p_values
from trainer.evaluation.report.record import DifferenceRecord, EvaluatedModel, TaskComparison, asked_the_same_rows
from trainer.evaluation.tasks.base import Task, TaskMetric, TaskRow, shorten_prompt
from trainer.evaluation.tasks.significance import SIGNIFICANCE_LEVEL

MAX_CHANGED_ROWS = 20
"""Most rows that are listed of those that turned right, and of those that turned wrong."""
MIN_UNPAIRED_CASES = 6
"""Below this number of cases a metric that is no share gets no verdict against a model whose rows are not known.

A bootstrap of fewer rows is too certain. In a paired comparison too, six rows are the fewest for which the exact test can have a
p below 0.05."""


def compare_task(
    task: Task,
    model: EvaluatedModel,
    resamples_by_metric: dict[str, np.ndarray],
    other_rows: Sequence[TaskRow] | None,
    other_metrics: dict[str, float],
    bootstrap: Bootstrap,
) -> TaskComparison:
    """Compare the evaluated model with another one in one task: the metrics, and the rows that changed.

    `model`, `resamples_by_metric`: this model, and the value of each metric in each resample of its rows, float64 [resamples].
    `other_rows`: None if only the other model's metrics are known. If both answered the same rows, they are compared row by
    row.

    {"paired": true, "metrics": {"accuracy": {"value": 0.5, "difference": 0.1, "low": 0.02, "high": 0.18, "p": 0.01, "verdict":
    "better"}}, "changed": {"num_won": 9, "won": [...], ...}}; `changed` only if paired, and each row is right or wrong. If the
    models differ in few rows, `notes` says so.
    """
    rows = model.rows[task.name]
    paired_rows = None
    if other_rows is not None and asked_the_same_rows(rows, other_rows):
        paired_rows = other_rows
    # An earlier report may lack a metric that was added since.
    common_metrics = [metric for metric in task.metrics_for(rows) if metric.name in other_metrics]
    few_row_notes: list[str] = []
    if paired_rows is None:
        differences = _unpaired_differences(task, model, common_metrics, resamples_by_metric, other_metrics)
    else:
        differences, few_row_notes = _paired_differences(
            task, model, common_metrics, resamples_by_metric, paired_rows, other_metrics, bootstrap
        )

    difference_records: dict[str, DifferenceRecord] = {}
    for metric in common_metrics:
        difference = differences[metric.name]
        # The numbers stay; only the verdict is withheld.
        if _num_cases_of_metric(metric, rows) < metric.min_cases:
            difference = replace(difference, verdict=TOO_FEW_CASES)
        difference_records[metric.name] = cast(DifferenceRecord, asdict(difference))
    comparison: TaskComparison = {"paired": paired_rows is not None, "metrics": difference_records}
    if few_row_notes:
        comparison["notes"] = few_row_notes
    if paired_rows is not None:
        score_name = right_or_wrong_score_name(task, [*rows, *paired_rows])
        if score_name is not None:
            comparison["changed"] = changed_rows(rows, paired_rows, score_name)
    return comparison


class _PairedDifferences(NamedTuple):
    """The comparison of two models on the same rows."""

    by_metric: dict[str, MetricDifference]
    few_row_notes: list[str]
    """A sentence on metrics for which the models differ in few rows, if there are any."""


def _paired_differences(
    task: Task,
    model: EvaluatedModel,
    metrics: Sequence[TaskMetric],
    resamples_by_metric: dict[str, np.ndarray],
    other_rows: Sequence[TaskRow],
    other_metrics: dict[str, float],
    bootstrap: Bootstrap,
) -> _PairedDifferences:
    """Compare two models in each metric by the same resamples of the rows that both answered.

    If several of the metrics are one family (one for each group of people, say), their p-values are corrected together. Any
    other metric in which the models differ in few rows is tested exactly.
    """
    # The same seed and number of rows give the same resamples as this model's.
    other_resamples_by_metric = resample_metrics(task, other_rows, bootstrap)
    rows = model.rows[task.name]
    # A single metric needs no correction.
    family = [metric for metric in metrics if metric.in_correction_family]
    corrected_p = {}
    if len(family) > 1:
        corrected_p = family_p_values(task, family, rows, other_rows, bootstrap.seed)
    differences = {}
    num_pairs_by_metric = {}
    for metric in metrics:
        name = metric.name
        difference = paired_difference(
            model.metrics[task.name][name],
            other_metrics[name],
            resamples_by_metric[name],
            other_resamples_by_metric[name],
            greater_is_better=metric.greater_is_better,
        )
        if name in corrected_p:
            difference = with_corrected_p_value(
                difference, corrected_p[name], greater_is_better=metric.greater_is_better
            )
        else:
            exact_test = exact_sign_flip_test(task, metric, rows, other_rows)
            if exact_test is not None:
                difference = with_exact_p_value(difference, exact_test.p)
                num_pairs_by_metric[name] = exact_test.num_pairs
        differences[name] = difference
    return _PairedDifferences(differences, _few_row_notes(num_pairs_by_metric))


def _few_row_notes(num_pairs_by_metric: dict[str, int]) -> list[str]:
    """A sentence on metrics that were tested exactly because the two models differ in few rows; [] if there are none.

    `num_pairs_by_metric`: the number of rows that differ. {"rouge1": 3, "rougeL": 3} -> ["rouge1, rougeL: few rows: the models
    differ in at most 3. p is that of an exact sign-flip test, and cannot be below 0.25, so no verdict is possible"].
    """
    if not num_pairs_by_metric:
        return []
    num_pairs = max(num_pairs_by_metric.values())
    min_p = 2.0 ** (1 - num_pairs)
    consequence = ", so no verdict is possible" if min_p >= SIGNIFICANCE_LEVEL else ""
    return [
        f"{', '.join(num_pairs_by_metric)}: few rows: the models differ in at most {num_pairs}. p is that of an exact sign-flip "
        f"test, and cannot be below {min_p:.2g}{consequence}"
    ]


def _unpaired_differences(
    task: Task,
    model: EvaluatedModel,
    metrics: Sequence[TaskMetric],
    resamples_by_metric: dict[str, np.ndarray],
    other_metrics: dict[str, float],
) -> dict[str, MetricDifference]:
    """Compare this model's metrics with those of another model, whose rows are not known or were others.

    The more metrics a family has (one for each group of people, say), the likelier one of them differs by chance. The verdict
    on each of them therefore goes by a wider interval. A metric that is no share of rows gets none if it has few cases.
    """
    rows = model.rows[task.name]
    num_in_family = sum(metric.in_correction_family for metric in metrics)
    differences = {}
    for metric in metrics:
        name = metric.name
        value = model.metrics[task.name][name]
        family_size = num_in_family if metric.in_correction_family else 1
        counts = share_counts(metric, rows)
        # The metric is no share of rows, so that only resamples give an interval.
        if counts is None:
            difference = unpaired_difference(
                value,
                other_metrics[name],
                resamples_by_metric[name],
                greater_is_better=metric.greater_is_better,
                family_size=family_size,
            )
            if _num_cases_of_metric(metric, rows) < MIN_UNPAIRED_CASES:
                difference = replace(difference, verdict=TOO_FEW_CASES)
            differences[name] = difference
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
    """How many rows decide a metric, such as 12 harmful prompts of 100 rows; with too few, no verdict is given.

    They are the rows with its `case_score`, else its denominator, above 0; without either, all.
    """
    case_score = metric.case_score
    if case_score is None and metric.ratio_of_sums is not None:
        case_score = metric.ratio_of_sums.denominator
    if case_score is None:
        return len(rows)
    return sum(row.scores.get(case_score, 0.0) > 0 for row in rows)


def right_or_wrong_score_name(task: Task, rows: Sequence[TaskRow]) -> str | None:
    """Which score says whether a row is right (1) or wrong (0), so that rows can be listed that changed sides.

    It is the numerator of the task's first metric. None if that metric is not the mean of a score over all rows, or the score
    has other values than 0 and 1.
    """
    first_metric = task.metrics_for(rows)[0]
    ratio = first_metric.ratio_of_sums
    if ratio is None or ratio.denominator is not None:
        return None
    score = ratio.numerator
    has_other_values = any(row.scores[score] not in (0.0, 1.0) for row in rows)
    return None if has_other_values else score


def changed_rows(rows: Sequence[TaskRow], other_rows: Sequence[TaskRow], score: str) -> dict[str, Any]:
    """List the rows that one of two models has right and the other wrong, as `evaluation.json` has them.

    {"num_won": 1, "num_lost": 0, "won": [{"where": "rows.jsonl:3", "prompt": "2 + 2?", "answer": "4", "other": "5"}], "lost":
    []}: `won` are rows that only this model has right, `lost` those that only the other one has; the lists have the first
    `MAX_CHANGED_ROWS`. Both models answered the same rows, in the same order. `score`: the name of the score that is 1 for a
    right row.
    """
    changed: dict[str, list[dict[str, str]]] = {"won": [], "lost": []}
    for row, other_row in zip(rows, other_rows, strict=True):
        if row.scores[score] == other_row.scores[score]:
            # Both right, or both wrong.
            continue
        outcome = "won" if row.scores[score] > other_row.scores[score] else "lost"
        changed[outcome].append(
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


def regression_lines(task: Task, differences: dict[str, DifferenceRecord]) -> list[str]:
    """Which metrics of a task became worse than allowed, a line each: with any, the command ends with an error code.

    - The task has a `limit` for the metric: it is worse by more than the limit. If neither direction is better, any change
      counts.
    - Else: the verdict on the difference is "worse".

    `differences`: how each metric differs from the other model's (`metrics` of `compare_task`). A metric without one is left
    out.
    """
    lines = []
    for metric in task.metrics:
        difference = differences.get(metric.name)
        if difference is None:
            continue
        # This model's value minus the other's.
        change = difference["difference"]
        if metric.greater_is_better is None:
            worsening = abs(change)
        else:
            worsening = -change if metric.greater_is_better else change
        limit = task.config.limit.get(metric.name)
        other_value = difference["value"]
        line = f"{task.name}: {metric.name} {other_value + change:.4g}, was {other_value:.4g}"
        if limit is not None and worsening > limit:
            lines.append(f"{line}: worse by {worsening:.4g}, more than {task.config_key}.limit.{metric.name}={limit:g}")
        elif limit is None and difference["verdict"] == WORSE:
            interval = f"[{difference['low']:.4g}, {difference['high']:.4g}]"
            lines.append(f"{line}: the 95 % interval of the difference, {interval}, is wholly on the worse side")
    return lines
