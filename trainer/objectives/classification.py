"""Labels of a document, from the model's own sequence-classification head: one of several, or any number of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strategies.errors import ConfigError, DataError
from strategies.settings import DESCRIBES, setting
from trainer.data.batches.collate import Collator
from trainer.data.batches.cutting import IGNORED_TARGET, Axis
from trainer.data.config import DataFormat, Layout
from trainer.data.document import WRONG_KIND_REASON, Document
from trainer.data.fields import RowError, parse_label
from trainer.data.objective_spec import DataSpec
from trainer.data.selection.splits import DocumentColumns
from trainer.data.store.documents import DocumentTable
from trainer.data.store.sequences import LABEL, Sample, TokenDataset
from trainer.model.config import ModelKind
from trainer.objectives.base import Objective, ObjectiveConfig, ObjectiveFamily, OtherSettings, ReferenceModels
from trainer.objectives.pooled import PooledCollator, classifier_logits, select_local_sequences

BALANCED = "balanced"
LABEL_SEPARATOR = "|"
"""Stands between the labels of a document that has several, while they are one text."""
MAX_LABELS = 62
"""Most labels of `multi_label`: they are bits of a non-negative int64, one of which is spare."""


@dataclass(kw_only=True, slots=True)
class ClassificationConfig(ObjectiveConfig):
    """Labels of a document, predicted from the sequence-classification head: one, or any number of them."""

    name: str = "classification"
    labels: list[str] | None = setting(None, reach=DESCRIBES)
    """Names of the labels in the order of their ids. Rows may contain names or ids. Default: the sorted labels of the data."""
    multi_label: bool = setting(False, reach=DESCRIBES)
    """Let a document have any number of labels, up to 62: as a list, or as one text with `|` between them, empty for none."""
    class_weights: Any = setting(None, reach=DESCRIBES)
    """A weight for each label in the order of `labels`, or `balanced`. With `multi_label` a weight applies to documents that
    have the label."""


def classification_problems(config: ClassificationConfig, other_settings: OtherSettings) -> Iterator[str]:
    """What is wrong with the settings of a classification, one line each: of data, labels' names and weights."""
    data = other_settings.data
    if data.packing:
        yield "data.packing=true: a classified document has a row of its own; set data.packing=false"
    if data.format not in (DataFormat.auto, DataFormat.labelled):
        yield f"data.format={data.format}: objective=classification reads labelled rows; set data.format=labelled"
    if config.labels is not None:
        yield from _label_problems(config.labels, multi_label=config.multi_label)
    yield from _weight_problems(config)


def _label_problems(labels: list[str], *, multi_label: bool) -> Iterator[str]:
    """What is wrong with the labels in `objective.labels`, one line each.

    There must be two or more (one with `multi_label`), all different; with `multi_label` at most `MAX_LABELS`, and none with `|`.
    """
    fewest_labels = 1 if multi_label else 2
    if len(labels) < fewest_labels or len(set(labels)) < len(labels):
        must_be = "one or more" if multi_label else "two or more"
        yield f"objective.labels={labels}: must be {must_be} different names; null takes those of the data"
    if not multi_label:
        return
    if len(labels) > MAX_LABELS:
        yield f"objective.labels: {len(labels)} names, at most {MAX_LABELS} with objective.multi_label=true; leave some out"
    ambiguous = next((label for label in labels if LABEL_SEPARATOR in label), None)
    if ambiguous:
        yield f"objective.labels: {ambiguous!r} contains |, which stands between labels; rename it"


def _weight_problems(config: ClassificationConfig) -> Iterator[str]:
    """What is wrong with `objective.class_weights`, at most one line: it is `balanced`, or a number for each label."""
    weights = config.class_weights
    if weights is None or weights == BALANCED:
        return
    if not isinstance(weights, list) or not weights or not all(map(_is_weight, weights)):
        yield f"objective.class_weights={weights}: must be balanced, or a list of numbers above 0, one for each label"
    elif config.labels is not None and len(weights) != len(config.labels):
        yield (
            f"objective.class_weights: {len(weights)} weights for {len(config.labels)} labels; give one for each, or balanced"
        )


