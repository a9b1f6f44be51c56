"""The closing sentence of a run: does it overfit, and would more steps help?

It is read off the held-out losses of the run's evaluations (or the held-out rewards, of a run that learns from rewards). It is
no test: `trainer/monitors/overfitting.py` has one, which needs at least five evaluations after the best. This sentence says what
can be seen from as many as there are, also from none.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.monitors.rewards import no_signal_of_run
from trainer.reporting.numbers import format_metric
from trainer.reporting.outcome import TrainingOutcome

LEVEL_CHANGE_SHARE = 0.01
"""Relative change of the held-out loss below which it counts as level."""
LAST_SHARE_OF_RUN = 0.25
"""Share of the run, at its end, over which a falling held-out loss means that more steps may help."""


@dataclass(frozen=True, slots=True)
class HeldOutPoint:
    """One evaluation after the first step."""

    step: int
    held_out: float
    """The held-out loss, or the held-out reward with its sign turned: smaller is better."""
    train: float
    """Mean of the training loss (reward) since the evaluation before, with the same sign."""


def closing_sentence(outcome: TrainingOutcome, *, from_rewards: bool) -> str:
    """Say at a run's end whether it overfits and whether more steps would help, as one sentence.

    By its held-out and training losses at each evaluation; if nothing could be learned from its rewards, the sentence says that.
    `from_rewards`: the run learns from rewards. A higher reward is better, so its sign is turned to compare it like a loss.
    """
    no_signal = no_signal_of_run(outcome.progress.reward_blocks)
    if no_signal is not None:
        return f"{no_signal.message}: {no_signal.remedies[0]}; another optim.lr does not help"
    quantity = "reward" if from_rewards else "loss"
    sign = -1.0 if from_rewards else 1.0
    evaluations = outcome.progress.evaluations
    points = [
        HeldOutPoint(int(row["step"]), sign * row["held_out"], sign * row["train"])
        for row in evaluations
        if row["step"]
    ]
    if not points:
        return "nobody can know, since nothing is held out: data.eval_share=0.05 holds out one document in twenty"
    evaluation_before_training = None  # of the model before training, if step 0 was evaluated
    if evaluations[0]["step"] == 0:
        evaluation_before_training = sign * evaluations[0]["held_out"]
    if len(points) == 1:
        return _sentence_on_one_evaluation(points[0], evaluation_before_training, quantity, sign)

    best = min(points, key=lambda point: point.held_out)
    last = points[-1]
    share_lost_since_best = _relative_difference(best.held_out, last.held_out)
    share_gained_in_last_quarter = _relative_difference(last.held_out, _point_before_last_quarter(points).held_out)
    got_worse = share_lost_since_best > LEVEL_CHANGE_SHARE
    training_improved = last.train <= best.train
    still_improves = best is last and share_gained_in_last_quarter > LEVEL_CHANGE_SHARE

    best_text = f"held-out {quantity} best at step {best.step} ({format_metric(sign * best.held_out)})"
    if evaluation_before_training is not None and best.held_out >= evaluation_before_training:
        before_text = format_metric(sign * evaluation_before_training)
        return f"no step is better than the model before training ({before_text}): a lower optim.lr, not more steps"
    if got_worse and training_improved:
        return (
            f"yes: {best_text}, {share_lost_since_best:.0%} worse since then while training went on to improve: "
            "fewer steps or more data"
        )
    if got_worse:
        return (
            f"no, but it got worse: {best_text}, {share_lost_since_best:.0%} worse since then, training too: "
            "a lower optim.lr, not more steps"
        )
    if still_improves:
        return (
            f"no sign of it: {best_text}, {share_gained_in_last_quarter:.0%} better over the last quarter: "
            "more steps may help"
        )
    return f"no sign of it: {best_text}, level at the end: more steps would gain little"


def _sentence_on_one_evaluation(point: HeldOutPoint, before: float | None, quantity: str, sign: float) -> str:
    """Say what a single evaluation, at the end of a run, tells about overfitting.

    `before`: the held-out value before training, or None. `point` and `before` are smaller if better; `sign` turns them back into
    the `quantity` (loss or reward) that is shown.
    """
    advice = "evaluation.every_steps=<steps> evaluates on the way"
    if before is None:
        return f"one evaluation cannot tell (held-out {quantity} {format_metric(sign * point.held_out)}); {advice}"
    comparison = (
        f"held-out {quantity} {format_metric(sign * before)} before, {format_metric(sign * point.held_out)} at the end"
    )
    if point.held_out >= before:
        return f"{comparison}: no better than before training: a lower optim.lr, not more steps"
    return f"one evaluation cannot tell ({comparison}); more steps may help; {advice}"


def _point_before_last_quarter(points: list[HeldOutPoint]) -> HeldOutPoint:
    """The last evaluation before the last quarter of the run; the first evaluation if all of them are in that quarter."""
    last_quarter_start = (1 - LAST_SHARE_OF_RUN) * points[-1].step
    earlier_points = [point for point in points if point.step <= last_quarter_start]
    return earlier_points[-1] if earlier_points else points[0]


def _relative_difference(better: float, worse: float) -> float:
    """How much `worse` is above `better`, as a share of `better`."""
    return (worse - better) / (abs(better) or 1.0)
