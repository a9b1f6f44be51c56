"""How far a metric may be chance: bootstrap over rows (Efron 1979), paired where two models answered the same rows (Koehn 2004).

A resample is how often each row counts, drawn from (seed, number of rows) alone, so that two models are resampled alike. The
interval is that of the 2.5th and the 97.5th percentile; the test of a difference is two-sided: twice the share of resamples
in which it is not on its side of zero, at least one of them. The interval of a share of rows, each right or wrong, is Wilson's:
resamples of rows that are all wrong would have no width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from trainer.evaluation.tasks.base import Metric, Task, TaskRow
from trainer.evaluation.tasks.significance import LEVEL

DRAWN_COUNTS = 1 << 22
"""Counts drawn at a time."""
ROUNDING = 1e-5
"""Part of a value up to which two are one: other ranks and batches round otherwise, and the same way in every row."""
BETTER, WORSE, SAME, MOVED, FEW = "better", "worse", "no difference shown", "differs", "too few cases"


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """How it is drawn."""

    resamples: int
    seed: int

    def description(self, *, paired: bool) -> str:
        """The method in a line, for the record."""
        slow = Task.max_resamples
        kind = "paired bootstrap over rows" if paired else "bootstrap over rows"
        return (
            f"{kind}, {self.resamples} resamples (at most {slow} where a metric is no mean), seed {self.seed}, 95 % "
            "percentile interval" + (", two-sided p" if paired else "") + "; of shares of rows Wilson's interval"
        )


def resample_metrics(task: Task, rows: Sequence[TaskRow], how: Bootstrap) -> dict[str, np.ndarray]:
    """Each metric of resamples of the rows, float64 [resamples], NaN where one has no value."""
    drawn = np.random.default_rng([how.seed, len(rows)])
    number, size = len(rows), max(1, DRAWN_COUNTS // len(rows))
    others, metrics = task.weighted_metrics(rows), task.metrics_for(rows)
    found = {metric.name: list[np.ndarray]() for metric in metrics}
    scores = {
        name: np.array([row.scores.get(name, 0.0) for row in rows], np.float64)
        for metric in metrics
        for name in metric.ratio or ()
        if name
    }
    done = 0
    while done < how.resamples:
        weights = drawn.multinomial(number, np.full(number, 1 / number), min(size, how.resamples - done)).astype(float)
        for metric in metrics:
            if metric.ratio is None:
                some = weights[: max(0, task.max_resamples - done)]
                found[metric.name].append(np.array([others[metric.name](one) for one in some]))
            else:
                over, below = metric.ratio
                bottom = weights @ scores[below] if below else np.full(len(weights), float(number))
                found[metric.name].append(metric.from_sums(weights @ scores[over], bottom))
        done += len(weights)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resamples."""
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def confidence_intervals(
    task: Task, rows: Sequence[TaskRow], drawn: dict[str, np.ndarray]
) -> dict[str, tuple[float, float]]:
    """The 95 % interval of each metric by its name: Wilson's of a share, else the middle of the resamples in `drawn`."""
    metrics = {metric.name: metric for metric in task.metrics_for(rows)}
    found = {}
    for name, values in drawn.items():
        counts = share_counts(metrics[name], rows)
        found[name] = percentile_interval(values) if counts is None else wilson_interval(*counts)
    return found


def share_counts(metric: Metric, rows: Sequence[TaskRow]) -> tuple[float, float] | None:
    """(rows that have it, rows that count) of a share of rows that are each 0 or 1; None for any other metric."""
    if metric.ratio is None or metric.exponential:
        return None
    over, below = metric.ratio
    successes = [row.scores.get(over, 0.0) for row in rows]
    cases = [row.scores.get(below, 0.0) if below else 1.0 for row in rows]
    is_share = all(
        each in (0.0, 1.0) and success in (0.0, each) for success, each in zip(successes, cases, strict=True)
    )
    total = sum(cases)
    return (sum(successes), total) if is_share and total else None


def wilson_interval(successes: float, cases: float, level: float = LEVEL) -> tuple[float, float]:
    """The score interval of a share (Wilson 1927). Unlike resamples it has a width if every row is right, or none is."""
    share = successes / cases
    z = NormalDist().inv_cdf(1 - level / 2)
    middle = (share + z**2 / (2 * cases)) / (1 + z**2 / cases)
    half = z / (1 + z**2 / cases) * math.sqrt(share * (1 - share) / cases + (z / (2 * cases)) ** 2)
    # Rounding must not keep the interval from holding 0 of all and all of all.
    low = 0.0 if successes == 0 else middle - half
    high = 1.0 if successes == cases else middle + half
    return low, high


@dataclass(frozen=True, slots=True)
class MetricDifference:
    """One metric of this model against that of another."""

    value: float
    """That of the other."""
    difference: float
    """This minus the other."""
    low: float
    high: float
    p: float | None
    """None where the rows are not the same, and the interval is that of this model alone, shifted."""
    verdict: str


def paired_difference(
    value: float, other: float, mine: np.ndarray, theirs: np.ndarray, *, greater: bool | None
) -> MetricDifference:
    """The difference of two models on the same rows, out of resamples of both."""
    apart = mine - theirs
    low, high = percentile_interval(apart)
    # A resample that is exactly even speaks for neither side, and so counts against both.
    p = min(1.0, 2 * (min(int((apart <= 0).sum()), int((apart >= 0).sum())) + 1) / (len(apart) + 1))
    return MetricDifference(other, value - other, low, high, p, _verdict(other, low, high, greater=greater))


def with_corrected_p(apart: MetricDifference, p: float, *, greater: bool | None) -> MetricDifference:
    """A difference judged as one of a family, by its corrected p. The interval stays that of the metric alone."""
    told = apart.difference if p < LEVEL else 0.0
    return replace(apart, p=p, verdict=_verdict(apart.value, told, told, greater=greater))


def unpaired_difference(
    value: float, other: float, mine: np.ndarray, *, greater: bool | None, among: int = 1
) -> MetricDifference:
    """The difference from a number of which the rows are not known: beyond this model's own interval or not.

    Of a family of `among` the verdict is that of an interval as much wider (Bonferroni).
    """
    low, high = percentile_interval(mine - other)
    side = 100 * LEVEL / 2 / among
    wide = np.nanpercentile(mine - other, [side, 100 - side])
    return MetricDifference(other, value - other, low, high, None, _verdict(other, *map(float, wide), greater=greater))


def unpaired_share_difference(
    value: float, other: float, counts: tuple[float, float], *, greater: bool | None, among: int = 1
) -> MetricDifference:
    """`unpaired` for a share, of which `counts` are the successes and cases of this model."""
    low, high = wilson_interval(*counts)
    wide_low, wide_high = wilson_interval(*counts, LEVEL / among)
    verdict = _verdict(other, wide_low - other, wide_high - other, greater=greater)
    return MetricDifference(other, value - other, low - other, high - other, None, verdict)


def _verdict(other: float, low: float, high: float, *, greater: bool | None) -> str:
    least = ROUNDING * abs(other)
    if greater is None:
        return MOVED if low > least or high < -least else SAME
    if low > least:
        return BETTER if greater else WORSE
    if high < -least:
        return WORSE if greater else BETTER
    return SAME