def _is_weight(number: Any) -> bool:
    return isinstance(number, int | float) and math.isfinite(number) and number > 0


class LabelDataSpec(DataSpec):
    """Labelled texts: several labels are one text while rows are read, numbers (or bits of one) in the prepared data."""

    formats = (DataFormat.labelled,)
    marks = {LABEL: 0}  # noqa: RUF012 - never changed

    def __init__(self, label_names: list[str] | None = None, *, multi_label: bool = False) -> None:
        """`label_names`: those of `objective.labels`, in the order of their ids; None: taken from the data."""
        self.label_names = label_names
        self.multi_label = multi_label

    def identity(self) -> dict[str, Any]:
        return {"labels": self.label_names, "several": self.multi_label}

    def label(self, value: Any) -> str:
        """The label as one text. Where `objective.labels` gives names, a number that is none of them is the id of a name."""
        if not self.multi_label:
            return self._name_of(parse_label(value))
        names = {self._name_of(label) for label in split_labels(join_labels(value))}
        return LABEL_SEPARATOR.join(sorted(names))

    def _name_of(self, label: str) -> str:
        """The name that a document's label stands for: with the names cat and dog, `1` stands for dog, and `cat` for itself.

        A number is an id unless a name is a number itself, or there is no such id.
        """
        names = self.label_names or []
        is_number = label.isdecimal() and label.isascii()
        if not is_number or any(name.isdecimal() for name in names):
            return label
        label_id = int(label)
        if label_id >= len(names):  # not an id either: `reason_to_reject` reports it
            return label
        return names[label_id]

    def reason_to_reject(self, document: Document) -> tuple[str, str] | None:
        """Why a document cannot be used, as (kind of refusal, message); None if it can.

        - no label: `WRONG_KIND_REASON`.
        - a label that `objective.labels` does not name: `unknown_label`. Without that setting every label is taken.
        """
        if document.label is None:
            problem = "has no label, which objective=classification learns and evaluates; it"
            return WRONG_KIND_REASON, f"{problem} needs rows with a text and a label (data.format=labelled)"
        if self.label_names is None:
            return None
        labels = [document.label]
        if self.multi_label:
            labels = split_labels(document.label)
        unknown = next((label for label in labels if label not in self.label_names), None)
        if unknown is None:
            return None
        message = f"label {unknown!r} is none of {sorted(self.label_names)} (objective.labels)"
        if unknown.isdecimal():
            message += f", and no id of one (0 to {len(self.label_names) - 1})"
        return "unknown_label", message

    def counts(self, sample: Sample) -> dict[str, float]:
        """A document counts once, however many labels it has."""
        return {"loss": 1}

    def number_labels(
        self, columns: DocumentColumns, table: DocumentTable
    ) -> tuple[list[str] | None, np.ndarray | None]:
        return number_labels(columns, table, self.label_names, multi_label=self.multi_label)

    def collator(self, layout: Layout, pad_token_id: int, decoder_start: int | None = None) -> Collator:
        return LabelCollator(layout, pad_token_id)

    def note(self, sample: Sample, label_names: list[str] | None) -> str:
        """Write the labels of a sequence for the preview of the data.

        "label: 2 (spam)", or "label: urgent, billing" with `multi_label`. `label_names`: by label id; None if labels have no
        names.
        """
        label = int(sample.marks[LABEL])
        if label_names is None:
            return f"label: {label}"
        if not self.multi_label:
            return f"label: {label} ({label_names[label]})"
        names = [name for bit, name in enumerate(label_names) if label >> bit & 1]
        return f"label: {', '.join(names) or 'none'}"


class LabelCollator(PooledCollator):
    """Adds `labels`, int64 `[S]`: label ids (or bits of `multi_label`), -100 for a filler row."""

    axes = PooledCollator.axes | {"labels": Axis.sequence}

    def add_loss_inputs(self, batch: dict[str, Any], samples: Sequence[Sample]) -> None:
        super().add_loss_inputs(batch, samples)
        batch["labels"] = torch.tensor([int(sample.marks[LABEL]) for sample in samples], dtype=torch.int64)

    def without_targets(self, sample: Sample) -> Sample:
        return Sample(sample.input_ids, np.zeros_like(sample.supervised), {**sample.marks, LABEL: IGNORED_TARGET})


