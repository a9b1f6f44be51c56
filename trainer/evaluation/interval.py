"""`evaluation.every_steps=auto`: how often the held-out loss is computed on the way, from the sizes of the run alone.

No clock takes part, so every rank, every start and every machine comes to the same number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

EVERY_STEPS = "evaluation.every_steps"
AUTO = "auto"
"""The value of `EVERY_STEPS` that this module resolves."""
TARGET_EVALUATIONS = 20
"""Intermediate evaluations of a run that is long enough."""
MAX_TOKEN_SHARE = 0.05
"""Largest share of the run's training tokens that all intermediate evaluations together may read."""
MIN_INTERVAL_STEPS = 10
"""Fewest steps from one evaluation to the next."""


@dataclass(frozen=True, slots=True)
class RunSize:
    """The sizes that decide how often a run is evaluated."""

    total_steps: int
    """Optimizer steps of the whole run."""
    tokens_per_step: float
    """Training tokens of an optimizer step, all ranks together."""
    held_out_tokens: int
    """Tokens that one evaluation of the held-out loss reads, all ranks together."""


def automatic_evaluation_interval(size: RunSize) -> int:
    """What `evaluation.every_steps=auto` means for a run of this size: steps between two evaluations of the held-out loss.

    The largest of three lower bounds:
    - There are about twenty evaluations in the run.
    - Evaluations between the first step and the last read at most 5 % of the run's training tokens.
    - At least ten steps lie between two evaluations.

    Returns 0 if no evaluation fits between the first step and the last, or a size is 0.
    """
    if size.held_out_tokens == 0 or size.tokens_per_step <= 0:
        return 0
    steps_by_count = math.ceil(size.total_steps / TARGET_EVALUATIONS)
    steps_by_token_share = math.ceil(size.held_out_tokens / (MAX_TOKEN_SHARE * size.tokens_per_step))
    interval = max(MIN_INTERVAL_STEPS, steps_by_count, steps_by_token_share)
    return interval if interval < size.total_steps else 0


def num_intermediate_evaluations(interval: int, total_steps: int) -> int:
    """The number of evaluations after the first step and before the last one; 0 if `interval` is 0."""
    return (total_steps - 1) // interval if interval else 0


def auto_interval_reason(interval: int, size: RunSize, patience: int) -> str:
    """Say why `evaluation.every_steps=auto` became `interval` steps, for the start screen and `run.json`.

    "19 evaluations of the held-out loss on the way, 4.1% of the run's tokens". Warns if there are fewer evaluations than
    `patience` (`evaluation.patience`), because early stopping could never happen.
    """
    num_evaluations = num_intermediate_evaluations(interval, size.total_steps)
    if num_evaluations == 0:
        reason = "only before the first step and at the end: the run is too short for its held-out documents"
    else:
        token_share = num_evaluations * size.held_out_tokens / (size.total_steps * size.tokens_per_step)
        noun = "evaluation" if num_evaluations == 1 else "evaluations"
        reason = f"{num_evaluations} {noun} of the held-out loss on the way, {token_share:.1%} of the run's tokens"
    if patience > num_evaluations:
        reason += (
            f"; too few for evaluation.patience={patience}: give evaluation.every_steps a number, or hold out less"
        )
    return reason
