"""Compares two evaluations: differences with intervals, rows that turned from right to wrong or back, broken limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from trainer.evaluation.report.intervals import (
    FEW,
    WORSE,
    Bootstrap,
    paired_difference,
    resample_metrics,
    share_counts,
    unpaired_difference,
    unpaired_share_difference,
    with_corrected_p,
)
from trainer.evaluation.report.permutation_test import family_p
from trainer.evaluation.report.record import EvaluatedModel, same_rows
from trainer.evaluation.tasks.base import Task, TaskRow

MAX_CHANGED_ROWS = 20
"""Rows that changed sides which are listed, of each direction."""


def compare_task(
    task: Task,
    found: EvaluatedModel,
    mine: dict[str, np.ndarray],
    theirs: Sequence[TaskRow] | None,
    values: dict[str, float],
    how: Bootstrap,
) -> dict[str, Any]:
    """What the report says of one task against another model, of which the metrics' `values` and perhaps the rows are known.

    `mine` are this model's metrics of resamples.
    """
    rows = found.rows[task.name]
    pairs = theirs is not None and same_rows(rows, theirs)
    other = resample_metrics(task, theirs, how) if pairs and theirs is not None else {}
    metrics = {}
    known = [metric for metric in task.metrics_for(rows) if metric.name in values]
    family = [metric for metric in known if metric.in_family]
    jointly = family_p(task, family, rows, theirs, how.seed) if pairs and theirs is not None and len(family) > 1 else {}
    for metric in known:
        value, greater = found.metrics[task.name][metric.name], metric.greater_is_better
        if pairs:
            apart = paired_difference(
                value, values[metric.name], mine[metric.name], other[metric.name], greater=greater
            )
            if metric.name in jointly:
                apart = with_corrected_p(apart, jointly[metric.name], greater=greater)
        else:
            among = len(family) if metric.in_family else 1
            counts = share_counts(metric, rows)
            if counts is None:
                apart = unpaired_difference(value, values[metric.name], mine[metric.name], greater=greater, among=among)
            else:
                apart = unpaired_share_difference(value, values[metric.name], counts, greater=greater, among=among)
        below = metric.case_score or (metric.ratio[1] if metric.ratio else None)
        cases = sum(row.scores.get(below, 0.0) > 0 for row in rows) if below else len(rows)
        metrics[metric.name] = asdict(apart) | ({} if cases >= metric.min_cases else {"verdict": FEW})
    said: dict[str, Any] = {"paired": pairs, "metrics": metrics}
    if pairs and theirs is not None and (score := right_or_wrong_score(task, [*rows, *theirs])) is not None:
        said["changed"] = changed_rows(rows, theirs, score)
    return said


def right_or_wrong_score(task: Task, rows: Sequence[TaskRow]) -> str | None:
    """The score by which a row is right or wrong: that of the first metric, where it is a mean of noughts and ones."""
    ratio = next(iter(task.metrics_for(rows))).ratio
    if ratio is None or ratio[1] is not None or any(row.scores[ratio[0]] not in (0.0, 1.0) for row in rows):
        return None
    return ratio[0]


def changed_rows(rows: Sequence[TaskRow], theirs: Sequence[TaskRow], score: str) -> dict[str, Any]:
    """Rows that one model has right and the other wrong."""
    found: dict[str, Any] = {"won": [], "lost": []}
    for mine, other in zip(rows, theirs, strict=True):
        if mine.scores[score] != other.scores[score]:
            found["won" if mine.scores[score] > other.scores[score] else "lost"].append(
                {"where": mine.where, "prompt": mine.prompt, "answer": mine.answer, "other": other.answer}
            )
    return {
        "num_won": len(found["won"]),
        "num_lost": len(found["lost"]),
        **{side: listed[:MAX_CHANGED_ROWS] for side, listed in found.items()},
    }


def regressions(task: Task, metrics: dict[str, dict[str, Any]]) -> list[str]:
    """What fell further than it may, one line each: beyond `limit` where there is one for the metric, else beyond chance."""
    fell = []
    for metric in task.metrics:
        if (apart := metrics.get(metric.name)) is None:
            continue
        loss = -apart["difference"] if metric.greater_is_better else apart["difference"]
        loss = abs(loss) if metric.greater_is_better is None else loss
        limit = task.config.limit.get(metric.name)
        now = apart["value"] + apart["difference"]
        said = f"{task.name}: {metric.name} {now:.4g}, was {apart['value']:.4g}"
        if limit is not None and loss > limit:
            fell.append(f"{said}: worse by {loss:.4g}, more than {task.key}.limit.{metric.name}={limit:g}")
        elif limit is None and apart["verdict"] == WORSE:
            span = f"[{apart['low']:.4g}, {apart['high']:.4g}]"
            fell.append(f"{said}: the 95 % interval of the difference, {span}, is wholly on the worse side")
    return fell
