"""Significance of several metrics together, such as the groups of a task, by exchanging rows between the two models.

If two models do not differ, it does not matter which of them answered a row. So rows are exchanged between them at
random, and each metric's difference is compared with the largest one of the family in each exchange (single-step max
T of Westfall & Young 1993, on differences over their spread). With p below 0.05 for each, one comparison in twenty
reports any difference by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from trainer.evaluation.tasks.base import Metric, Task, TaskRow
from trainer.evaluation.tasks.significance import max_statistic_p

WeightedMetrics = dict[str, Callable[[np.ndarray], float]]
EXCHANGES = 2000
"""How often rows are exchanged; half as often where a metric is no ratio of sums, and each is computed anew."""
DRAWN_NUMBERS = 1 << 22
"""Numbers drawn at a time."""


def family_p(
    task: Task, metrics: Sequence[Metric], rows: Sequence[TaskRow], theirs: Sequence[TaskRow], seed: int
) -> dict[str, float]:
    """p of each metric of the family, by name, corrected for how many there are. The rows are the same questions of both."""
    drawn, size = np.random.default_rng([seed, len(rows)]), max(1, DRAWN_NUMBERS // len(rows))
    number = EXCHANGES if all(metric.ratio for metric in metrics) else EXCHANGES // 2
    others = task.weighted_metrics([*rows, *theirs])
    parts = [_differences(metrics, rows, theirs, others, np.zeros((1, len(rows))))]
    for begin in range(0, number, size):
        swapped = drawn.integers(0, 2, (min(size, number - begin), len(rows))).astype(float)
        parts.append(_differences(metrics, rows, theirs, others, swapped))
    found = np.nan_to_num(np.concatenate(parts))
    return dict(zip((metric.name for metric in metrics), max_statistic_p(found[0], found[1:]).tolist(), strict=True))


def _differences(
    metrics: Sequence[Metric],
    rows: Sequence[TaskRow],
    theirs: Sequence[TaskRow],
    others: WeightedMetrics,
    swapped: np.ndarray,
) -> np.ndarray:
    """This model's metrics less the other's, float64 [draws, metrics], with the rows exchanged where `swapped` is 1."""
    found = []
    for metric in metrics:
        if metric.ratio is None:
            of = others[metric.name]
            pairs = (np.concatenate([1 - one, one]) for one in swapped)
            found.append(np.array([of(mine) - of(1 - mine) for mine in pairs]))
            continue
        sides = []
        for mine, other in ((rows, theirs), (theirs, rows)):
            sums = []
            for name in metric.ratio:
                one, two = (
                    np.array([row.scores.get(name, 0.0) if name else 1.0 for row in side]) for side in (mine, other)
                )
                sums.append(one.sum() + swapped @ (two - one))
            sides.append(metric.from_sums(*sums))
        found.append(sides[0] - sides[1])
    return np.stack(found, axis=1)
