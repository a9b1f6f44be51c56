"""Overfitting: since its lowest value the held-out loss rises, its gap to the training loss grows, and that one does not rise.

Of the evaluations after the one with the lowest held-out loss, the first two are tested for a rising trend (Mann and Kendall,
one-sided, exact). A held-out loss that drifts, as under a rate that is a little too high, rises smoothly and passes its test
whatever the level is: the gap alone tells that from overfitting, and it is looked at in every evaluation. Its level is therefore
divided by their number; and what makes both losses worse is not called overfitting. By simulation a run whose held-out loss
drifts while gap and training loss hover is called overfitting in 1 % of runs of 10 to 50 evaluations, and one in which all
hover in fewer (`tests/monitors/test_trend.py`); what real runs gave: `benchmarks/challenges`.
"""

from __future__ import annotations

from trainer.monitors.base import Evidence, Finding
from trainer.monitors.config import OverfittingConfig, Reaction
from trainer.monitors.trend import rising

HELD_OUT, GAP = 0.01, 0.05
"""Levels of the two tests; that of the gap is divided by the evaluations of the run."""
LEAST = 5
"""Evaluations after the lowest held-out loss, before which nothing is told: fewer cannot reach the level."""
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


def numbers(seen: Evidence) -> dict[str, float]:
    """What is logged in each evaluation: the gap, and p-values of both trends once they can be told."""
    if not seen.history or seen.history[-1]["step"] == 0:
        return {}
    last = seen.history[-1]
    found = {"overfitting/gap": last["held_out"] - last["train"]}
    later = _after_lowest(seen.history)
    if len(later) >= LEAST:
        found["overfitting/p_held_out"] = rising([each["held_out"] for each in later])
        found["overfitting/p_gap"] = rising([each["held_out"] - each["train"] for each in later])
    return found


def find(config: OverfittingConfig, seen: Evidence) -> Finding | None:
    """What the evaluations up to now say."""
    measured = numbers(seen)
    if "overfitting/p_gap" not in measured or config.action is Reaction.off:
        return None
    if measured["overfitting/p_held_out"] > HELD_OUT or measured["overfitting/p_gap"] > GAP / max(1, seen.planned):
        return None
    if rising([each["train"] for each in _after_lowest(seen.history)]) < 0.5:
        return None
    best = min(seen.history, key=lambda each: each["held_out"])
    last = seen.history[-1]
    return Finding(
        challenge="overfitting",
        step=seen.step,
        says=(
            f"the held-out loss rose from {best['held_out']:.4f} at step {best['step']:.0f} to {last['held_out']:.4f} while its "
            f"gap to the training loss grew to {last['held_out'] - last['train']:.4f}, in {len(_after_lowest(seen.history))} "
            f"evaluations (Mann-Kendall: p {measured['overfitting/p_held_out']:.2g} and {measured['overfitting/p_gap']:.2g})"
        ),
        numbers={key.rpartition("/")[2]: value for key, value in measured.items()} | {"best_step": best["step"]},
        remedies=REMEDIES,
        stops=config.action is Reaction.stop,
    )


def _after_lowest(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """The evaluations after that with the lowest held-out loss; the one before the first step has no training loss."""
    lowest = min(range(len(history)), key=lambda place: history[place]["held_out"])
    return history[lowest + 1 :]
