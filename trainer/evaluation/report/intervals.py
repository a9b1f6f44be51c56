"""Confidence intervals of metrics, by a bootstrap over rows (Efron 1979).

Two models that answered the same rows are compared by a paired bootstrap (Koehn 2004). A resample is a list of how often each
row counts. It depends only on the seed and the number of rows, so both models get the same resamples. An interval goes from the
2.5th to the 97.5th percentile. The test of a difference is two-sided: p is twice the share of resamples in which the difference
is not on its side of zero, and never 0. If the models differ in few rows, p is that of an exact test (`permutation_test`). A
share of rows that are each right or wrong has Wilson's interval, because resamples of rows that are all wrong would give an
interval without width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from trainer.evaluation.report.permutation_test import MAX_EXACT_PAIRS
from trainer.evaluation.tasks.base import RatioOfSums, Task, TaskMetric, TaskRow, score_array
from trainer.evaluation.tasks.significance import SIGNIFICANCE_LEVEL

MAX_COUNTS_IN_MEMORY = 1 << 22
"""Counts of rows (resamples times rows) that are sampled at a time, which bounds the memory."""
ROUNDING_TOLERANCE = 1e-5
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
        """How intervals and p-values were computed, in one line for the report. `paired`: whether two models are compared."""
        method = "paired bootstrap over rows" if paired else "bootstrap over rows"
        exact_test = f"exact sign-flip test if few rows differ, at most {MAX_EXACT_PAIRS}"
        test = f", two-sided p ({exact_test})" if paired else ""
        return (
            f"{method}, {self.resamples} resamples (at most {Task.max_resamples} where a metric is no mean), seed {self.seed}, "
            f"95 % percentile interval{test}; of shares of rows Wilson's interval"
        )


def resample_metrics(task: Task, rows: Sequence[TaskRow], bootstrap: Bootstrap) -> dict[str, np.ndarray]:
    """Compute each metric in many random resamples of the rows, to see how far chance reaches: {name: float64 [resamples]}.

    A resample draws as many rows with replacement. A value is NaN if a resample has none. A metric that is no ratio of sums
    has `task.max_resamples` values at most, because each one is computed from scratch. `rows` has one row at least.
    """
    rng = np.random.default_rng([bootstrap.seed, len(rows)])
    chunk_resamples = max(1, MAX_COUNTS_IN_MEMORY // len(rows))
    equal_chances = np.full(len(rows), 1 / len(rows))
    metric_functions = task.weighted_metric_functions(rows)
    metrics = task.metrics_for(rows)
    scores = _scores_of_ratios(metrics, rows)
    chunks: dict[str, list[np.ndarray]] = {metric.name: [] for metric in metrics}
    num_sampled = 0
    while num_sampled < bootstrap.resamples:
        num_resamples = min(chunk_resamples, bootstrap.resamples - num_sampled)
        # How often each row counts in each resample, [resamples, rows].
        weights = rng.multinomial(len(rows), equal_chances, num_resamples).astype(float)
        for metric in metrics:
            if metric.ratio_of_sums is None:
                first_weights = weights[: max(0, task.max_resamples - num_sampled)]
                metric_of_weights = metric_functions[metric.name]
                values = np.array([metric_of_weights(row_weights) for row_weights in first_weights])
            else:
                values = _resampled_ratio(metric, metric.ratio_of_sums, scores, weights)
            chunks[metric.name].append(values)
        num_sampled += len(weights)
    return {name: np.concatenate(metric_chunks) for name, metric_chunks in chunks.items()}


def _resampled_ratio(
    metric: TaskMetric, ratio: RatioOfSums, scores: dict[str, np.ndarray], weights: np.ndarray
) -> np.ndarray:
    """The value of a metric that is a ratio of sums in each resample, float64 [resamples], by matrix products.

    `scores`: float64 [rows] by name. `weights`: how often each row counts in each resample, float64 [resamples, rows].
    """
    num_resamples, num_rows = weights.shape
    if ratio.denominator is None:  # every resample has as many rows
        denominators = np.full(num_resamples, float(num_rows))
    else:
        denominators = weights @ scores[ratio.denominator]
    values: np.ndarray = metric.from_sums(weights @ scores[ratio.numerator], denominators)
    return values


def _scores_of_ratios(metrics: Sequence[TaskMetric], rows: Sequence[TaskRow]) -> dict[str, np.ndarray]:
    """The scores that are numerators or denominators of metrics, {name: float64 [rows]}."""
    scores = {}
    for metric in metrics:
        for name in metric.ratio_of_sums or ():
            if name and name not in scores:
                scores[name] = score_array(rows, name)
    return scores


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """(low, high) of the interval that has the middle 95 % of the values of all resamples; NaN values are left out."""
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def confidence_intervals(
    task: Task, rows: Sequence[TaskRow], resampled: dict[str, np.ndarray]
) -> dict[str, tuple[float, float]]:
    """The 95 % interval of each metric, by its name: Wilson's for a share of rows, else the percentiles of `resampled`.

    `resampled`: each metric's value in each resample, float64 [resamples].
    """
    metrics = {metric.name: metric for metric in task.metrics_for(rows)}
    intervals = {}
    for name, values in resampled.items():
        counts = share_counts(metrics[name], rows)
        intervals[name] = percentile_interval(values) if counts is None else wilson_interval(counts)
    return intervals


class ShareCounts(NamedTuple):
    """The counts behind a metric that is a share of rows, such as 7 right ones of 10."""

    successes: float
    cases: float


def share_counts(metric: TaskMetric, rows: Sequence[TaskRow]) -> ShareCounts | None:
    """Count successes and cases of a metric that is a share of rows, such as 7 right ones of 10; None for any other metric.

    Shares have Wilson's interval, which needs no resamples. A metric is none if a row has a score other than 0 and 1, or a
    success without being a case, or if there are no cases.
    """
    if metric.ratio_of_sums is None or metric.exponential:
        return None
    ratio = metric.ratio_of_sums
    successes = 0.0
    cases = 0.0
    for row in rows:
        success = row.scores.get(ratio.numerator, 0.0)
        case = 1.0 if ratio.denominator is None else row.scores.get(ratio.denominator, 0.0)
        if case not in (0.0, 1.0) or success not in (0.0, case):
            return None
        successes += success
        cases += case
    return ShareCounts(successes, cases) if cases else None


def wilson_interval(counts: ShareCounts, alpha: float = SIGNIFICANCE_LEVEL) -> tuple[float, float]:
    """The interval (low, high) in which the true share may lie, by Wilson (1927): 7 successes of 10 -> (0.40, 0.89).

    Its confidence is 1 - `alpha`. Unlike an interval of resamples, it has a width if every row is right, or none is.
    """
    successes, cases = counts
    share = successes / cases
    z = NormalDist().inv_cdf(1 - alpha / 2)
    denominator = 1 + z**2 / cases
    centre = (share + z**2 / (2 * cases)) / denominator
    half_width = z / denominator * math.sqrt(share * (1 - share) / cases + (z / (2 * cases)) ** 2)
    # Exact ends, because rounding could leave 0 % or 100 % just outside the interval.
    low = 0.0 if successes == 0 else centre - half_width
    high = 1.0 if successes == cases else centre + half_width
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
    greater_is_better: bool | None,
) -> MetricDifference:
    """Compare two models in one metric on the same rows, by a paired bootstrap: the difference with interval, p and verdict.

    `value`, `other_value`: the metric of this model and of the other. `resampled`, `other_resampled`: the same in each
    resample, float64 [resamples]; both models have the same resamples. `greater_is_better`: None if neither direction is
    better.
    """
    differences = resampled - other_resampled
    low, high = percentile_interval(differences)
    # Two-sided p: twice the share of resamples on the rarer side of zero. A resample without a difference counts on both sides.
    num_not_greater = int((differences <= 0).sum())
    num_not_smaller = int((differences >= 0).sum())
    num_on_rarer_side = min(num_not_greater, num_not_smaller)
    # The + 1 keeps p above 0: no finite number of resamples can show that a difference is impossible by chance.
    p = min(1.0, 2 * (num_on_rarer_side + 1) / (len(differences) + 1))
    verdict = _verdict_of_interval(low, high, other_value, greater_is_better=greater_is_better)
    return MetricDifference(value=other_value, difference=value - other_value, low=low, high=high, p=p, verdict=verdict)


def with_corrected_p_value(
    difference: MetricDifference, p: float, *, greater_is_better: bool | None
) -> MetricDifference:
    """Replace p and verdict of a difference by those of a test of a family of metrics, such as one for each group.

    `p` is corrected for their number. The interval stays that of the metric alone.
    """
    verdict = NO_DIFFERENCE
    if p < SIGNIFICANCE_LEVEL:  # then the sign of the difference decides, as that of an interval without width
        change = difference.difference
        verdict = _verdict_of_interval(change, change, difference.value, greater_is_better=greater_is_better)
    return replace(difference, p=p, verdict=verdict)


def with_exact_p_value(difference: MetricDifference, p: float) -> MetricDifference:
    """The difference with the p of an exact test, for models that differ in few rows.

    A bootstrap of few rows is too certain. So its verdict stands only if the exact test is significant too. The interval stays.
    """
    verdict = difference.verdict if p < SIGNIFICANCE_LEVEL else NO_DIFFERENCE
    return replace(difference, p=p, verdict=verdict)


def unpaired_difference(
    value: float,
    other_value: float,
    resampled: np.ndarray,
    *,
    greater_is_better: bool | None,
    family_size: int = 1,
) -> MetricDifference:
    """Compare a metric with another model's value of it, if the other model's rows are not known or were others.

    The interval is that of this model alone, minus the other value: the verdict says whether that value is outside. If the
    metric is one of `family_size` that are tested together, the verdict uses a wider interval (Bonferroni). The p-value is
    None, as always without paired rows. `resampled`: this model's metric, float64 [resamples].
    """
    low, high = percentile_interval(resampled - other_value)
    tail_percent = 100 * SIGNIFICANCE_LEVEL / 2 / family_size
    wide_low, wide_high = np.nanpercentile(resampled - other_value, [tail_percent, 100 - tail_percent])
    verdict = _verdict_of_interval(float(wide_low), float(wide_high), other_value, greater_is_better=greater_is_better)
    return MetricDifference(
        value=other_value, difference=value - other_value, low=low, high=high, p=None, verdict=verdict
    )


def unpaired_share_difference(
    value: float,
    other_value: float,
    counts: ShareCounts,
    *,
    greater_is_better: bool | None,
    family_size: int = 1,
) -> MetricDifference:
    """Compare a share of rows with another model's, whose rows are not known or were others.

    The interval is Wilson's, from this model's `counts`, minus the other value. If the metric is one of `family_size` that are
    tested together, the verdict uses a wider one (Bonferroni).
    """
    low, high = wilson_interval(counts)
    wide_low, wide_high = wilson_interval(counts, alpha=SIGNIFICANCE_LEVEL / family_size)
    verdict = _verdict_of_interval(
        wide_low - other_value, wide_high - other_value, other_value, greater_is_better=greater_is_better
    )
    return MetricDifference(
        value=other_value,
        difference=value - other_value,
        low=low - other_value,
        high=high - other_value,
        p=None,
        verdict=verdict,
    )


def _verdict_of_interval(low: float, high: float, other_value: float, *, greater_is_better: bool | None) -> str:
    """The verdict on a difference: "better" or "worse" only if its whole 95 % interval, (low, high), is on one side.

    The difference is this model's metric minus `other_value`. An interval that touches zero, up to `ROUNDING_TOLERANCE` of the
    other value, shows no difference. `greater_is_better`: None if neither direction is better; then an interval beyond zero
    says "differs".
    """
    tolerance = ROUNDING_TOLERANCE * abs(other_value)
    if greater_is_better is None:
        excludes_zero = low > tolerance or high < -tolerance
        return DIFFERS if excludes_zero else NO_DIFFERENCE
    if low > tolerance:
        return BETTER if greater_is_better else WORSE
    if high < -tolerance:
        return WORSE if greater_is_better else BETTER
    return NO_DIFFERENCE
