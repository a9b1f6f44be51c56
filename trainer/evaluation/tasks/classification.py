"""Labels of texts, by a classification head or by the likeliest label of a language model: accuracy and calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from strategies.errors import DataError
from trainer.data.document import Document
from trainer.data.fields import Refusal, label_of, shown, text_of
from trainer.evaluation.tasks.base import Case, Metric, Task, TaskRow
from trainer.evaluation.tasks.model_interface import ModelInterface, softmax

BINS = 15
"""Intervals of confidence, equally wide, of the calibration error (Guo et al. 2017, Naeini et al. 2015)."""


class ClassificationTask(Task):
    """The predicted label of each text against its true one."""

    kind = "classification"
    metrics = (
        Metric("accuracy", "share of right labels, 0 to 1", ratio=("right", None)),
        Metric("f1_macro", "mean F1 of the labels that are there or predicted, 0 to 1 (scikit-learn)"),
        Metric("mcc", "Matthews correlation coefficient, -1 to 1 (scikit-learn)"),
        Metric("calibration_error", f"expected calibration error over {BINS} bins, 0 to 1", greater_is_better=False),
    )
    reads = '"text" and "label": a name, a whole number or true/false'
    options: ClassVar[dict[str, Any]] = {"labels": None, "prompt": "{text}", "separator": " "}
    needs_path = True
    works_with_classifiers = True
    required_package: ClassVar[str | None] = "sklearn"

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        labels, prompt = self.option_values["labels"], self.option_values["prompt"]
        if labels is not None and (not isinstance(labels, list) or len({*labels}) != len(labels) or len(labels) < 2):
            yield f"{self.key}.options.labels={labels}: must be a list of two or more different names, or null for the file's"
        if "{text}" not in str(prompt):
            yield f"{self.key}.options.prompt={prompt}: must have {{text}} where the text goes"

    def read(self, case: Case) -> None:
        name = next((name for name in ("text", "sentence", "content") if name in case.fields), "text")
        label = label_of(case.fields.get("label"))
        known = self.option_values["labels"]
        if known is not None and label not in map(str, known):
            raise Refusal("unknown_label", f'"label" is {shown(label)}; {self.key}.options.labels has {known}')
        case.fields = {"text": text_of(case.fields, name), "label": label}

    def run(self, cases: Sequence[Case], model: ModelInterface) -> list[TaskRow]:
        names, likely = (self._by_head if model.label_names is not None else self._by_likelihood)(cases, model)
        rows = []
        for case, probabilities in zip(cases, likely, strict=True):
            best = int(np.argmax(probabilities))
            true = case.fields["label"]
            scores = {"right": float(names[best] == true), "confidence": probabilities[best]}
            scores |= {"true": probabilities[names.index(true)]}
            rows.append(TaskRow(case.where, case.fields["text"], names[best], true, scores))
        return rows

    def _by_head(self, cases: Sequence[Case], model: ModelInterface) -> tuple[list[str], list[list[float]]]:
        names = model.label_names or []
        if strange := next((case for case in cases if case.fields["label"] not in names), None):
            raise DataError(
                f"{strange.where}: label {strange.fields['label']!r} is none of {names}, which the model was trained on; "
                f"mend {self.key}.path"
            )
        places = {case.where: case.fields for case in cases}
        documents = [
            Document(*_place(where), text=fields["text"], label=fields["label"]) for where, fields in places.items()
        ]
        model.encoder.label_ids = {name: number for number, name in enumerate(names)}
        samples = [sample for _, sample in model.encoder.encode(documents)]
        return names, [softmax(logits) for logits in model.logits(samples)]

    def _by_likelihood(self, cases: Sequence[Case], model: ModelInterface) -> tuple[list[str], list[list[float]]]:
        names = self._labels(cases)
        prompt, separator = str(self.option_values["prompt"]), str(self.option_values["separator"])
        documents = [
            Document(
                *_place(case.where),
                prompt=prompt.replace("{text}", case.fields["text"]),
                completion=name,
                separator=separator,
            )
            for case in cases
            for name in names
        ]
        held = [each.logprob for each in model.likelihoods(model.encode_questions(documents))]
        size = len(names)
        return names, [softmax(held[begin : begin + size]) for begin in range(0, len(held), size)]

    def _labels(self, cases: Sequence[Case]) -> list[str]:
        if self.option_values["labels"] is not None:
            return [str(name) for name in self.option_values["labels"]]
        names = {case.fields["label"] for case in cases}
        numeric = all(name.lstrip("-").isdecimal() for name in names)
        found = sorted(names, key=int) if numeric else sorted(names)
        if len(found) < 2:
            raise DataError(
                f"{self.key}: every row has the label {found[0]!r}; name all labels in {self.key}.options.labels"
            )
        return found

    def weighted_metrics(self, rows: Sequence[TaskRow]) -> dict[str, Callable[[np.ndarray], float]]:
        from sklearn.metrics import f1_score, matthews_corrcoef

        true, said = [row.reference for row in rows], [row.answer for row in rows]
        right = np.array([row.scores["right"] for row in rows])
        sure = np.array([row.scores["confidence"] for row in rows])

        def f1_macro(weights: np.ndarray) -> float:
            there = weights > 0  # labels that a resample does not have are none of its labels
            some = [np.array(each)[there] for each in (true, said)]
            return float(f1_score(*some, average="macro", sample_weight=weights[there], zero_division=0))

        return {
            "f1_macro": f1_macro,
            "mcc": lambda weights: float(matthews_corrcoef(true, said, sample_weight=weights)),
            "calibration_error": lambda weights: calibration_error(right, sure, weights),
        }

    def signatures(self) -> dict[str, str]:
        from importlib.metadata import version

        made = f"scikit-learn:{version('scikit-learn')}"
        return {"f1_macro": made, "mcc": made, "calibration_error": f"bins:{BINS}|equal width"}


def calibration_error(right: np.ndarray, sure: np.ndarray, weights: np.ndarray) -> float:
    """Mean distance between how sure and how right, over bins of confidence, weighted by their rows (all float64 [rows])."""
    bins = np.clip(np.ceil(sure * BINS).astype(int) - 1, 0, BINS - 1)
    apart = np.bincount(bins, weights * (right - sure), BINS)
    return float(np.abs(apart).sum() / weights.sum())


def confusion(rows: Sequence[TaskRow]) -> tuple[list[str], list[list[int]]]:
    """(labels, counts [true][predicted]), by scikit-learn."""
    from sklearn.metrics import confusion_matrix

    names = sorted({row.reference for row in rows} | {row.answer for row in rows})
    counts = confusion_matrix([row.reference for row in rows], [row.answer for row in rows], labels=names)
    return names, counts.tolist()


def _place(where: str) -> tuple[str, int]:
    file, _, line = where.rpartition(":")
    return file, int(line)
