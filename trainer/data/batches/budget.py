"""How long a run trains, as it is asked for, and in steps of what it draws."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.data.batches.order import Order, steps_for_tokens


@dataclass(kw_only=True, slots=True)
class BudgetConfig:
    """How long the run trains; exactly one is set."""

    steps: int | None = None
    """Optimizer steps."""
    epochs: float | None = None
    """Passes over the training data; the last step may reach into the next pass."""
    tokens: int | None = None
    """Training tokens, all ranks together; the step that reaches the number is the last."""


def steps_from_budget(budget: BudgetConfig, order: Order, unit_tokens: np.ndarray, global_batch: int) -> int:
    """Optimizer steps of the run: set directly, or enough for the epochs or tokens asked for.

    `unit_tokens` is int [order.population].
    """
    if budget.steps is not None:
        return budget.steps
    if budget.tokens is not None:
        return steps_for_tokens(order, unit_tokens, global_batch, budget.tokens)
    epochs = budget.epochs if budget.epochs is not None else 1.0
    return max(1, -(-round(epochs * order.num_units) // global_batch))
