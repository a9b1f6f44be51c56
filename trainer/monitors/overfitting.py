"""Overfitting: since its lowest value the held-out loss rises, its gap to the training loss grows, and that one does not rise.

Of the evaluations after the one with the lowest held-out loss, the first two are tested for a rising trend (Mann and Kendall,
one-sided, exact). A held-out loss that drifts, as under a rate that is a little too high, rises smoothly and passes its test
whatever the level is: the gap alone tells that from overfitting, and it is looked at in every evaluation. Its level is
therefore divided by their number; and what makes both losses worse is not called overfitting. By simulation a run whose
held-out loss drifts while gap and training loss hover is called overfitting in 1 % of runs of 10 to 50 evaluations, and one
in which all hover in fewer (`tests/monitors/test_trend.py`); what real runs gave: `benchmarks/challenges`.
"""

from __future__ import annotations

import math

from strategies.base import Progress
from trainer.monitors.base import Evidence, Finding
from trainer.monitors.config import OverfittingConfig, Reaction
from trainer.monitors.trend import rising_p_value

HELD_OUT_LEVEL = 0.01
"""p-value below which the held-out loss counts as rising."""
GAP_LEVEL = 0.05
"""p-value below which the gap counts as growing, divided by the evaluations of the run."""
MIN_EVALUATIONS = 5
"""Evaluations after the lowest held-out loss, before which nothing is reported: fewer cannot reach the level."""
REMEDIES = (
    "evaluation.patience=3 (stop at the best)",
    "fewer budget.epochs, or more and other data",
    "a lower optim.lr",
    "tuning=lora with a lower tuning.rank",
    "tuning.dropout=0.1",
    "optim.weight_decay=0.1",
    "model.neftune_alpha=5",
    "objective.label_smoothing=0.1",
    "optim.ema_decay=0.99",
)


def add_to_history(progress: Progress, held_out_value: float | None) -> None:
    """Add an evaluation to `progress.evaluations`, the history that overfitting is judged by; it is in checkpoints.

    `held_out_value`: the held-out loss, or the reward of a run that learns from rewards. Beside it stands the mean training
    loss (or reward) since the last evaluation, whose sum starts anew. Nothing is added if the value is unknown or not finite,
    or if no step was taken since the last evaluation.
    """
    num_steps = progress.interval_steps
    is_before_training = progress.step == 0
    if held_out_value is None or not math.isfinite(held_out_value) or (num_steps == 0 and not is_before_training):
        return
    if is_before_training:
        training_value = held_out_value  # no step was taken yet
    else:
        training_value = progress.interval_loss / num_steps
    progress.evaluations.append({"step": float(progress.step), "train": training_value, "held_out": held_out_value})
    progress.interval_loss = 0.0
    progress.interval_steps = 0


def logged_metrics(evidence: Evidence) -> dict[str, float]:
    """The metrics that this detector adds to an evaluation: the gap between held-out and training loss, and two p-values.

    {"overfitting/gap": 0.2, "overfitting/p_held_out": 0.004, "overfitting/p_gap": 0.01}: of the tests for rising trends. The
    trends are those of the held-out loss and of the gap, over the evaluations since the lowest held-out loss; they are left
    out while those are too few. Empty before the first step.
    """
    if not evidence.history or evidence.history[-1]["step"] == 0:
        return {}
    metrics = {"overfitting/gap": _loss_gap(evidence.history[-1])}
    later = _evaluations_after_lowest(evidence.history)
    if len(later) >= MIN_EVALUATIONS:
        metrics["overfitting/p_held_out"] = rising_p_value([evaluation["held_out"] for evaluation in later])
        metrics["overfitting/p_gap"] = rising_p_value([_loss_gap(evaluation) for evaluation in later])
    return metrics


def _loss_gap(evaluation: dict[str, float]) -> float:
    """How far the held-out loss is above the training loss."""
    return evaluation["held_out"] - evaluation["train"]


def find_problem(config: OverfittingConfig, evidence: Evidence) -> Finding | None:
    """Report that the run overfits, after an evaluation; None if the evaluations so far do not show it.

    It needs three things: since its lowest value the held-out loss rises, its gap to the training loss grows, and the training
    loss does not rise. Each is a Mann-Kendall test for a trend. `evidence.history` has both losses of each evaluation so far,
    such as {"step": 100.0, "train": 1.9, "held_out": 2.1}.
    """
    measured = logged_metrics(evidence)
    if "overfitting/p_gap" not in measured or config.action is Reaction.off:
        return None
    p_held_out = measured["overfitting/p_held_out"]
    p_gap = measured["overfitting/p_gap"]
    gap_level = GAP_LEVEL / max(1, evidence.planned_evaluations)  # Bonferroni: the gap is tested in each evaluation
    if p_held_out > HELD_OUT_LEVEL or p_gap > gap_level:
        return None
    later_evaluations = _evaluations_after_lowest(evidence.history)
    # If the training loss rises too, something else is wrong than overfitting. Below 0.5 it rises more often than it falls.
    if rising_p_value([evaluation["train"] for evaluation in later_evaluations]) < 0.5:
        return None
    best_evaluation = min(evidence.history, key=lambda evaluation: evaluation["held_out"])
    last_evaluation = evidence.history[-1]
    numbers = {key.rpartition("/")[2]: value for key, value in measured.items()}  # `gap`, `p_held_out`, `p_gap`
    numbers["best_step"] = best_evaluation["step"]
    return Finding(
        detector="overfitting",
        step=evidence.step,
        message=(
            f"the held-out loss rose from {best_evaluation['held_out']:.4f} at step {best_evaluation['step']:.0f} to "
            f"{last_evaluation['held_out']:.4f} while its gap to the training loss grew to {_loss_gap(last_evaluation):.4f}, "
            f"in {len(later_evaluations)} evaluations (Mann-Kendall: p {p_held_out:.2g} and {p_gap:.2g})"
        ),
        numbers=numbers,
        remedies=REMEDIES,
        ends_run=config.action is Reaction.stop,
    )


def _evaluations_after_lowest(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """The evaluations after the best one so far (the lowest held-out loss), oldest first: where overfitting would show.

    The evaluation before the first step is never among them: it has no training loss.
    """
    held_out_losses = [evaluation["held_out"] for evaluation in history]
    lowest = held_out_losses.index(min(held_out_losses))
    return history[lowest + 1 :]
