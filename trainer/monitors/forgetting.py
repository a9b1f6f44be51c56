"""Forgetting: what the tuned model has lost against the base, on general text and on tasks of the user's choice.

The number is the rise of a loss, or the fall of a metric, as a share of the base's. Rows are paired: the same ones were asked of
the base. Where a metric is a ratio of sums, its standard error is that of a ratio estimator (Cochran 1977, chapter 6), and a loss
is called clear where its one-sided lower bound is above 0, at a level of 5 % over all evaluations of a run (Bonferroni). A limit
is held against the number itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from trainer.evaluation.tasks.base import Metric, TaskRow
from trainer.monitors.base import Evidence, Finding
from trainer.monitors.config import ForgettingWatchConfig, Reaction, limit_of

LEVEL = 0.05
"""How often, at most, a run that forgets nothing is told that it does."""
LEAST_ROWS = 8
"""Rows below which no bound is told."""
LEAST_LOSS = 0.01
"""Share of the base's metric below which a clear loss is not worth a word, where no limit is set."""
REMEDIES = (
    "a lower optim.lr, or fewer budget.steps",
    "data.sources.<name>.replay=true data.sources.<name>.weight=0.1 (mix general text in)",
    "objective.forgetting.kl_weight=0.5 (hold the model on the replayed text)",
    "tuning=lora, or tuning=freeze tuning.layers=last-2",
    "optim.ema_decay=0.99",
)


@dataclass(frozen=True, slots=True)
class ComparedTask:
    """A task of the tuned model beside the base."""

    name: str
    metric: str
    base: float
    now: float
    lost: float
    """Rise of a loss or fall of a metric, as a share of the base's."""
    error: float | None
    """Its standard error; None where that is not known."""
    rows: int

    def bound(self, level: float) -> float | None:
        """The one-sided lower bound of `lost`."""
        return None if self.error is None else self.lost - student_quantile(1 - level, self.rows - 1) * self.error


def compare(
    name: str, metric: Metric, base: Sequence[TaskRow], now: Sequence[TaskRow], values: tuple[float, float]
) -> ComparedTask:
    """A task's first metric; `values` are those of the base and of the tuned model, whose rows are paired."""
    before, after = values
    lost = (before - after if metric.greater_is_better else after - before) / (abs(before) or 1.0)
    error = None
    if metric.ratio is not None and len(base) == len(now) >= LEAST_ROWS and before:
        over, below = metric.ratio
        same = below is None or all(a.scores[below] == b.scores[below] for a, b in zip(base, now, strict=True))
        old, new = ([float(row.scores[over]) for row in rows] for rows in (base, now))
        if same and math.fsum(old):
            error = ratio_error(old, new)
    return ComparedTask(name, metric.name, before, after, lost, error, len(now))


def ratio_error(old: Sequence[float], new: Sequence[float]) -> float:
    """Standard error of sum(new) / sum(old) over paired rows (Cochran 1977, chapter 6). `old` must not sum to 0."""
    total = math.fsum(old)
    ratio = math.fsum(new) / total
    squares = sum((after - ratio * before) ** 2 for before, after in zip(old, new, strict=True))
    return math.sqrt(squares * len(old) / (len(old) - 1)) / abs(total)


def numbers(seen: Evidence) -> dict[str, float]:
    """What is logged in each evaluation: `forgetting`, the largest of all, and that of each where there are several."""
    if not seen.compared:
        return {}
    found = {"forgetting": max(each.lost for each in seen.compared)}
    if len(seen.compared) > 1:
        found |= {f"forgetting/{each.name}": each.lost for each in seen.compared}
    return found


def find(config: ForgettingWatchConfig, seen: Evidence) -> Finding | None:
    """What this evaluation says of the one that lost most."""
    compared: list[ComparedTask] = seen.compared
    if not compared or config.action is Reaction.off or seen.step == 0:
        return None
    worst, limit = max(compared, key=lambda each: each.lost), limit_of(config)
    level = LEVEL / max(1, seen.planned)
    bound = worst.bound(level)
    clear = bound is not None and bound > 0 and worst.lost > LEAST_LOSS
    beyond = limit is not None and worst.lost > limit
    if not (beyond if limit is not None else clear):
        return None
    sure = "" if bound is None else f", at least {bound:+.2%} (paired, one-sided, level {level:.2g})"
    against = "" if limit is None else f", more than challenges.forgetting.limit={limit:.3g}"
    return Finding(
        challenge="forgetting",
        step=seen.step,
        says=(
            f"{worst.name}: {worst.metric} went from {worst.base:.4f} (base) to {worst.now:.4f}: {worst.lost:+.2%} lost{sure}"
            f"{against}; {worst.rows} rows"
        ),
        numbers={"forgetting": worst.lost, "base": worst.base, "now": worst.now, "rows": float(worst.rows)}
        | ({} if bound is None else {"bound": bound})
        | ({} if limit is None else {"limit": limit}),
        remedies=REMEDIES,
        stops=beyond and config.action is Reaction.stop,
    )


def student_quantile(share: float, freedom: int) -> float:
    """The quantile of Student's distribution, by the expansion 26.7.5 of Abramowitz and Stegun."""
    z = NormalDist().inv_cdf(share)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
