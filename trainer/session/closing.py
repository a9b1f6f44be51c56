"""The closing sentence of a run: does it overfit, and would more steps help?

It is read off the held-out losses of the run's evaluations (or the held-out rewards, of a run that learns from rewards). It is
no test: `trainer/monitors/overfitting.py` has one, which needs at least five evaluations after the best. This sentence says what
can be seen from as many as there are, also from none.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.reporting.numbers import readable
from trainer.reporting.outcome import Outcome

SMALL = 0.01
"""Relative change of the held-out loss below which it counts as level."""
LAST_PART = 0.25
"""Share of the run over which it is looked at whether the loss still falls."""


@dataclass(frozen=True, slots=True)
class HeldOutPoint:
    """One evaluation after the first step."""

    step: int
    held_out: float
    """The held-out loss, or the held-out reward with its sign turned: smaller is better."""
    train: float
    """Mean of the training loss (reward) since the evaluation before, with the same sign."""


def closing_sentence(outcome: Outcome, *, from_rewards: bool) -> str:
    """Whether the run overfits and whether more steps would help, as one sentence for its last lines.

    `from_rewards`: it learns from rewards, of which more is better, so that signs are turned to compare them like losses.
    """
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
    before = sign * evaluations[0]["held_out"] if not evaluations[0]["step"] else None
    if len(points) == 1:
        return _sentence_of_one(points[0], before, quantity, sign)

    best = min(points, key=lambda point: point.held_out)
    last = points[-1]
    change = _relative(best.held_out, last.held_out)
    where = f"held-out {quantity} best at step {best.step} ({readable(sign * best.held_out)})"
    if before is not None and best.held_out >= before:
        return f"no step is better than the model before training ({readable(sign * before)}): a lower optim.lr, not more steps"
    if change > SMALL:
        if last.train <= best.train:
            return f"yes: {where}, {change:.0%} worse since then while training went on to improve: fewer steps or more data"
        return f"no, but it got worse: {where}, {change:.0%} worse since then, training too: a lower optim.lr, not more steps"
    gain = _relative(last.held_out, _point_before_last_part(points).held_out)
    if best is last and gain > SMALL:
        return f"no sign of it: {where}, {gain:.0%} better over the last quarter: more steps may help"
    return f"no sign of it: {where}, level at the end: more steps would gain little"


def _sentence_of_one(point: HeldOutPoint, before: float | None, quantity: str, sign: float) -> str:
    """The sentence of a run that was evaluated only at its end."""
    more = "evaluation.every_steps=<steps> evaluates on the way"
    if before is None:
        return f"one evaluation cannot tell (held-out {quantity} {readable(sign * point.held_out)}); {more}"
    values = f"held-out {quantity} {readable(sign * before)} before, {readable(sign * point.held_out)} at the end"
    if point.held_out >= before:
        return f"{values}: no better than before training: a lower optim.lr, not more steps"
    return f"one evaluation cannot tell ({values}); more steps may help; {more}"


def _point_before_last_part(points: list[HeldOutPoint]) -> HeldOutPoint:
    """The last evaluation before the last quarter of the run; the first one if all are in it."""
    begin = (1 - LAST_PART) * points[-1].step
    earlier = [point for point in points if point.step <= begin]
    return earlier[-1] if earlier else points[0]


def _relative(better: float, worse: float) -> float:
    """How much `worse` is above `better`, as a share of `better`."""
    return (worse - better) / (abs(better) or 1.0)
