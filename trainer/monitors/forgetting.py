"""Forgetting: what the tuned model has lost against the base, on general text and on tasks of the user's choice.

The number is the rise of a loss, or the fall of a metric, as a share of the base's. Rows are paired: the same ones were asked
of the base. Where a metric is a ratio of sums, its standard error is that of a ratio estimator (Cochran 1977, chapter 6), and
a loss is called clear where its one-sided lower bound is above 0, at a level of 5 % over all evaluations of a run
(Bonferroni). A limit is held against the number itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

from trainer.evaluation.tasks.base import TaskMetric, TaskRow
from trainer.monitors.base import Evidence, Finding
from trainer.monitors.config import ForgettingWatchConfig, Reaction, forgetting_limit

LEVEL = 0.05
"""How often, at most, a run that forgets nothing is said to forget."""
MIN_ROWS = 8
"""Rows below which there is no bound."""
MIN_LOST = 0.01
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
    tuned: float
    lost_share: float
    """Rise of a loss or fall of a metric, as a share of the base's."""
    standard_error: float | None
    """Its standard error; None where that is not known."""
    rows: int

    def bound(self, level: float) -> float | None:
        """The one-sided lower bound of `lost_share`, by Student's distribution; None if its error is not known."""
        if self.standard_error is None:
            return None
        quantile = student_t_quantile(1 - level, self.rows - 1)
        return self.lost_share - quantile * self.standard_error


class BaseAndTunedValue(NamedTuple):
    """The value of one metric of the base model, and of the model as it is tuned now."""

    base: float
    tuned: float


def compare_with_base(
    name: str,
    metric: TaskMetric,
    base_rows: Sequence[TaskRow],
    rows: Sequence[TaskRow],
    values: BaseAndTunedValue,
) -> ComparedTask:
    """Compare a task's answers before and after tuning: how much of its main metric was lost against the base, and how surely.

    `name`: of the task. `base_rows` and `rows` are paired: both models were asked the same. `values`: the metric of both. The
    loss is a share of the base's metric, so that tasks can be compared; an absolute number if the base's metric is 0.
    """
    drop = values.base - values.tuned if metric.greater_is_better else values.tuned - values.base
    lost_share = drop / (abs(values.base) or 1.0)
    standard_error = _standard_error_of_lost_share(metric, base_rows, rows) if values.base else None
    return ComparedTask(
        name=name,
        metric=metric.name,
        base=values.base,
        tuned=values.tuned,
        lost_share=lost_share,
        standard_error=standard_error,
        rows=len(rows),
    )


def _standard_error_of_lost_share(
    metric: TaskMetric, base_rows: Sequence[TaskRow], rows: Sequence[TaskRow]
) -> float | None:
    """How uncertain the lost share of a metric is, from the paired rows of the base and the tuned model: its standard error.

    `metric.ratio_of_sums` = (numerator, denominator) names the scores of a row whose sums the metric divides; a denominator of
    None stands for the number of rows, as for an accuracy. The result is None if the metric is no such ratio, if there are not
    as many rows of both or too few, if any row's denominators differ, or if the base's numerators sum to 0.
    """
    if metric.ratio_of_sums is None or len(base_rows) != len(rows) or len(base_rows) < MIN_ROWS:
        return None
    numerator, denominator = metric.ratio_of_sums
    if denominator is not None:
        # With the same denominators, the ratio of the metrics is that of the numerators.
        for base_row, row in zip(base_rows, rows, strict=True):
            if base_row.scores[denominator] != row.scores[denominator]:
                return None
    base_scores = [float(row.scores[numerator]) for row in base_rows]
    scores = [float(row.scores[numerator]) for row in rows]
    if math.fsum(base_scores) == 0:
        return None
    return standard_error_of_ratio(base_scores, scores)


