"""Forward passes over generated answers: their log-probabilities under the present weights, and under the reference model.

Those under the present weights (the old log-probabilities) are needed if a round is used for several updates; those under the
reference model, if the KL divergence from it has a weight. Micro-batches are those of the training pass, so that both passes
round alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from strategies.base import Engine, InferenceWeights
from strategies.runtime import Runtime, gather_objects
from trainer.losses.row_logps import row_logps
from trainer.objectives.base import ReferenceModels
from trainer.objectives.causal import states_at_targets

LOGPS = "logps"
"""The term that these passes return in place of a loss."""


class RowScorer(Protocol):
    """Takes the place of the objective in a step module: returns log-probabilities instead of a loss."""

    uses_initial_weights: bool
    """Whether the forward pass uses the weights that the run began with."""

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """{LOGPS: float32 [N]}: the log-probability of each of the N target tokens of a micro-batch."""


class PolicyLogps:
    """Makes a step module return log-probabilities under the weights that are being trained."""

    uses_initial_weights = False

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See `RowScorer`."""
        head, hidden, targets = states_at_targets(model, batch)
        return {LOGPS: row_logps(head, hidden, targets, self.temperature)[0]}


class ReferenceLogps(PolicyLogps):
    """Log-probabilities under the reference model: the policy as the run began.

    The first of these that the run has: the model with the adapter's initial values, which the engine keeps; a frozen copy of the
    model (`references.teacher`); the model with its adapter disabled (`references.reference`).
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
    answer_numbers: Sequence[Sequence[int | None]],
    scorer: RowScorer,
    runtime: Runtime,
    check_stop: Callable[[], None] = lambda: None,
) -> dict[int, np.ndarray]:
    """Compute the log-probability of each token of generated answers by forward passes, the same on all ranks.

    Returns {answer number: float32 [tokens]}. All ranks must call, with as many micro-batches each.

    `batches`: this rank's micro-batches, on the device.
    `answer_numbers`: by micro-batch, the number of the answer in each of its sequences, None for a filler: [[0, 4], [9, None]].
    Ranks that split rows have the same answers.
    `scorer`: by which weights.
    `check_stop`: called after each micro-batch; it may raise, on all ranks alike.
    """
    local_logps: list[tuple[int, np.ndarray]] = []  # (answer number, log-probabilities of its tokens)
    weights = InferenceWeights.initial if scorer.uses_initial_weights else InferenceWeights.trained
    with engine.inference(weights) as module:
        # The model is called through the root module's own forward, because only there a sharding engine gathers parameters.
        # For these passes, `scorer` takes the place of the objective.
        step_module: Any = module
        training_objective = step_module.objective
        step_module.objective = scorer
        try:
            for batch, numbers in zip(batches, answer_numbers, strict=True):
                logps = step_module(batch)[LOGPS].float().cpu().numpy()
                sequence_of_target = batch["row_sequence"].cpu().numpy()  # index of its sequence in the batch
                for sequence, number in enumerate(numbers):
                    if number is not None:
                        local_logps.append((number, logps[sequence_of_target == sequence]))
                check_stop()
        finally:
            step_module.objective = training_objective

    # Ranks that split a row have a slice of the answer each, in the order of the ranks.
    slices_by_answer: dict[int, list[np.ndarray]] = {}
    for rank_logps in gather_objects(local_logps, runtime):
        for number, logps in rank_logps:
            slices_by_answer.setdefault(number, []).append(logps)
    return {number: np.concatenate(slices) for number, slices in slices_by_answer.items()}
