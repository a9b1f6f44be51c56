"""What an objective is, and the settings of each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainer.data.dataset import Sample


class ObjectiveName(StrEnum):
    """The names users type as `objective=<name>`."""

    sft = "sft"
    classification = "classification"


@dataclass(kw_only=True, slots=True)
class ObjectiveConfig:
    """Settings shared by all objectives."""

    name: ObjectiveName = ObjectiveName.sft
    """Which objective runs; set by the group choice `objective=<name>`, not by hand."""


@dataclass(kw_only=True, slots=True)
class SftConfig(ObjectiveConfig):
    """Supervised fine-tuning: next-token loss on the supervised tokens."""


@dataclass(kw_only=True, slots=True)
class ClassificationConfig(ObjectiveConfig):
    """One label a document, predicted from the sequence-classification head."""

    name: ObjectiveName = ObjectiveName.classification
    labels: list[str] | None = None
    """Label names in the order of their ids; default: the sorted labels of the training data."""


class Objective(Protocol):
    """Turns a batch into sums and a sample into the counts that divide them.

    The term `loss` carries the gradient; other terms are for metrics and carry none.
    """

    def counts(self, sample: Sample) -> dict[str, int]:
        """Denominators that this sample adds, by term; stored when the data is prepared, after the shift."""

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Sums over the micro-batch, by term: 0-d float32 tensors on the model's device."""