def join_labels(labels: Any) -> str:
    """Join any number of labels into one text, sorted: ["dog", "cat"] -> "cat|dog"; none is the empty text.

    So that a row with several labels has one text while it is read. `labels`: a list of labels, one label, or a text that has
    them with `|` between them. Raises RowError: bad_label.
    """
    if isinstance(labels, str):
        labels = [name for name in labels.split(LABEL_SEPARATOR) if name.strip()]
    elif not isinstance(labels, list):
        labels = [labels]
    names = {parse_label(label) for label in labels}
    ambiguous_name = next((name for name in names if LABEL_SEPARATOR in name), None)
    if ambiguous_name:
        raise RowError(
            "bad_label", f'"label" holds {ambiguous_name!r}; the name of a label must not contain {LABEL_SEPARATOR}'
        )
    return LABEL_SEPARATOR.join(sorted(names))


def split_labels(joined_labels: str) -> list[str]:
    """The label names in a text with `|` between them: "cat|dog" -> ["cat", "dog"]; an empty text has none."""
    return joined_labels.split(LABEL_SEPARATOR) if joined_labels else []


def number_labels(
    columns: DocumentColumns, table: DocumentTable, names: list[str] | None, *, multi_label: bool
) -> tuple[list[str] | None, np.ndarray | None]:
    """Give each label an id: returns (label names in the order of their ids, the id of each text in `columns.label_names`).

    The second is None without labels. A text is one label, or with `multi_label` any number of them: bit i of its id is set if it
    has the label `names[i]`. With the names cat and dog, `cat` is 1, `dog` is 2 and `cat|dog` is 3. If `names` is None, they are
    the labels of the training split.

    Raises DataError for labels that the training split does not have, for more than fit into the bits, and for too few to tell
    apart.
    """
    if not columns.label_names:
        return names, None
    # The label names in each text.
    label_sets = [[label] for label in columns.label_names]
    if multi_label:
        label_sets = [split_labels(label) for label in columns.label_names]
    if names is None:
        names = _training_label_names(columns, table, label_sets, multi_label=multi_label)
    if not multi_label:
        return names, np.array([names.index(label) for label in columns.label_names], np.int64)
    if len(names) > MAX_LABELS:
        raise DataError(
            f"objective.multi_label=true: the data has {len(names)} labels, at most {MAX_LABELS} fit; leave rare ones out, or "
            "train one run for each part of them"
        )
    # A set of labels is one integer: bit i is set if the document has label i.
    bit_by_name = {name: 1 << bit for bit, name in enumerate(names)}
    ids = []
    for label_set in label_sets:
        ids.append(sum(bit_by_name[name] for name in label_set))
    return names, np.array(ids, np.int64)


def _training_label_names(
    columns: DocumentColumns, table: DocumentTable, label_sets: list[list[str]], *, multi_label: bool
) -> list[str]:
    """Take the labels' names from the training split, sorted.

    Raises DataError if another split has other labels, or if they are too few.

    `label_sets`: the labels in each text of `columns.label_names`.
    """
    # `columns.label_numbers` has, for each document, the index of its text in `columns.label_names`; -1 without a label.
    train_texts = np.unique(columns.label_numbers[columns.of_split("train")])
    train_labels: set[str] = set()
    for number in train_texts:
        if number >= 0:
            train_labels |= set(label_sets[number])
    # In the order of their ids: by number if all are whole numbers, else by name.
    are_whole_numbers = all(label.lstrip("-").isdecimal() for label in train_labels)
    names = sorted(train_labels, key=int) if are_whole_numbers else sorted(train_labels)
    # A label that only the evaluation split has could never be predicted.
    unknown_texts = [number for number, label_set in enumerate(label_sets) if not set(label_set) <= train_labels]
    rows = np.flatnonzero(np.isin(columns.label_numbers, unknown_texts))
    if rows.size:
        row = table.row(int(rows[0]))
        raise DataError(
            f"{row['file']}:{row['line']}: label {row['label']!r} is none of {names} (the labels of the training "
            "data); set objective.labels to name them all"
        )
    fewest_labels = 1 if multi_label else 2
    if len(names) < fewest_labels:
        fault = f"have the label {names[0]!r}" if names else "have no label"
        raise DataError(
            f"data.path: all training documents {fault}, and objective=classification tells labels apart; add "
            "documents of another one"
        )
    return names


