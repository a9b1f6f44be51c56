"""The teacher of a loss over the whole vocabulary: another, frozen model, or the same model with the adapter off."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from strategies.errors import ConfigError
from trainer.losses.next_token import LossHead
from trainer.objectives.base import Reference, ReferenceModels
from trainer.objectives.causal import states_at_targets, unwrap_adapter


class TeacherStates(NamedTuple):
    """What a teacher says of a batch: its distribution over the vocabulary is that of `head(hidden)`.

    Not the distribution itself: the loss computes it inside the head, a chunk of rows at a time. Neither has gradients.
    """

    head: nn.Module | None
    """The output head; None if the teacher has the student's own."""
    hidden: Tensor
    """`[M, H]`: hidden states at the M supervised positions of the batch, which predict a target; H is the model's width."""


class Teacher(Protocol):
    """The model that a loss compares the student with, position by position."""

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> TeacherStates:
        """Run the teacher on a batch. `model`: the student, which may be the teacher too, with its adapter off."""


class NoTeacher:
    """Stands in for a teacher where an objective is built only to count samples."""

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> TeacherStates:
        raise AssertionError("this objective was built without the model that it compares with")


class FrozenModel:
    """A second model as teacher. The step module holds it, so that it is sharded beside the student."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> TeacherStates:
        head, hidden, _targets = states_at_targets(self.model, batch)
        return TeacherStates(head, hidden)


class AdapterOff:
    """The tuned model itself as teacher, with its adapter and dropout switched off."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference

    @torch.no_grad()
    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> TeacherStates:
        """Run `model` with its adapters off and without dropout: the model before training.

        The head of the result is None if it is not trained, since then the student's is the same.
        """
        was_training = model.training
        model.eval()
        try:
            with self.reference(model):  # in this context the adapters of `model` are off
                head, hidden, _targets = states_at_targets(model, batch)
        finally:
            model.train(was_training)
        # peft wraps a head that trains in full (`modules_to_save`), and keeps the original beside the trained copy.
        head_before_training = getattr(head, "original_module", None)
        return TeacherStates(head_before_training, hidden)


def teacher_of(references: ReferenceModels) -> Teacher:
    """The teacher of a run: the frozen model if there is one, else the tuned model with its adapter off."""
    if references.teacher is not None:
        return FrozenModel(references.teacher)
    if references.reference is not None:
        return AdapterOff(references.reference)
    return NoTeacher()


def check_head_computes_divergence(model: nn.Module, setting: str) -> None:
    """Raise ConfigError if the output head cannot compute a divergence from a teacher without making all logits at once.

    A `LossHead` can, a linear layer that computes losses a chunk of rows at a time; so can one that peft has wrapped to train it
    in full (`modules_to_save`). `setting`: the one that asks for the divergence, which begins the message.
    """
    head: Any = unwrap_adapter(model).get_output_embeddings()  # type: ignore[operator]
    if isinstance(head, LossHead):
        return
    trained_copies = getattr(head, "modules_to_save", {})  # of a head that peft trains in full
    if len(trained_copies) and all(isinstance(copy, LossHead) for copy in trained_copies.values()):
        return
    raise ConfigError(
        f"{setting}: compares distributions inside the output head, which here is no plain linear layer "
        f"({type(head).__name__}); leave the output head out of tuning.targets, or train it whole with tuning.modules_to_save"
    )
