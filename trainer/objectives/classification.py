"""Labels of a document, from the model's own sequence-classification head: one of several, or any number of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strategies.errors import ConfigError, DataError
from strategies.settings import DESCRIBES, setting
from trainer.data.batches.collate import IGNORED, Collator
from trainer.data.config import DataFormat, Layout
from trainer.data.document import WRONG_KIND, Document
from trainer.data.fields import Refusal, label_of
from trainer.data.objective_spec import Reading
from trainer.data.selection.splits import Columns
from trainer.data.store.documents import DocumentTable
from trainer.data.store.sequences import LABEL, Sample, TokenDataset
from trainer.model.config import ModelKind
from trainer.objectives.base import Around, Beside, Family, Objective, ObjectiveConfig

BALANCED = "balanced"
MARK = "|"
"""Between the labels of a document that has several."""
MOST = 62
"""Labels that fit into the bits of a non-negative int64 column, one bit spare."""


@dataclass(kw_only=True, slots=True)
class ClassificationConfig(ObjectiveConfig):
    """Labels of a document, predicted from the sequence-classification head: one, or any number of them."""

    name: str = "classification"
    labels: list[str] | None = setting(None, reach=DESCRIBES)
    """Label names in the order of their ids, which rows may have in their place; default: the sorted labels of the data."""
    multi_label: bool = setting(False, reach=DESCRIBES)
    """A document has any number of labels: a list, or one text with `|` between them, empty for none; 62 labels at most."""
    class_weights: Any = setting(None, reach=DESCRIBES)
    """A weight for each label in the order of `labels`, or `balanced`; with `multi_label` it counts where the label is true."""


def problems(config: ClassificationConfig, around: Around) -> Iterator[str]:
    """What labels ask of the data, and what is wrong with their names and weights."""
    data = around.data
    if data.packing:
        yield "data.packing=true: a classified document has a row of its own; set data.packing=false"
    if data.format not in (DataFormat.auto, DataFormat.labelled):
        yield f"data.format={data.format}: objective=classification reads labelled rows; set data.format=labelled"
    labels, weights = config.labels, config.class_weights
    if labels is not None and len(set(labels)) < max(1 if config.multi_label else 2, len(labels)):
        yield f"objective.labels={labels}: must be two or more different names; null takes those of the data"
    if labels is not None and config.multi_label and len(labels) > MOST:
        yield f"objective.labels: {len(labels)} names, at most {MOST} with objective.multi_label=true; leave some out"
    if labels is not None and config.multi_label and (marked := next((n for n in labels if "|" in n), None)):
        yield f"objective.labels: {marked!r} contains |, which stands between labels; rename it"
    if weights is None or weights == "balanced":
        return
    numbers = weights if isinstance(weights, list) else []
    if not numbers or not all(isinstance(w, int | float) and math.isfinite(w) and w > 0 for w in numbers):
        yield f"objective.class_weights={weights}: must be balanced, or a list of numbers above 0, one for each label"
    elif labels is not None and len(numbers) != len(labels):
        yield f"objective.class_weights: {len(numbers)} weights for {len(labels)} labels; give one for each, or balanced"


class LabelReading(Reading):
    """Labelled texts: several labels are one text while rows are read, numbers (or bits of one) in the prepared data."""

    formats = (DataFormat.labelled,)
    marks = {LABEL: 0}  # noqa: RUF012 - never changed

    def __init__(self, names: list[str] | None = None, *, several: bool = False) -> None:
        self.names, self.several = names, several

    def identity(self) -> dict[str, Any]:
        return {"labels": self.names, "several": self.several}

    def label(self, value: Any) -> str:
        """The label as one text. Where `objective.labels` gives names, a number that is none of them is the id of a name."""
        if not self.several:
            return self._name_of(label_of(value))
        labels = split_labels(labels_of(value))
        return MARK.join(sorted({self._name_of(label) for label in labels}))

    def _name_of(self, label: str) -> str:
        names = self.names or []
        if any(name.isdecimal() for name in names) or not (label.isdecimal() and label.isascii()):
            return label
        return names[int(label)] if int(label) < len(names) else label

    def refuses(self, document: Document) -> tuple[str, str] | None:
        if document.label is None:
            said = "has no label, which objective=classification learns and evaluates; it"
            return WRONG_KIND, f"{said} needs rows with a text and a label (data.format=labelled)"
        if self.names is None:
            return None
        labels = split_labels(document.label) if self.several else [document.label]
        unknown = next((label for label in labels if label not in self.names), None)
        if unknown is None:
            return None
        ids = f", and no id of one (0 to {len(self.names) - 1})" if unknown.isdecimal() else ""
        return "unknown_label", f"label {unknown!r} is none of {sorted(self.names)} (objective.labels){ids}"

    def counts(self, sample: Sample) -> dict[str, float]:
        """A document counts once, however many labels it has."""
        return {"loss": 1}

    def numbered(self, columns: Columns, table: DocumentTable) -> tuple[list[str] | None, np.ndarray | None]:
        return number_labels(columns, table, self.names, several=self.several)

    def collator(self, layout: Layout, pad_token_id: int, decoder_start: int | None = None) -> Collator:
        return LabelCollator(layout, pad_token_id)

    def note(self, sample: Sample, label_names: list[str] | None) -> str:
        label = int(sample.marks[LABEL])
        if label_names is None:
            return f"label: {label}"
        if not self.several:
            return f"label: {label} ({label_names[label]})"
        return "label: " + (", ".join(name for bit, name in enumerate(label_names) if label >> bit & 1) or "none")


class LabelCollator(Collator):
    """Adds `labels`, int64 `[S]`; that of a row with nothing to score is -100."""

    def add(self, batch: dict[str, Any], samples: Sequence[Sample]) -> None:
        batch["labels"] = torch.tensor([int(sample.marks[LABEL]) for sample in samples], dtype=torch.int64)

    def blank(self, sample: Sample) -> Sample:
        return Sample(sample.input_ids, np.zeros_like(sample.supervised), {**sample.marks, LABEL: IGNORED})


def labels_of(value: Any) -> str:
    """Any number of labels as one text, sorted, with `|` between them; none is the empty text. Raises Refusal: bad_label."""
    if isinstance(value, str):
        value = [name for name in value.split(MARK) if name.strip()]
    names = {label_of(name) for name in (value if isinstance(value, list) else [value])}
    if marked := next((name for name in names if MARK in name), None):
        raise Refusal("bad_label", f'"label" holds {marked!r}; the name of a label must not contain {MARK}')
    return MARK.join(sorted(names))


def split_labels(label: str) -> list[str]:
    """The names in what `labels_of` made."""
    return label.split(MARK) if label else []


def number_labels(
    columns: Columns, table: DocumentTable, names: list[str] | None, *, several: bool
) -> tuple[list[str] | None, np.ndarray | None]:
    """The label names in the order of their ids, and the id of each text in `columns.labels`.

    With `several` the id of several labels has the bit of each. Names that are not given are those of the training
    split. Raises DataError for others, for more than fit into the bits, and for too few to tell apart.
    """
    if not columns.labels:
        return names, None
    parts = [split_labels(label) if several else [label] for label in columns.labels]
    if names is None:
        known = np.unique(columns.label[columns.of_split("train")])
        names = _sorted({name for number in known if number >= 0 for name in parts[number]})
        strange = [number for number, part in enumerate(parts) if not {*part} <= {*names}]
        if (rows := np.flatnonzero(np.isin(columns.label, strange))).size:
            row = table.row(int(rows[0]))
            raise DataError(
                f"{row['file']}:{row['line']}: label {row['label']!r} is none of {names} (the labels of the training "
                "data); set objective.labels to name them all"
            )
        if len(names) < (1 if several else 2):
            held = f"have the label {names[0]!r}" if names else "have no label"
            raise DataError(
                f"data.path: all training documents {held}, and objective=classification tells labels apart; add documents "
                "of another one"
            )
    if not several:
        return names, np.array([names.index(label) for label in columns.labels], np.int64)
    if len(names) > MOST:
        raise DataError(
            f"objective.multi_label=true: the data has {len(names)} labels, at most {MOST} fit; leave rare ones out, or "
            "train one run for each part of them"
        )
    return names, np.array([sum(1 << names.index(name) for name in part) for part in parts], np.int64)


def _sorted(labels: set[str]) -> list[str]:
    """By number if all are whole numbers, else by name."""
    numeric = all(label.lstrip("-").isdecimal() for label in labels)
    return sorted(labels, key=int) if numeric else sorted(labels)


class Classification(Objective):
    """One label a document. Terms: `loss` (summed cross-entropy), `accuracy` (documents right), and `confusion`.

    `weights` multiply each document's loss by its label's; the denominator stays the number of documents.
    """

    def __init__(self, weights: Sequence[float] | None = None) -> None:
        self._weights = weights
        self._on_device: Tensor | None = None

    metrics = ("accuracy",)

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


def settle(
    config: ClassificationConfig, train: TokenDataset, names: list[str] | None
) -> tuple[ClassificationConfig, dict[str, str]]:
    """The settings with weights in place of `balanced`, from the labels of the training documents."""
    if config.class_weights != BALANCED:
        return config, {}
    assert train.labels is not None and names is not None, "classification has labels"
    weights = balanced_weights(train.labels, names, multi_label=config.multi_label)
    return replace(config, class_weights=weights), {"objective.class_weights": f"balanced -> {weights}"}


def build(config: ClassificationConfig, beside: Beside) -> Objective:
    """The loss over one label or several; before `settle`, balanced weights are not known, and left out."""
    weights = None if config.class_weights == BALANCED else config.class_weights
    return MultiLabel(weights) if config.multi_label else Classification(weights)


CLASSIFICATION = Family(
    settings=ClassificationConfig,
    reading=lambda config: LabelReading(config.labels, several=config.multi_label),
    build=build,
    problems=problems,
    kind=ModelKind.classifier,
    several=lambda config: config.multi_label,
    settle=settle,
    judges_labels=True,
    better_when_larger=("accuracy", "f1_macro", "f1_micro"),
)
