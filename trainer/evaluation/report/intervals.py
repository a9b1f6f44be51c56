"""Confidence intervals of metrics, by a bootstrap over rows (Efron 1979).

Two models that answered the same rows are compared by a paired bootstrap (Koehn 2004). A resample is a list of how often each
row counts. It depends only on the seed and the number of rows, so both models get the same resamples. An interval goes from the
2.5th to the 97.5th percentile. The test of a difference is two-sided: p is twice the share of resamples in which the difference
is not on its side of zero, and never 0. A share of rows that are each right or wrong has Wilson's interval, because resamples
of rows that are all wrong would give an interval without width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from trainer.evaluation.tasks.base import Metric, Task, TaskRow, score_array
from trainer.evaluation.tasks.significance import LEVEL

DRAWN_COUNTS = 1 << 22
"""Counts of rows that are drawn at a time, which bounds the memory."""
ROUNDING = 1e-5
"""Relative difference up to which two values count as equal: other batches and ranks round all rows the same other way."""
# Verdicts on a difference, as `evaluation.json` has them.
BETTER = "better"
WORSE = "worse"
NO_DIFFERENCE = "no difference shown"
DIFFERS = "differs"
"""Of a metric of which neither direction is better."""
TOO_FEW_CASES = "too few cases"


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """The settings of the bootstrap."""

    resamples: int
    seed: int

    def description(self, *, paired: bool) -> str:
        """The method in one line, for the report."""
        method = "paired bootstrap over rows" if paired else "bootstrap over rows"
        test = ", two-sided p" if paired else ""
        return (
            f"{method}, {self.resamples} resamples (at most {Task.max_resamples} where a metric is no mean), seed {self.seed}, "
            f"95 % percentile interval{test}; of shares of rows Wilson's interval"
        )


def resample_metrics(task: Task, rows: Sequence[TaskRow], bootstrap: Bootstrap) -> dict[str, np.ndarray]:
    """Bootstrap: the value of each metric in each resample of the rows, float64 [resamples] by name.

    NaN if a resample has no value. A metric that is no ratio of sums has `task.max_resamples` values at most, since each one is
    computed from scratch.
    """
    rng = np.random.default_rng([bootstrap.seed, len(rows)])
    chunk_resamples = max(1, DRAWN_COUNTS // len(rows))
    equal_chances = np.full(len(rows), 1 / len(rows))
    weighted_metric_functions = task.weighted_metric_functions(rows)
    metrics = task.metrics_for(rows)
    scores = _scores_of_ratios(metrics, rows)
    chunks: dict[str, list[np.ndarray]] = {metric.name: [] for metric in metrics}
    drawn = 0
    while drawn < bootstrap.resamples:
        resamples = min(chunk_resamples, bootstrap.resamples - drawn)
        # How often each row counts in each resample, [resamples, rows].
        weights = rng.multinomial(len(rows), equal_chances, resamples).astype(float)
        for metric in metrics:
            if metric.ratio is None:
                slow_weights = weights[: max(0, task.max_resamples - drawn)]
                metric_of_weights = weighted_metric_functions[metric.name]
                values = np.array([metric_of_weights(row_weights) for row_weights in slow_weights])
            else:
                numerator, denominator = metric.ratio
                if denominator is None:  # every resample has as many rows
                    denominators = np.full(len(weights), float(len(rows)))
                else:
                    denominators = weights @ scores[denominator]
                values = metric.from_sums(weights @ scores[numerator], denominators)
            chunks[metric.name].append(values)
        drawn += len(weights)
    return {name: np.concatenate(metric_chunks) for name, metric_chunks in chunks.items()}


def _scores_of_ratios(metrics: Sequence[Metric], rows: Sequence[TaskRow]) -> dict[str, np.ndarray]:
    """The scores that ratios are made of, by name, float64 [rows]."""
    scores = {}
    for metric in metrics:
        for name in metric.ratio or ():
            if name and name not in scores:
                scores[name] = score_array(rows, name)
    return scores


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """The interval that holds the middle 95 % of resamples."""
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def confidence_intervals(
    task: Task, rows: Sequence[TaskRow], resampled: dict[str, np.ndarray]
) -> dict[str, tuple[float, float]]:
    """The 95 % interval of each metric by its name: Wilson's for a share, else the percentiles of `resampled`."""
    metrics = {metric.name: metric for metric in task.metrics_for(rows)}
    intervals = {}
    for name, values in resampled.items():
        counts = share_counts(metrics[name], rows)
        intervals[name] = percentile_interval(values) if counts is None else wilson_interval(*counts)
    return intervals


