"""Significance of several metrics together, such as the groups of a task, by exchanging rows between the two models.

If two models do not differ, it does not matter which of them answered a row. So rows are exchanged between them at
random, and each metric's difference is compared with the largest one of the family in each exchange (single-step max
T of Westfall & Young 1993, on differences over their spread). With p below 0.05 for each, one comparison in twenty
reports any difference by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from trainer.evaluation.tasks.base import Metric, Task, TaskRow, score_array
from trainer.evaluation.tasks.significance import max_statistic_p

WeightedMetrics = dict[str, Callable[[np.ndarray], float]]
EXCHANGES = 2000
"""How often rows are exchanged; half as often if a metric is no ratio of sums, since each one is computed from scratch."""
DRAWN_NUMBERS = 1 << 22
"""Random numbers that are drawn at a time, which bounds the memory."""


def family_p(
    task: Task, metrics: Sequence[Metric], rows: Sequence[TaskRow], other_rows: Sequence[TaskRow], seed: int
) -> dict[str, float]:
    """p-value of the difference of two models in each metric of a family, by name, corrected for the number of metrics.

    Both models must have answered the same rows. If they are equally good, the answers to any row may be exchanged between
    them: the test compares the largest difference of the family with those after random exchanges. `seed`: of the exchanges.
    """
    rng = np.random.default_rng([seed, len(rows)])
    chunk_exchanges = max(1, DRAWN_NUMBERS // len(rows))
    exchanges = EXCHANGES if all(metric.ratio for metric in metrics) else EXCHANGES // 2
    weighted_metric_functions = task.weighted_metric_functions([*rows, *other_rows])

    # The differences of the models as they are, then after each exchange: [1 + exchanges, metrics].
    nothing_exchanged = np.zeros((1, len(rows)))
    chunks = [_differences(metrics, rows, other_rows, weighted_metric_functions, nothing_exchanged)]
    for begin in range(0, exchanges, chunk_exchanges):
        num_draws = min(chunk_exchanges, exchanges - begin)
        exchanged = rng.integers(0, 2, (num_draws, len(rows))).astype(float)  # 1 where a row's answers change sides
        chunks.append(_differences(metrics, rows, other_rows, weighted_metric_functions, exchanged))
    differences = np.nan_to_num(np.concatenate(chunks))
    observed = differences[0]  # nothing was exchanged in the first row
    by_chance = differences[1:]
    p_values = max_statistic_p(observed, by_chance).tolist()
    names = [metric.name for metric in metrics]
    return dict(zip(names, p_values, strict=True))


def _differences(
    metrics: Sequence[Metric],
    rows: Sequence[TaskRow],
    other_rows: Sequence[TaskRow],
    weighted_metric_functions: WeightedMetrics,
    exchanged: np.ndarray,
) -> np.ndarray:
    """This model's metrics minus the other's, float64 [draws, metrics].

    In each draw, the rows where `exchanged` (float64 [draws, rows]) is 1 are those of the other model.
    """
    columns = []
    for metric in metrics:
        if metric.ratio is None:
            # Weights over the rows of both models: 1 for the half that counts as this model's, 0 for the rest.
            metric_of_weights = weighted_metric_functions[metric.name]
            differences = []
            for draw in exchanged:
                own_weights = np.concatenate([1 - draw, draw])
                differences.append(metric_of_weights(own_weights) - metric_of_weights(1 - own_weights))
            columns.append(np.array(differences))
        else:
            own = _ratio_after_exchange(metric, metric.ratio, rows, other_rows, exchanged)
            other = _ratio_after_exchange(metric, metric.ratio, other_rows, rows, exchanged)
            columns.append(own - other)
    return np.stack(columns, axis=1)


def _ratio_after_exchange(
    metric: Metric,
    ratio: tuple[str, str | None],
    rows: Sequence[TaskRow],
    other_rows: Sequence[TaskRow],
    exchanged: np.ndarray,
) -> np.ndarray:
    """The metric of the first model after each exchange of rows, float64 [draws].

    An exchanged row adds the other model's score to the sum instead of the own one.
    """
    sums = []  # numerator and denominator, float64 [draws] each
    for score in ratio:
        own_scores = _score_array(rows, score)
        other_scores = _score_array(other_rows, score)
        sums.append(own_scores.sum() + exchanged @ (other_scores - own_scores))
    return metric.from_sums(*sums)


def _score_array(rows: Sequence[TaskRow], score: str | None) -> np.ndarray:
    """A score of each row, float64 [rows]; ones if the ratio's denominator is the number of rows."""
    if score is None:
        return np.ones(len(rows))
    return score_array(rows, score)
