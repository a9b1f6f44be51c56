"""The best evaluation so far by the watched metric, and how long ago it was."""

from __future__ import annotations

from strategies.base import Progress
from strategies.errors import ConfigError
from trainer.evaluation.base import EvaluationConfig


def check_watched_metric(settings: EvaluationConfig, values: dict[str, float]) -> None:
    """Raise ConfigError if the evaluation did not yield the watched metric."""
    if settings.watched not in values:
        raise ConfigError(
            f"evaluation.watch={settings.watched}: the evaluation yields {', '.join(values)}; watch one of them"
        )


def record_evaluation(settings: EvaluationConfig, progress: Progress, values: dict[str, float]) -> bool:
    """Update best metric, best step and the count of stale evaluations in `progress`; returns whether this one is the best.

    `values`: the metrics of the evaluation by name. An improvement of the watched metric counts from `min_delta` on.
    """
    watched_value = values[settings.watched]
    if progress.best_metric is None:
        improvement = float("inf")  # the first evaluation is the best so far, also with a NaN
    elif settings.greater_is_better:
        improvement = watched_value - progress.best_metric
    else:
        improvement = progress.best_metric - watched_value

    if improvement > settings.min_delta:
        progress.best_metric = watched_value
        progress.best_step = progress.step
        progress.stale_evaluations = 0
        return True
    progress.stale_evaluations += 1
    return False


def early_stopping_reason(settings: EvaluationConfig, progress: Progress) -> str | None:
    """Why training stops early, if the watched metric has not improved for `patience` evaluations; else None."""
    if settings.patience == 0 or progress.stale_evaluations < settings.patience:
        return None
    return (
        f"stopping early: {settings.watched} has not improved for {settings.patience} evaluations "
        f"(best {progress.best_metric:.4f} at step {progress.best_step})"
    )
