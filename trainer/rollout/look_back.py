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

    at_start: bool
    """Whether the trained weights of the pass are those that the run began with."""

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`LOGPS`, float32 `[N]`: the log-probability of the token of each supervised row."""


class PolicyLogps:
    """Log-probabilities under the weights that are being trained."""

    at_start = False

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
        assert references.keeps_start or has_model, "the run has no reference"
        self.references = references
        self.at_start = references.keeps_start

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See `RowScorer`."""
        if self.at_start:
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

    Returns float32 [tokens of the answer] by the answer's number in the round, the same on all ranks. `scorer`: a stand-in for
    the objective that returns these numbers instead of a loss. `batches`: this rank's micro-batches, on the device. `answers`:
    for each of them the numbers of the answers in it, one a sequence; None for a sequence that fills up. Every rank must call
    with as many micro-batches as the others; ranks that share rows, with the same answers. `check_stop` is called after each
    micro-batch and may raise, on all ranks alike.
    """
    pieces: list[tuple[int, np.ndarray]] = []
    with engine.inference(averaged=False, at_start=scorer.at_start) as module:
        # Through the root module's own forward: a sharding engine gathers parameters only there.
        step: Any = module
        objective = step.objective
        step.objective = scorer
        try:
            for batch, numbers in zip(batches, answers, strict=True):
                logps = step(batch)[LOGPS].float().cpu().numpy()
                row_sequence = batch["row_sequence"].cpu().numpy()
                for place, number in enumerate(numbers):
                    if number is not None:
                        pieces.append((number, logps[row_sequence == place]))
                check_stop()
        finally:
            step.objective = objective
    # Of ranks that share a row, each has a slice of an answer. Their order is the order of the slices.
    by_answer: dict[int, list[np.ndarray]] = {}
    for rank_pieces in gather_objects(pieces, runtime):
        for number, logps in rank_pieces:
            by_answer.setdefault(number, []).append(logps)
    return {number: np.concatenate(parts) for number, parts in by_answer.items()}
