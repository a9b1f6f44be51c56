"""Significance by exchanging rows between the two models, for several metrics together and for few rows.

If two models do not differ, it does not matter which of them answered a row. Where rows are exchanged, the difference of the
row changes its sign: this is a sign-flip test.

- Several metrics together, such as the groups of a task: rows are exchanged at random, and each metric's difference is compared
  with the largest one of the family in each exchange (single-step max T of Westfall & Young 1993, on differences over their
  spread). With p below 0.05 for each, one comparison in twenty reports any difference by chance.
- Few rows, for which a bootstrap is far too certain: all exchanges are tried, so p is exact (Fisher 1935). For rows
  that are each right or wrong, this is McNemar's exact test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from trainer.evaluation.tasks.base import RatioOfSums, Task, TaskMetric, TaskRow, score_array
from trainer.evaluation.tasks.significance import max_statistic_p

FunctionByMetric = dict[str, Callable[[np.ndarray], float]]
"""Functions of row weights, float64 [rows], by metric."""
NUM_PERMUTATIONS = 2000
"""How often rows are exchanged; half as often if a metric is no ratio of sums, because each one is computed from scratch."""
MAX_NUMBERS_IN_MEMORY = 1 << 22
"""Random numbers (permutations times rows) that are generated at a time, which bounds the memory."""
MAX_EXACT_PAIRS = 12
"""Most rows in which two models differ for the exact test: 12 rows have 2,048 exchanges."""
ALL_ROWS = slice(None)
"""In place of a list of row numbers: every row."""
SAME_SIZE_TOLERANCE = 1e-9
"""Relative difference up to which two differences count as equally large, whatever the rounding of their sums."""


class ExactTest(NamedTuple):
    """The exact sign-flip test of one metric."""

    p: float
    num_pairs: int
    """Rows in which the two models differ; p cannot be below 2 ** (1 - num_pairs)."""


def exact_sign_flip_test(
    task: Task, metric: TaskMetric, rows: Sequence[TaskRow], other_rows: Sequence[TaskRow]
) -> ExactTest | None:
    """Test the difference of two models in a metric exactly, if they differ in few of the rows that both answered.

    p is the share of all exchanges of rows between the models after which the metric differs at least as much as it does. Three
    rows, in all of which this model is better, give 0.25: two exchanges of eight, none and all.

    Returns None if the models differ in no row, or in too many to try all exchanges (`MAX_EXACT_PAIRS`; fewer for a metric that
    is no ratio of sums, whose exchanges are limited by `task.max_resamples`).
    """
    differing = [index for index in range(len(rows)) if _differ_in_metric(metric, rows[index], other_rows[index])]
    max_exchanges = 2 ** (MAX_EXACT_PAIRS - 1)
    if metric.ratio_of_sums is None:
        max_exchanges = min(max_exchanges, task.max_resamples)
    # To exchange all other rows instead gives the same difference with the other sign. So the first row always stays.
    num_exchanges = 2 ** (len(differing) - 1) if differing else 0
    if not 0 < num_exchanges <= max_exchanges:
        return None
    metric_functions: FunctionByMetric = {}
    if metric.ratio_of_sums is None:
        metric_functions = task.weighted_metric_functions([*rows, *other_rows])
    is_exchanged = np.array(list(product((0.0, 1.0), repeat=len(differing) - 1)))
    differences = _metric_differences_by_permutation(
        [metric], rows, other_rows, metric_functions, is_exchanged, row_numbers=differing[1:]
    )
    sizes = np.abs(differences[:, 0])
    observed_size = sizes[0]  # the first exchange is none
    # A difference that is NaN counts as large, which is the cautious side.
    is_smaller = sizes < observed_size * (1 - SAME_SIZE_TOLERANCE)
    return ExactTest(1 - float(is_smaller.mean()), len(differing))


def _differ_in_metric(metric: TaskMetric, row: TaskRow, other_row: TaskRow) -> bool:
    """Whether the answers of two models to one row count differently in a metric.

    If the metric is no ratio of sums, it may read anything of a row, so any difference counts.
    """
    if metric.ratio_of_sums is None:
        return row != other_row
    names = [name for name in metric.ratio_of_sums if name is not None]
    return any(row.scores.get(name, 0.0) != other_row.scores.get(name, 0.0) for name in names)


def family_p_values(
    task: Task, metrics: Sequence[TaskMetric], rows: Sequence[TaskRow], other_rows: Sequence[TaskRow], seed: int
) -> dict[str, float]:
    """p-values of the differences of two models in a family of metrics, by name, corrected for the number of metrics.

    A family: similar metrics that are tested together, such as one for each group of people, since one of many differs by
    chance. Both models must have answered the same rows. If they are equally good, the answers to any row may be exchanged
    between them: the test compares the differences with the largest ones of the family after random exchanges. `seed`: seeds
    these.
    """
    rng = np.random.default_rng([seed, len(rows)])
    chunk_size = max(1, MAX_NUMBERS_IN_MEMORY // len(rows))
    all_are_ratios = all(metric.ratio_of_sums for metric in metrics)
    # Any other metric is computed from scratch for each permutation, which is slow.
    num_permutations = NUM_PERMUTATIONS if all_are_ratios else NUM_PERMUTATIONS // 2
    metric_functions = task.weighted_metric_functions([*rows, *other_rows])

    nothing_exchanged = np.zeros((1, len(rows)))
    observed = _metric_differences_by_permutation(metrics, rows, other_rows, metric_functions, nothing_exchanged)
    chunks = []
    for begin in range(0, num_permutations, chunk_size):
        num_in_chunk = min(chunk_size, num_permutations - begin)
        # 1 where the answers of the two models are exchanged.
        is_exchanged = rng.integers(0, 2, (num_in_chunk, len(rows))).astype(float)
        chunks.append(_metric_differences_by_permutation(metrics, rows, other_rows, metric_functions, is_exchanged))
    by_chance = np.nan_to_num(np.concatenate(chunks))  # [permutations, metrics]
    observed_differences = np.nan_to_num(observed[0])  # [metrics]
    p_values = max_statistic_p(observed_differences, by_chance).tolist()
    names = [metric.name for metric in metrics]
    return dict(zip(names, p_values, strict=True))


def _metric_differences_by_permutation(
    metrics: Sequence[TaskMetric],
    rows: Sequence[TaskRow],
    other_rows: Sequence[TaskRow],
    metric_functions: FunctionByMetric,
    is_exchanged: np.ndarray,
    row_numbers: list[int] | slice = ALL_ROWS,
) -> np.ndarray:
    """This model's metrics minus the other's, after each exchange of rows: float64 [permutations, metrics].

    A metric that is a ratio of sums over rows is computed for all permutations at once; any other one by its function, once
    for each permutation.

    `metric_functions`: by metric, a function of weights, float64 [2 * rows]: those of `rows`, then those of `other_rows`. It
    computes the metric of the rows whose weight is 1. `is_exchanged`: float64 [permutations, rows], 1 where the two models'
    rows are exchanged, else 0. `row_numbers`: the rows that it is about; all others stay.
    """
    differences_by_metric = []  # float64 [permutations] each
    for metric in metrics:
        if metric.ratio_of_sums is not None:
            ratio = metric.ratio_of_sums
            own = _metric_after_exchanges(metric, ratio, rows, other_rows, is_exchanged, row_numbers)
            # The other model's own rows are `other_rows`, and an exchange gives it those of this model.
            other = _metric_after_exchanges(metric, ratio, other_rows, rows, is_exchanged, row_numbers)
            differences_by_metric.append(own - other)
            continue
        metric_of_weights = metric_functions[metric.name]
        differences = []
        is_row_exchanged = np.zeros(len(rows))
        for is_exchanged_here in is_exchanged:  # one permutation
            is_row_exchanged[row_numbers] = is_exchanged_here
            own_weights = np.concatenate([1 - is_row_exchanged, is_row_exchanged])
            differences.append(metric_of_weights(own_weights) - metric_of_weights(1 - own_weights))
        differences_by_metric.append(np.array(differences))
    return np.stack(differences_by_metric, axis=1)


def _metric_after_exchanges(
    metric: TaskMetric,
    ratio_of_sums: RatioOfSums,
    rows: Sequence[TaskRow],
    other_rows: Sequence[TaskRow],
    is_exchanged: np.ndarray,
    row_numbers: list[int] | slice,
) -> np.ndarray:
    """A ratio of sums of the model of `rows` after each exchange of rows with the other model: float64 [permutations].

    An exchanged row adds the other model's score to the sum instead of the own one. `is_exchanged`: float64 [permutations,
    rows], 1 for an exchanged row, else 0. `row_numbers`: the rows that it is about; all others stay.
    """
    sums = []  # numerator and denominator, float64 [permutations] each
    for score in ratio_of_sums:
        own_scores = _scores_or_ones(rows, score)
        other_scores = _scores_or_ones(other_rows, score)
        changes = other_scores - own_scores
        sums.append(own_scores.sum() + is_exchanged @ changes[row_numbers])
    return metric.from_sums(*sums)


def _scores_or_ones(rows: Sequence[TaskRow], score: str | None) -> np.ndarray:
    """A score of each row, float64 [rows]. None, the number of rows, is a score of 1 for each row."""
    if score is None:
        return np.ones(len(rows))
    return score_array(rows, score)
