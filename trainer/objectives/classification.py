"""Labels of a document, from the model's own sequence-classification head: one of several, or any number of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strategies.errors import ConfigError, DataError

if TYPE_CHECKING:
    from trainer.data.store.sequences import Sample


class Classification:
    """One label a document. Terms: `loss` (summed cross-entropy), `accuracy` (documents right), and `confusion`.

    `weights` multiply each document's loss by its label's; the denominator stays the number of documents.
    """

    def __init__(self, weights: Sequence[float] | None = None) -> None:
        self._weights = weights
        self._on_device: Tensor | None = None

    sequences_per_document = 1
    perplexity = False
    metrics: tuple[str, ...] = ("accuracy",)
    head_labels: int | None = 0
    uses_reference = False
    looks_ahead = False

    def counts(self, sample: Sample) -> dict[str, int]:
        """A document counts once, however many labels it has."""
        return {"loss": 1}

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Run padded rows; a label of -100 (a filler row of an evaluation batch) counts nothing.

        Without gradients `confusion [3, labels]` is made too: by label, how often it was right, predicted, and true.
        """
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        loss, predicted, true = self._judge(logits, batch["labels"])
        valid = (batch["labels"] >= 0)[:, None]
        terms = {"loss": loss, "accuracy": ((predicted == true).all(-1, keepdim=True) & valid).sum().float()}
        if not torch.is_grad_enabled():
            predicted, true = predicted & valid, true & valid
            terms["confusion"] = torch.stack([(predicted & true).sum(0), predicted.sum(0), true.sum(0)]).float()
        return terms

    def _judge(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The summed loss, and what is predicted and true, both bool [rows, labels]."""
        weight = self._weight(logits)
        loss = F.cross_entropy(logits, labels, weight=weight, reduction="sum", ignore_index=-100)
        numbers = torch.arange(logits.shape[1], device=logits.device)
        return loss, logits.argmax(-1, keepdim=True) == numbers, labels[:, None] == numbers

    def _weight(self, logits: Tensor) -> Tensor | None:
        if self._weights is None:
            return None
        if len(self._weights) != logits.shape[1]:
            raise ConfigError(
                f"objective.class_weights={list(self._weights)}: the data has {logits.shape[1]} labels; give a weight "
                "for each, in the order of objective.labels (or of the sorted names), or balanced"
            )
        if self._on_device is None or self._on_device.device != logits.device:
            self._on_device = torch.tensor(list(self._weights), dtype=torch.float32, device=logits.device)
        return self._on_device


class MultiLabel(Classification):
    """Any number of labels a document, as the bits of an integer. Terms: `loss` is binary cross-entropy summed over labels.

    `accuracy` counts documents all of whose labels are right; `weights` multiply the loss of a label where it is true.
    """

    def _judge(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        true = (labels[:, None] >> torch.arange(logits.shape[1], device=logits.device)) & 1 > 0
        loss = F.binary_cross_entropy_with_logits(
            logits, true.float(), pos_weight=self._weight(logits), reduction="none"
        )
        return (loss * (labels >= 0)[:, None]).sum(), logits > 0, true


def balanced_weights(labels: np.ndarray, names: Sequence[str], *, multi_label: bool) -> list[float]:
    """Weights from the labels of the training documents (int64 [D]).

    One label: `documents / (labels * documents of the label)`, whose mean over the documents is 1 (King and Zeng 2001, as
    scikit-learn's "balanced"). Several: documents without the label / documents with it. Raises DataError for a label
    that no training document has.
    """
    if multi_label:
        having = np.array([int(((labels >> bit) & 1).sum()) for bit in range(len(names))])
    else:
        having = np.bincount(labels, minlength=len(names))
    if (missing := np.flatnonzero(having == 0)).size:
        raise DataError(
            f"objective.class_weights=balanced: no training document has the label {names[missing[0]]!r}; leave it out of "
            "objective.labels, or give the weights as a list"
        )
    weights = (len(labels) - having) / having if multi_label else len(labels) / (len(names) * having)
    if multi_label and (constant := np.flatnonzero(having == len(labels))).size:
        raise DataError(
            f"objective.class_weights=balanced: every training document has the label {names[constant[0]]!r}; leave it out "
            "of the data, or give the weights as a list"
        )
    return [float(weight) for weight in weights]
