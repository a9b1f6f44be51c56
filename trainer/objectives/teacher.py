"""The teacher of a loss over the whole vocabulary: another, frozen model, or the same model with the adapter off."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from strategies.errors import ConfigError
from trainer.losses.next_token import LossHead
from trainer.objectives.base import Beside, Reference
from trainer.objectives.causal import plain_model, supervised_rows


class Teacher(Protocol):
    """Gives the states that a distribution over the vocabulary is made of."""

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> tuple[nn.Module | None, Tensor]:
        """(head, None for the student's own; states `[M, H]` at the supervised rows of `batch`), without gradients."""


class Nobody:
    """Stands in where an objective only counts samples."""

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> tuple[nn.Module | None, Tensor]:
        raise AssertionError("this objective was built without the model that it compares with")


class FrozenModel:
    """A model of its own, held by the step module."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> tuple[nn.Module | None, Tensor]:
        head, hidden, _ = supervised_rows(self.model, batch)
        return head, hidden


class AdapterOff:
    """The tuned model without its adapter and without dropout."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference

    @torch.no_grad()
    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> tuple[nn.Module | None, Tensor]:
        training = model.training
        model.eval()
        try:
            with self.reference(model):
                head, hidden, _ = supervised_rows(model, batch)
        finally:
            model.train(training)
        # A head that is trained in full stands beside the one it was copied from.
        return getattr(head, "original_module", None), hidden


def teacher_of(beside: Beside) -> Teacher:
    """The frozen model that stands beside, else the tuned one with its adapter off."""
    if beside.teacher is not None:
        return FrozenModel(beside.teacher)
    return Nobody() if beside.reference is None else AdapterOff(beside.reference)


def check_head(model: nn.Module, what: str) -> None:
    """Raise ConfigError where the output head cannot compare distributions without making all logits."""
    head: Any = plain_model(model).get_output_embeddings()  # type: ignore[operator]
    wrapped = getattr(head, "modules_to_save", {})
    if not isinstance(head, LossHead) and not (len(wrapped) and all(isinstance(m, LossHead) for m in wrapped.values())):
        raise ConfigError(
            f"{what}: compares distributions inside the output head, which here is no plain linear layer "
            f"({type(head).__name__}); leave it out of tuning.targets, or train it whole with tuning.modules_to_save"
        )
