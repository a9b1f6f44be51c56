"""Labels of texts, by a classification head or by the likeliest label of a language model: accuracy and calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np

from strategies.errors import DataError
from trainer.data.document import Document
from trainer.data.fields import RowError, parse_label, parse_text, show_value
from trainer.evaluation.tasks.base import RatioOfSums, Task, TaskCase, TaskMetric, TaskRow, score_array
from trainer.evaluation.tasks.model_interface import ModelInterface, softmax
from trainer.evaluation.tasks.texts import split_location

NUM_CONFIDENCE_BINS = 15
"""Intervals of confidence, equally wide, of the calibration error (Guo et al. 2017, Naeini et al. 2015)."""


class LabelProbabilities(NamedTuple):
    """The probabilities of labels, by case."""

    label_names: list[str]
    by_case: list[list[float]]
    """[cases][labels]."""


class ClassificationTask(Task):
    """Compares the predicted label of each text with its true one."""

    kind = "classification"
    metrics = (
        TaskMetric("accuracy", "share of right labels, 0 to 1", ratio_of_sums=RatioOfSums("right")),
        TaskMetric("f1_macro", "mean F1 of the labels that are there or predicted, 0 to 1 (scikit-learn)"),
        TaskMetric("mcc", "Matthews correlation coefficient, -1 to 1 (scikit-learn)"),
        TaskMetric(
            "calibration_error",
            f"expected calibration error over {NUM_CONFIDENCE_BINS} bins, 0 to 1",
            greater_is_better=False,
        ),
    )
    rows_description = 'rows with "text" and "label"; a label is a name, a whole number or true/false'
    options: ClassVar[dict[str, Any]] = {"labels": None, "prompt": "{text}", "separator": " "}
    needs_path = True
    works_with_classifiers = True
    required_package: ClassVar[str | None] = "sklearn"

    def problems(self) -> Iterator[str]:
        """Yield an error message for each invalid setting of the task, before any row is read.

        `options.labels` names the labels, if the rows do not have all of them. `options.prompt` is what a language model reads
        before the label, with the text in the place of {text}.
        """
        yield from super().problems()
        labels = self.option_values["labels"]
        prompt = self.option_values["prompt"]
        has_different_labels = isinstance(labels, list) and len({*labels}) == len(labels) >= 2
        if labels is not None and not has_different_labels:
            yield (
                f"{self.config_key}.options.labels={labels}: must be a list of two or more different "
                "names, or null for the file's"
            )
        if "{text}" not in str(prompt):
            yield f"{self.config_key}.options.prompt={prompt}: must have {{text}} where the text goes"

    def prepare_case(self, case: TaskCase) -> None:
        """Replace the columns of a row by its text and its true label: {"text": "Fine.", "label": "positive"}.

        Raises RowError for a missing text, or a label that `options.labels` does not have.
        """
        # If the row has none of these columns, the error names "text".
        text_column = next((name for name in ("text", "sentence", "content") if name in case.fields), "text")
        label = parse_label(case.fields.get("label"))
        known_labels = self.option_values["labels"]
        if known_labels is not None and label not in map(str, known_labels):
            raise RowError(
                "unknown_label", f'"label" is {show_value(label)}; {self.config_key}.options.labels has {known_labels}'
            )
        case.fields = {"text": parse_text(case.fields, text_column), "label": label}

    def score_cases(self, cases: Sequence[TaskCase], model: ModelInterface) -> list[TaskRow]:
        """Predict the label of each text: the likeliest one by the classification head, or without one by the language model.

        Returns a report row for each text, with the scores `right`, `confidence` (the predicted label's probability) and
        `true` (that of the true label). All ranks must call.
        """
        # None for a language model, which has no classification head.
        if model.label_names is not None:
            names, probabilities_of_cases = self._probabilities_by_head(cases, model)
        else:
            names, probabilities_of_cases = self._probabilities_by_likelihood(cases, model)
        rows = []
        for case, row_probabilities in zip(cases, probabilities_of_cases, strict=True):
            predicted = int(np.argmax(row_probabilities))
            true_label = case.fields["label"]
            scores = {
                "right": float(names[predicted] == true_label),
                "confidence": row_probabilities[predicted],
                "true": row_probabilities[names.index(true_label)],
            }
            rows.append(
                TaskRow(
                    where=case.location,
                    prompt=case.fields["text"],
                    answer=names[predicted],
                    reference=true_label,
                    scores=scores,
                )
            )
        return rows

    def _probabilities_by_head(self, cases: Sequence[TaskCase], model: ModelInterface) -> LabelProbabilities:
        """The probability of each label by the model's classification head. All ranks must call.

        Raises DataError if a case has a label that the model was not trained on.
        """
        names = model.label_names or []
        for case in cases:
            if case.fields["label"] not in names:
                raise DataError(
                    f"{case.location}: label {case.fields['label']!r} is none of {names}, which the model was trained on; "
                    f"mend {self.config_key}.path"
                )
        documents = []
        for case in cases:
            file, line = split_location(case.location)
            documents.append(Document(file, line, text=case.fields["text"], label=case.fields["label"]))
        model.encoder.set_label_names(names)
        samples = [sample for _, sample in model.encoder.encode(documents)]  # one of each document, in their order
        return LabelProbabilities(names, [softmax(logits) for logits in model.logits(samples)])

    def _probabilities_by_likelihood(self, cases: Sequence[TaskCase], model: ModelInterface) -> LabelProbabilities:
        """The probability of each label by how likely a language model finds it after the prompt. All ranks must call."""
        names = self._label_names(cases)
        template = str(self.option_values["prompt"])
        separator = str(self.option_values["separator"])
        documents = []
        for case in cases:
            file, line = split_location(case.location)
            prompt = template.replace("{text}", case.fields["text"])
            documents += [Document(file, line, prompt=prompt, completion=name, separator=separator) for name in names]
        likelihoods = model.likelihoods(model.encode_questions(documents))
        logprobs = [likelihood.logprob for likelihood in likelihoods]
        # The list has one number for each label of the first case, then of the second, and so on.
        probabilities = []
        for start in range(0, len(logprobs), len(names)):
            # Over the labels of one case, so that they sum to 1.
            probabilities.append(softmax(logprobs[start : start + len(names)]))
        return LabelProbabilities(names, probabilities)

    def _label_names(self, cases: Sequence[TaskCase]) -> list[str]:
        """The labels that a language model chooses from: those of `options.labels`, else those of the rows.

        Sorted as numbers if all are whole numbers, else by the alphabet. Raises DataError if all rows have the same label: its
        probability would always be 1.
        """
        if self.option_values["labels"] is not None:
            return [str(name) for name in self.option_values["labels"]]
        names = {case.fields["label"] for case in cases}  # one at least
        are_numbers = all(name.lstrip("-").isdecimal() for name in names)
        labels = sorted(names, key=int) if are_numbers else sorted(names)
        if len(labels) < 2:
            raise DataError(
                f"{self.config_key}: every row has the label {labels[0]!r}; name all labels in {self.config_key}.options.labels"
            )
        return labels

    def weighted_metric_functions(self, rows: Sequence[TaskRow]) -> dict[str, Callable[[np.ndarray], float]]:
        """Macro F1, Matthews correlation and calibration error, as functions that the bootstrap calls for each resample.

        Each takes row weights, float64 [rows]: how often a row counts.
        """
        from sklearn.metrics import matthews_corrcoef

        true_labels = [row.reference for row in rows]
        predicted_labels = [row.answer for row in rows]
        is_right = score_array(rows, "right")
        confidences = score_array(rows, "confidence")

        return {
            "f1_macro": partial(_f1_macro, np.array(true_labels), np.array(predicted_labels)),
            "mcc": lambda weights: float(matthews_corrcoef(true_labels, predicted_labels, sample_weight=weights)),
            "calibration_error": partial(calibration_error, is_right, confidences),
        }

    def signatures(self) -> dict[str, str]:
        """The version of scikit-learn, which computes F1 and MCC, and how the calibration error is binned."""
        from importlib.metadata import version

        sklearn = f"scikit-learn:{version('scikit-learn')}"
        return {"f1_macro": sklearn, "mcc": sklearn, "calibration_error": f"bins:{NUM_CONFIDENCE_BINS}|equal width"}


def _f1_macro(true_labels: np.ndarray, predicted_labels: np.ndarray, weights: np.ndarray) -> float:
    """The mean F1 of the labels that occur in a resample of the rows.

    A label that occurs in none of its rows must not count as a label with an F1 of 0. `true_labels`, `predicted_labels`:
    texts, [rows]. `weights`: how often each row counts, float64 [rows].
    """
    from sklearn.metrics import f1_score

    is_drawn = weights > 0
    score = f1_score(
        true_labels[is_drawn],
        predicted_labels[is_drawn],
        average="macro",
        sample_weight=weights[is_drawn],
        zero_division=0,
    )
    return float(score)


def calibration_error(is_right: np.ndarray, confidences: np.ndarray, weights: np.ndarray) -> float:
    """Expected calibration error: how far a classifier's confidence is from its accuracy, 0 to 1.

    Rows are put into `NUM_CONFIDENCE_BINS` bins by their confidence. The error is the mean distance of confidence and accuracy
    over the bins, each weighted by its rows.

    `is_right`: 0 or 1. `confidences`: the probability of the predicted label. `weights`: how often each row counts. All
    float64 [rows].
    """
    # Bins are open below and closed above, as in the papers: a confidence of exactly 0 belongs to the first one.
    bins = np.clip(np.ceil(confidences * NUM_CONFIDENCE_BINS).astype(int) - 1, 0, NUM_CONFIDENCE_BINS - 1)
    # Per bin: weighted sum of (accuracy - confidence). Its absolute value is the bin's distance times its weight.
    weighted_gaps = np.bincount(bins, weights * (is_right - confidences), NUM_CONFIDENCE_BINS)
    return float(np.abs(weighted_gaps).sum() / weights.sum())


class ConfusionMatrix(NamedTuple):
    """How often each label was predicted for each true one."""

    label_names: list[str]
    """Sorted."""
    counts: list[list[int]]
    """[true label][predicted label]."""


def confusion_matrix_of_rows(rows: Sequence[TaskRow]) -> ConfusionMatrix:
    """Count how often a classification task predicted each label for each true one.

    (["ham", "spam"], [[8, 2], [1, 9]]): 2 texts that are ham were predicted to be spam.
    """
    from sklearn.metrics import confusion_matrix

    true_labels = [row.reference for row in rows]
    predicted = [row.answer for row in rows]
    names = sorted({*true_labels, *predicted})
    counts = confusion_matrix(true_labels, predicted, labels=names)
    return ConfusionMatrix(names, counts.tolist())