def standard_error_of_ratio(old: Sequence[float], new: Sequence[float]) -> float:
    """How uncertain a ratio of two totals is: the standard error of sum(new) / sum(old) over paired rows.

    By Cochran (1977, chapter 6). `old` must not sum to 0, and must have at least two rows.
    """
    old_sum = math.fsum(old)
    ratio = math.fsum(new) / old_sum
    squared_residuals = sum((after - ratio * before) ** 2 for before, after in zip(old, new, strict=True))
    return math.sqrt(squared_residuals * len(old) / (len(old) - 1)) / abs(old_sum)


def logged_metrics(evidence: Evidence) -> dict[str, float]:
    """The metrics that this detector adds to an evaluation: {"forgetting": 0.03}, the largest share that any task has lost.

    With several tasks also that of each, such as `forgetting/qa`; {} if no task was compared with the base.
    """
    compared: list[ComparedTask] = evidence.compared_tasks
    if not compared:
        return {}
    metrics = {"forgetting": max(task.lost_share for task in compared)}
    if len(compared) > 1:
        metrics |= {f"forgetting/{task.name}": task.lost_share for task in compared}
    return metrics


def find_problem(config: ForgettingWatchConfig, evidence: Evidence) -> Finding | None:
    """Report the task in which the tuned model forgot most of what the base knew; None if it lost too little.

    With `challenges.forgetting.limit`, any loss above that limit is reported. Without, the loss must be clear (the lower bound
    of a paired test is above 0) and matter (more than `MIN_LOST` of the base's metric).
    """
    compared: list[ComparedTask] = evidence.compared_tasks
    if not compared or config.action is Reaction.off or evidence.step == 0:
        return None

    # Whether the worst task lost too much.
    worst_task = max(compared, key=lambda task: task.lost_share)
    limit = forgetting_limit(config)
    level = LEVEL / evidence.task_evaluations  # Bonferroni: each evaluation that asks tasks is one more try
    bound = worst_task.bound(level)
    exceeds_limit = limit is not None and worst_task.lost_share > limit
    is_clear = bound is not None and bound > 0 and worst_task.lost_share > MIN_LOST
    is_problem = is_clear if limit is None else exceeds_limit
    if not is_problem:
        return None

    # What is reported of it; a bound and a limit only where there is one.
    numbers = {
        "forgetting": worst_task.lost_share,
        "base": worst_task.base,
        "now": worst_task.tuned,
        "rows": float(worst_task.rows),
    }
    certainty = ""
    if bound is not None:
        numbers["bound"] = bound
        certainty = f", at least {bound:+.2%} (paired, one-sided, level {level:.2g})"
    over_limit = ""
    if limit is not None:
        numbers["limit"] = limit
        over_limit = f", more than challenges.forgetting.limit={limit:.3g}"
    return Finding(
        detector="forgetting",
        step=evidence.step,
        message=(
            f"{worst_task.name}: {worst_task.metric} went from {worst_task.base:.4f} (base) to {worst_task.tuned:.4f}: "
            f"{worst_task.lost_share:+.2%} lost{certainty}{over_limit}; {worst_task.rows} rows"
        ),
        numbers=numbers,
        remedies=REMEDIES,
        ends_run=exceeds_limit and config.action is Reaction.stop,
    )


def student_t_quantile(probability: float, degrees_of_freedom: int) -> float:
    """The value below which Student's t distribution has this `probability`, for bounds of means of few values.

    By expansion 26.7.5 of Abramowitz and Stegun: the standard library has only the normal distribution, whose quantile is the
    first term. One and two degrees, for which the expansion is too small, have closed forms.
    """
    if degrees_of_freedom == 1:
        return math.tan(math.pi * (probability - 0.5))
    if degrees_of_freedom == 2:
        return (2 * probability - 1) / math.sqrt(2 * probability * (1 - probability))
    z = NormalDist().inv_cdf(probability)
    first_term = (z**3 + z) / 4
    second_term = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third_term = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return (
        z + first_term / degrees_of_freedom + second_term / degrees_of_freedom**2 + third_term / degrees_of_freedom**3
    )