def share_counts(metric: Metric, rows: Sequence[TaskRow]) -> tuple[float, float] | None:
    """(successes, cases) of a metric that is a share of rows with scores of 0 or 1, such as (7.0, 10.0); None for any other.

    It is no share if a row has another score, or a success without being a case.
    """
    if metric.ratio is None or metric.exponential:
        return None
    numerator, denominator = metric.ratio
    successes = 0.0
    cases = 0.0
    for row in rows:
        success = row.scores.get(numerator, 0.0)
        case = 1.0 if denominator is None else row.scores.get(denominator, 0.0)
        if case not in (0.0, 1.0) or success not in (0.0, case):
            return None
        successes += success
        cases += case
    return (successes, cases) if cases else None


def wilson_interval(successes: float, cases: float, level: float = LEVEL) -> tuple[float, float]:
    """The interval of a share of `successes` among `cases` (Wilson 1927), for a confidence of 1 - `level`.

    Unlike that of resamples, it has a width if every row is right, or none is.
    """
    share = successes / cases
    z = NormalDist().inv_cdf(1 - level / 2)
    shrinkage = 1 + z**2 / cases
    middle = (share + z**2 / (2 * cases)) / shrinkage
    half_width = z / shrinkage * math.sqrt(share * (1 - share) / cases + (z / (2 * cases)) ** 2)
    # Exact ends, since rounding could leave 0 % or 100 % just outside the interval.
    low = 0.0 if successes == 0 else middle - half_width
    high = 1.0 if successes == cases else middle + half_width
    return low, high


@dataclass(frozen=True, slots=True)
class MetricDifference:
    """One metric of this model compared with the same metric of another model.

    The names of the fields are keys of `evaluation.json`.
    """

    value: float
    """The metric of the other model."""
    difference: float
    """The metric of this model minus that of the other."""
    low: float
    high: float
    p: float | None
    """None if the rows are not the same. Then the interval is that of this model alone, minus the other's metric."""
    verdict: str


def paired_difference(
    value: float,
    other_value: float,
    resampled: np.ndarray,
    other_resampled: np.ndarray,
    *,
    greater: bool | None,
) -> MetricDifference:
    """The difference of two models in one metric on the same rows, tested by a paired bootstrap.

    `resampled`, `other_resampled`: each model's metric in the same resamples (float64 [resamples]). `greater`: whether a greater
    value is better, None if neither is.
    """
    differences = resampled - other_resampled
    low, high = percentile_interval(differences)
    # A resample with exactly no difference supports neither side, so it counts against both.
    num_against_gain = int((differences <= 0).sum())
    num_against_loss = int((differences >= 0).sum())
    num_against = min(num_against_gain, num_against_loss)
    p = min(1.0, 2 * (num_against + 1) / (len(differences) + 1))  # two-sided
    verdict = _verdict(other_value, low, high, greater=greater)
    return MetricDifference(other_value, value - other_value, low, high, p, verdict)


def with_corrected_p(difference: MetricDifference, p: float, *, greater: bool | None) -> MetricDifference:
    """The difference judged as one of a family of metrics, by its p-value corrected for their number.

    The interval stays that of the metric alone.
    """
    significant = difference.difference if p < LEVEL else 0.0
    verdict = _verdict(difference.value, significant, significant, greater=greater)
    return replace(difference, p=p, verdict=verdict)


def unpaired_difference(
    value: float, other_value: float, resampled: np.ndarray, *, greater: bool | None, family_size: int = 1
) -> MetricDifference:
    """The difference from a number whose rows are not known: is that number outside this model's own interval?

    For one of `family_size` metrics, the verdict uses a wider interval (Bonferroni).
    """
    low, high = percentile_interval(resampled - other_value)
    tail_percent = 100 * LEVEL / 2 / family_size
    wide_low, wide_high = np.nanpercentile(resampled - other_value, [tail_percent, 100 - tail_percent])
    verdict = _verdict(other_value, float(wide_low), float(wide_high), greater=greater)
    return MetricDifference(other_value, value - other_value, low, high, None, verdict)


def unpaired_share_difference(
    value: float, other_value: float, counts: tuple[float, float], *, greater: bool | None, family_size: int = 1
) -> MetricDifference:
    """The difference from a share whose rows are not known: is that share outside this model's own interval (Wilson's)?

    `counts`: this model's (successes, cases). For one of `family_size` metrics, the verdict uses a wider interval (Bonferroni).
    """
    low, high = wilson_interval(*counts)
    wide_low, wide_high = wilson_interval(*counts, LEVEL / family_size)
    verdict = _verdict(other_value, wide_low - other_value, wide_high - other_value, greater=greater)
    return MetricDifference(other_value, value - other_value, low - other_value, high - other_value, None, verdict)


def _verdict(other_value: float, low: float, high: float, *, greater: bool | None) -> str:
    """What an interval of the difference says; `greater`: whether a greater value is better, None if neither is."""
    tolerance = ROUNDING * abs(other_value)
    if greater is None:
        excludes_zero = low > tolerance or high < -tolerance
        return DIFFERS if excludes_zero else NO_DIFFERENCE
    if low > tolerance:
        return BETTER if greater else WORSE
    if high < -tolerance:
        return WORSE if greater else BETTER
    return NO_DIFFERENCE
