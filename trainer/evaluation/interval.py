"""`evaluation.every_steps=auto`: how often the held-out loss is computed on the way, from the sizes of the run alone.

No clock takes part, so every rank, every start and every machine comes to the same number.
"""

from __future__ import annotations

from dataclasses import dataclass

EVERY_STEPS = "evaluation.every_steps"
AUTO = "auto"
"""The value of `EVERY_STEPS` that this module resolves."""
EVALUATIONS = 20
"""Evaluations of a run that is long enough."""
MOST_SHARE = 0.05
"""Largest share of the run's tokens that the evaluations on the way may read."""
LEAST_STEPS = 10
"""Fewest steps from one evaluation to the next."""


@dataclass(frozen=True, slots=True)
class RunSize:
    """The sizes that decide how often a run is evaluated."""

    total_steps: int
    tokens_per_step: float
    """Training tokens, all ranks together."""
    held_out_tokens: int
    """Tokens that one evaluation reads, all ranks together."""


def automatic_interval(size: RunSize) -> int:
    """Steps between two evaluations of the held-out loss; 0 if none fits between the first step and the last.

    About twenty a run; at most 5 % of the run's tokens, without the evaluations at the start and at the end; never more often
    than every ten steps.
    """
    if size.held_out_tokens == 0 or size.tokens_per_step <= 0:
        return 0
    for_share = size.held_out_tokens / (MOST_SHARE * size.tokens_per_step)
    interval = max(LEAST_STEPS, _rounded_up(size.total_steps / EVALUATIONS), _rounded_up(for_share))
    return interval if interval < size.total_steps else 0


def evaluations_on_the_way(interval: int, total_steps: int) -> int:
    """Evaluations after the first step and before the last one."""
    return (total_steps - 1) // interval if interval else 0


def reason_for(interval: int, size: RunSize, patience: int) -> str:
    """Why `auto` became this interval, for the start screen and `run.json`."""
    count = evaluations_on_the_way(interval, size.total_steps)
    if count == 0:
        reason = "only before the first step and at the end: the run is too short for its held-out documents"
    else:
        share = count * size.held_out_tokens / (size.total_steps * size.tokens_per_step)
        times = "evaluation" if count == 1 else "evaluations"
        reason = f"{count} {times} of the held-out loss on the way, {share:.1%} of the run's tokens"
    if patience > count:
        reason += (
            f"; too few for evaluation.patience={patience}: give evaluation.every_steps a number, or hold out less"
        )
    return reason


def _rounded_up(number: float) -> int:
    return -int(-number // 1)
