"""Passes without gradients, and which weights the model has in them: the trained ones, their average, or the initial ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from strategies.base import InferenceWeights
from strategies.ema import WeightAverage


class InferencePasses:
    """What all engines share of `Engine.inference`: averages and initial weights change places with the model's weights."""

    step_module: nn.Module
    weight_average: WeightAverage | None
    """The moving average of the trained weights; None if the run keeps none."""
    initial_weights: WeightAverage | None
    """The trained weights as they began, if the run keeps them: an average that is never updated."""

    def _autocast(self) -> AbstractContextManager[Any]:
        """The context in which the model computes in the run's precision. Here none: engines that need one override it."""
        return nullcontext()

    def _after_weight_change(self) -> None:
        """Called after weights were changed outside a step. Engines with copies of the weights override it."""

    @contextmanager
    def inference(self, weights: InferenceWeights = InferenceWeights.averaged) -> Iterator[nn.Module]:
        """A context for passes without gradients: yields the step module in eval mode, with these weights. All ranks enter.

        Afterwards training mode and the trained weights are back.
        """
        self.step_module.eval()
        try:
            with torch.no_grad(), self._autocast(), self._weights_in_model(weights):
                yield self.step_module
        finally:
            self.step_module.train()

    def _weights_in_model(self, weights: InferenceWeights) -> AbstractContextManager[None]:
        """A context with these weights in the model; afterwards the trained weights are back. All ranks enter."""
        if weights is InferenceWeights.initial:
            assert self.initial_weights is not None, "the plan does not say `keeps_initial_weights`"
            return self._swapped_weights_in_model(self.initial_weights)
        if weights is InferenceWeights.averaged:
            return self._averaged_weights_in_model()
        return nullcontext()

    @contextmanager
    def _averaged_weights_in_model(self) -> Iterator[None]:
        """A context with the averaged weights in the model, if the run has them; then the trained ones again. All ranks enter."""
        if self.weight_average is None:
            yield
            return
        with self._swapped_weights_in_model(self.weight_average):
            yield

    @contextmanager
    def _swapped_weights_in_model(self, average: WeightAverage) -> Iterator[None]:
        """A context with the weights of `average` in the model; afterwards the trained weights are back. All ranks enter."""
        average.swap()
        self._after_weight_change()
        try:
            yield
        finally:
            average.swap()
            self._after_weight_change()
