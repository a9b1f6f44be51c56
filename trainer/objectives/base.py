"""What an objective is, and the settings of each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainer.data.dataset import Sample


MOST_BITS = 62
"""Labels of one document that a prepared data set can keep, a bit each."""


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
    """Labels of a document, predicted from the sequence-classification head: one, or any number of them."""

    name: ObjectiveName = ObjectiveName.classification
    labels: list[str] | None = None
    """Label names in the order of their ids; default: the sorted labels of the training data."""
    multi_label: bool = False
    """A document has any number of labels: a list, or one text with `|` between them, empty for none; 62 labels at most."""
    class_weights: Any = None
    """A weight for each label in the order of `labels`, or `balanced`; with `multi_label` it counts where the label is true."""


def problems(config: ObjectiveConfig) -> Iterator[str]:
    """What is wrong with an objective's own settings, one line each."""
    if not isinstance(config, ClassificationConfig):
        return
    labels, weights = config.labels, config.class_weights
    if labels is not None and len(set(labels)) < max(1 if config.multi_label else 2, len(labels)):
        yield f"objective.labels={labels}: must be two or more different names; null takes those of the data"
    if labels is not None and config.multi_label and len(labels) > MOST_BITS:
        yield f"objective.labels: {len(labels)} names, at most {MOST_BITS} with objective.multi_label=true; leave some out"
    if labels is not None and config.multi_label and (marked := next((n for n in labels if "|" in n), None)):
        yield f"objective.labels: {marked!r} contains |, which stands between labels; rename it"
    if weights is None or weights == "balanced":
        return
    numbers = weights if isinstance(weights, list) else []
    if not numbers or not all(isinstance(w, int | float) and math.isfinite(w) and w > 0 for w in numbers):
        yield f"objective.class_weights={weights}: must be balanced, or a list of numbers above 0, one for each label"
    elif labels is not None and len(numbers) != len(labels):
        yield f"objective.class_weights: {len(numbers)} weights for {len(labels)} labels; give one for each, or balanced"


class Objective(Protocol):
    """Turns a batch into sums and a sample into the counts that divide them.

    The term `loss` carries the gradient; other terms are for metrics and carry none. A term may be made in evaluation
    only, and then have a shape (`confusion`).
    """

    def counts(self, sample: Sample) -> dict[str, int]:
        """Denominators that this sample adds, by term; stored when the data is prepared, after the shift."""

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Sums over the micro-batch, by term: float32 tensors on the model's device, 0-d in training."""