class _LossAndPredictions(NamedTuple):
    """What a classification makes of the logits of a micro-batch."""

    loss: Tensor
    """Summed over the documents, 0-d."""
    is_predicted: Tensor
    """bool `[rows, labels]`: whether the model predicts the label."""
    is_true: Tensor
    """bool `[rows, labels]`: whether the document has the label."""


class Classification(Objective):
    """One label a document. Terms: `loss` (summed cross-entropy), `accuracy` (documents right), and `confusion`.

    `weights` multiply each document's loss by its label's; the denominator stays the number of documents.
    """

    metrics = ("accuracy",)

    def __init__(self, weights: Sequence[float] | None = None) -> None:
        self._weights = weights
        self._device_weights: Tensor | None = None

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the terms that the class lists, of padded rows or of one row without padding.

        A label of -100 (a filler row of an evaluation batch) adds nothing. If ranks share the row, each has the terms of the
        documents whose last token it holds. Without gradients there is also `confusion [3, labels]`: for each label, how often it
        was right, predicted, and true.
        """
        logits = classifier_logits(model, batch)
        labels = select_local_sequences(batch, batch["labels"])
        loss, is_predicted, is_true = self._loss_and_predictions(logits, labels)
        is_document = (labels >= 0)[:, None]  # not a filler row
        are_all_right = (is_predicted == is_true).all(-1, keepdim=True)
        terms = {"loss": loss, "accuracy": (are_all_right & is_document).sum().float()}
        if not torch.is_grad_enabled():  # an evaluation: F1 is computed from the summed confusion
            is_predicted = is_predicted & is_document
            is_true = is_true & is_document
            counts = [(is_predicted & is_true).sum(0), is_predicted.sum(0), is_true.sum(0)]
            terms["confusion"] = torch.stack(counts).float()
        return terms

    def _loss_and_predictions(self, logits: Tensor, labels: Tensor) -> _LossAndPredictions:
        """Compare logits `[rows, labels]` with the true labels, int64 `[rows]`."""
        weight = self._weights_on(logits)
        loss = F.cross_entropy(logits, labels, weight=weight, reduction="sum", ignore_index=-100)
        label_ids = torch.arange(logits.shape[1], device=logits.device)
        is_predicted = logits.argmax(-1, keepdim=True) == label_ids
        is_true = labels[:, None] == label_ids
        return _LossAndPredictions(loss, is_predicted, is_true)

    def _weights_on(self, logits: Tensor) -> Tensor | None:
        """The class weights on the device of `logits`; None without weights. Raises ConfigError for another number of labels."""
        if self._weights is None:
            return None
        if len(self._weights) != logits.shape[1]:
            raise ConfigError(
                f"objective.class_weights={list(self._weights)}: the data has {logits.shape[1]} labels; give a weight "
                "for each, in the order of objective.labels (or of the sorted names), or balanced"
            )
        # Copied to the device once: a copy in every step would wait for it.
        if self._device_weights is None or self._device_weights.device != logits.device:
            self._device_weights = torch.tensor(list(self._weights), dtype=torch.float32, device=logits.device)
        return self._device_weights


class MultiLabel(Classification):
    """Any number of labels a document, as the bits of an integer. Terms: `loss` is binary cross-entropy summed over labels.

    `accuracy` counts documents all of whose labels are right; `weights` multiply the loss of a label where it is true.
    """

    def _loss_and_predictions(self, logits: Tensor, labels: Tensor) -> _LossAndPredictions:
        # Bit i of a document's integer is set if it has label i; a filler row has -100, whose loss is left out below.
        is_true = (labels[:, None] >> torch.arange(logits.shape[1], device=logits.device)) & 1 > 0
        loss = F.binary_cross_entropy_with_logits(
            logits, is_true.float(), pos_weight=self._weights_on(logits), reduction="none"
        )
        is_document = (labels >= 0)[:, None]
        return _LossAndPredictions((loss * is_document).sum(), logits > 0, is_true)


def balanced_weights(labels: np.ndarray, names: Sequence[str], *, multi_label: bool) -> list[float]:
    """Weigh the labels in the loss so that rare ones count as much as common ones.

    `labels`: int64 [D], of the training documents, as `number_labels` gives them. With one label a document: `documents / (labels
    * documents with the label)`, whose mean over the documents is 1 (King and Zeng 2001, as scikit-learn's "balanced"). 90 and 10
    documents give 0.56 and 5. With several (`multi_label`): `_balanced_weights_of_several`. Raises DataError for a label that no
    training document has.
    """
    if multi_label:
        documents_with_label = np.array([int(((labels >> bit) & 1).sum()) for bit in range(len(names))])
    else:
        documents_with_label = np.bincount(labels, minlength=len(names))
    missing = np.flatnonzero(documents_with_label == 0)
    if missing.size:
        raise DataError(
            f"objective.class_weights=balanced: no training document has the label {names[missing[0]]!r}; leave it out of "
            "objective.labels, or give the weights as a list"
        )
    if multi_label:
        return _balanced_weights_of_several(documents_with_label, len(labels), names)
    weights = len(labels) / (len(names) * documents_with_label)
    return [float(weight) for weight in weights]


def _balanced_weights_of_several(
    documents_with_label: np.ndarray, num_documents: int, names: Sequence[str]
) -> list[float]:
    """Weigh the labels of documents that have several, so that rare labels count as much as common ones.

    Weight of a label: documents without it / documents with it. Raises DataError for a label that every training document has.
    """
    weights = (num_documents - documents_with_label) / documents_with_label
    # A label that every document has would get the weight 0.
    in_every_document = np.flatnonzero(documents_with_label == num_documents)
    if in_every_document.size:
        raise DataError(
            f"objective.class_weights=balanced: every training document has the label {names[in_every_document[0]]!r}; "
            "leave it out of the data, or give the weights as a list"
        )
    return [float(weight) for weight in weights]


def settle_class_weights(
    config: ClassificationConfig, train: TokenDataset, names: list[str] | None
) -> tuple[ClassificationConfig, dict[str, str]]:
    """Replace `class_weights=balanced` by weights computed from the labels of the training documents, once these are prepared.

    Returns (the settings with the weights, a line for the run's record by key: {"objective.class_weights": "balanced -> [...]"});
    any other setting stays, and the second is empty. `names`: of the labels, in the order of their ids.
    """
    if config.class_weights != BALANCED:
        return config, {}
    assert train.labels is not None and names is not None, "classification has labels"
    weights = balanced_weights(train.labels, names, multi_label=config.multi_label)
    return replace(config, class_weights=weights), {"objective.class_weights": f"balanced -> {weights}"}


def build_classification(config: ClassificationConfig, references: ReferenceModels) -> Objective:
    """The loss over one label or several; before `settle_class_weights`, balanced weights are not known, and left out."""
    weights = None if config.class_weights == BALANCED else config.class_weights
    return MultiLabel(weights) if config.multi_label else Classification(weights)


CLASSIFICATION = ObjectiveFamily(
    settings=ClassificationConfig,
    data_spec=lambda config: LabelDataSpec(config.labels, multi_label=config.multi_label),
    build=build_classification,
    problems=classification_problems,
    kind=ModelKind.classifier,
    multi_label=lambda config: config.multi_label,
    settle=settle_class_weights,
    scores_labels=True,
    better_when_larger=("accuracy", "f1_macro", "f1_micro"),
)
