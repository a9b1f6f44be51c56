"""The best evaluation so far by the watched metric, and how long ago it was."""

from __future__ import annotations

from strategies.base import Progress
from strategies.errors import ConfigError
from trainer.evaluation.base import EvaluationConfig


def raise_if_watched_metric_is_missing(settings: EvaluationConfig, values: dict[str, float]) -> None:
    """Raise ConfigError if the evaluation did not yield the watched metric."""
    if settings.watched not in values:
        raise ConfigError(
            f"evaluation.watch={settings.watched}: the evaluation yields {', '.join(values)}; watch one of them"
        )


def record_evaluation(settings: EvaluationConfig, progress: Progress, values: dict[str, float]) -> bool:
    """Record an evaluation in `progress`. Returns whether it is the best one so far, so that its weights should be saved.

    `values`: the metrics of the evaluation by name. Better means: the watched metric improves by more than `settings.min_delta`.
    - Better than every evaluation that was seen: sets `seen_metric` and `seen_step`, and `stale_evaluations` to 0.
    - Else: `stale_evaluations` is one more. Early stopping goes by these three.
    - Better than the best evaluation whose weights were saved: sets `best_metric` and `best_step`, and returns True.
    """
    value = values[settings.watched]
    best_seen = progress.best_metric if progress.seen_metric is None else progress.seen_metric
    if _improvement(settings, value, best_seen) > settings.min_delta:
        progress.seen_metric = value
        progress.seen_step = progress.step
        progress.stale_evaluations = 0
    else:
        progress.stale_evaluations += 1
    if _improvement(settings, value, progress.best_metric) > settings.min_delta:
        progress.best_metric = value
        progress.best_step = progress.step
        return True
    return False


def _improvement(settings: EvaluationConfig, value: float, earlier: float | None) -> float:
    """How much better a value of the watched metric is than an earlier one; negative if it is worse."""
    if earlier is None:
        return float("inf")  # the first evaluation is the best so far, also with a NaN
    return value - earlier if settings.greater_is_better else earlier - value


def early_stopping_reason(settings: EvaluationConfig, progress: Progress) -> str | None:
    """Why training stops early, if the watched metric has not improved for `patience` evaluations; else None."""
    if settings.patience == 0 or progress.stale_evaluations < settings.patience:
        return None
    best = progress.best_metric if progress.seen_metric is None else progress.seen_metric
    step = progress.best_step if progress.seen_step is None else progress.seen_step
    return (
        f"stopping early: {settings.watched} has not improved for {settings.patience} evaluations "
        f"(best {best:.4f} at step {step})"
    )


def restore_best_evaluation(progress: Progress, saved: Progress) -> None:
    """Set the best evaluation in `progress` back to that of `saved`, an earlier state of it, whose weights are on the disk."""
    progress.best_metric = saved.best_metric
    progress.best_step = saved.best_step
    progress.seen_metric = saved.seen_metric
    progress.seen_step = saved.seen_step
