"""Passes over written answers without gradients: their log-probabilities under the weights of now, and under the reference.

The old log-probabilities are needed where a round is used for several updates; those of the reference, where the divergence
from it has a weight. Micro-batches are those of the training pass, so that both passes round alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from strategies.base import Engine
from strategies.runtime import Runtime, gather_objects
from trainer.losses.row_logps import row_logps
from trainer.objectives.base import ReferenceModels
from trainer.objectives.causal import supervised_rows

LOGPS = "logps"
"""The term that these passes return in place of a loss."""


class RowScorer(Protocol):
    """Stands in for the objective during a pass."""

    uses_initial_weights: bool
    """Whether the trained weights of the pass are those that the run began with."""

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`LOGPS`, float32 `[N]`: the log-probability of the token of each supervised row."""


class PolicyLogps:
    """Log-probabilities under the weights that are being trained."""

    uses_initial_weights = False

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See `RowScorer`."""
        head, hidden, targets = supervised_rows(model, batch)
        return {LOGPS: row_logps(head, hidden, targets, self.temperature)[0]}


class ReferenceLogps(PolicyLogps):
    """Log-probabilities under the policy as the run began.

    It is the model with the adapter's first values, where the engine keeps them. Else it is a frozen copy if there is one, and
    without one the model with its adapter off.
    """

    def __init__(self, temperature: float, references: ReferenceModels) -> None:
        super().__init__(temperature)
        has_model = references.teacher is not None or references.reference is not None
        assert references.keeps_initial_weights or has_model, "the run has no reference"
        self.references = references
        self.uses_initial_weights = references.keeps_initial_weights

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See `RowScorer`."""
        if self.uses_initial_weights:
            return super().terms(model, batch)
        if self.references.teacher is not None:
            return super().terms(self.references.teacher, batch)
        assert self.references.reference is not None
        with self.references.reference(model):
            return super().terms(model, batch)


def answer_logps(
    engine: Engine,
    batches: Sequence[dict[str, Any]],
    answers: Sequence[Sequence[int | None]],
    scorer: RowScorer,
    runtime: Runtime,
    check_stop: Callable[[], None] = lambda: None,
) -> dict[int, np.ndarray]:
    """The log-probability of each token of answers that were written before, by the present (or reference) weights.

    Returns {number of the answer in the round: float32 [tokens of the answer]}, the same on all ranks.

    `batches`: this rank's micro-batches, on the device; every rank must call with as many. `answers`: for each micro-batch the
    number of the answer in each of its sequences, or None if a sequence only fills it up, such as [[0, 4], [9, None]]. Ranks that
    share rows have the same answers. `scorer`: a stand-in for the objective that returns log-probabilities instead of a loss.
    `check_stop` is called after each micro-batch and may raise, on all ranks alike.
    """
    # This rank's (number of the answer, log-probabilities of its tokens).
    own_logps: list[tuple[int, np.ndarray]] = []
    with engine.inference(averaged=False, with_initial_weights=scorer.uses_initial_weights) as module:
        # Through the root module's own forward: a sharding engine gathers parameters only there.
        step: Any = module
        training_objective = step.objective
        step.objective = scorer
        try:
            for batch, numbers in zip(batches, answers, strict=True):
                logps = step(batch)[LOGPS].float().cpu().numpy()
                row_sequence = (
                    batch["row_sequence"].cpu().numpy()
                )  # of each token with a target: which sequence it is in
                for sequence, number in enumerate(numbers):
                    if number is not None:
                        own_logps.append((number, logps[row_sequence == sequence]))
                check_stop()
        finally:
            step.objective = training_objective

    # Ranks that share a row have a slice of the answer each, in the order of the ranks.
    slices_by_answer: dict[int, list[np.ndarray]] = {}
    for rank_logps in gather_objects(own_logps, runtime):
        for number, logps in rank_logps:
            slices_by_answer.setdefault(number, []).append(logps)
    return {number: np.concatenate(slices) for number, slices in slices_by_answer.items()}
