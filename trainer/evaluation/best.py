"""The best evaluation so far by the watched metric, and how long ago it was."""

from __future__ import annotations

from dataclasses import replace

from strategies.base import Progress
from strategies.errors import ConfigError
from trainer.evaluation.base import EvaluationConfig


def raise_if_watched_metric_is_missing(settings: EvaluationConfig, metrics: dict[str, float]) -> None:
    """Refuse to go on if `evaluation.watch` names a metric that the evaluation did not yield (`metrics`, by name).

    Raises ConfigError.
    """
    if settings.watched not in metrics:
        raise ConfigError(
            f"evaluation.watch={settings.watched}: the evaluation yields {', '.join(metrics)}; watch one of them"
        )


def record_evaluation(settings: EvaluationConfig, progress: Progress, metrics: dict[str, float]) -> bool:
    """Note in `progress`, which checkpoints store, how an evaluation went.

    Returns whether its weights should be saved as the best.

    `metrics`: the metrics by name. Better means: the watched metric improves by more than `settings.min_delta`.
    - Better than every evaluation that was seen: sets `seen_metric` and `seen_step`, and `stale_evaluations` to 0.
    - Else: `stale_evaluations` is one more. Early stopping goes by these three.
    - Better than the best evaluation whose weights were saved: sets `best_metric` and `best_step`, and returns True.

    Both may differ: weights are not saved at every improvement, since saving takes time.
    """
    value = metrics[settings.watched]
    # Checkpoints of earlier versions have no `seen_metric`.
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
    """Say why training stops early, if the watched metric has not improved for `patience` evaluations; None if it goes on."""
    if settings.patience == 0 or progress.stale_evaluations < settings.patience:
        return None
    # Of all evaluations, also of those whose weights could not be saved. Checkpoints of earlier versions have only the saved one.
    best_value = progress.best_metric if progress.seen_metric is None else progress.seen_metric
    best_step = progress.best_step if progress.seen_step is None else progress.seen_step
    return (
        f"stopping early: {settings.watched} has not improved for {settings.patience} evaluations "
        f"(best {best_value:.4f} at step {best_step})"
    )


def restore_best_evaluation(progress: Progress, saved: Progress) -> None:
    """Set the best evaluation in `progress` back to that of `saved`, an earlier state of it, whose weights are on the disk."""
    progress.best_metric = saved.best_metric
    progress.best_step = saved.best_step
    progress.seen_metric = saved.seen_metric
    progress.seen_step = saved.seen_step


class SavedProgress:
    """The progress of a run in its last checkpoints, from which the best evaluation is restored if a save fails."""

    def __init__(self, progress: Progress) -> None:
        """`progress`: at the start of this attempt. A run that resumes at its step has its checkpoint already."""
        self._saved_step: int | None = progress.step or None
        """Step of the last checkpoint, begun or written. None: the current step has none that counts."""
        self._being_saved = replace(progress)
        """`progress` as it was when the last checkpoint was begun."""
        self._last_published = replace(progress)
        """`progress` of the last checkpoint that was published: the best step in it is on the disk."""

    def is_saved(self, step: int) -> bool:
        """Whether the checkpoint of this step, the run's newest, was begun or written."""
        return self._saved_step == step

    def require_new_checkpoint(self) -> None:
        """Let the next save write a checkpoint of the current step, even if one counts as saved."""
        self._saved_step = None

    def remember_begun_checkpoint(self, progress: Progress) -> None:
        """Keep `progress` as it is when a checkpoint is begun."""
        self._being_saved = replace(progress)

    def set_to_loaded_checkpoint(self, progress: Progress) -> None:
        """Set all to a checkpoint that was loaded, whose progress `progress` is."""
        self._saved_step = progress.step
        self._being_saved = self._last_published = replace(progress)

    def record_save_outcome(self, progress: Progress, has_succeeded: bool, *, is_pending: bool) -> None:
        """Note how the save of a checkpoint went; after a failure, the best evaluation is again one that is on the disk.

        - Published (`has_succeeded`): this checkpoint's progress is what a later failure falls back to.
        - Begun, and pending (`is_pending`): it may still fail, so only its step is noted.
        - Failed: if it was the best step, the best metric in `progress` is again that of the last published checkpoint.
        """
        step = self._being_saved.step
        self._saved_step = step if has_succeeded else None
        if has_succeeded and not is_pending:
            self._last_published = self._being_saved
        elif not has_succeeded and progress.best_step == step:
            restore_best_evaluation(progress, self._last_published)
