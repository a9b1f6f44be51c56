"""A text classifier from a local directory that judges generated texts. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from strategies.errors import ConfigError
from strategies.small_files import read_json_object

if TYPE_CHECKING:
    from strategies.runtime import Runtime

TOXIC_LABEL_NAMES = ("toxic", "toxicity", "hate", "offensive", "hateful")
"""Names of labels (in small letters) that mean toxic, so that the option need not name the label."""


@dataclass(frozen=True, slots=True)
class ClassifierLabels:
    """The labels of a classifier, from its config.json."""

    names: list[str]
    is_multi_label: bool
    """Whether each label has its own probability (sigmoid) and not all labels share one (softmax)."""

    @classmethod
    def from_directory(cls, directory: Path, setting_key: str) -> ClassifierLabels:
        """Read the labels of the classifier in a directory from its config.json, in the order of its outputs.

        `setting_key`: the setting that names the directory, for the error. Raises ConfigError if the file cannot be read, or
        the model is no sequence classifier.
        """
        try:
            config = read_json_object(directory / "config.json")
            architectures = [str(name) for name in config.get("architectures") or []]
            label_by_id = config.get("id2label") or {}
            labels = [str(label_by_id[label_id]) for label_id in sorted(label_by_id, key=int)]
        except (ConfigError, ValueError, AttributeError, TypeError) as error:
            raise ConfigError(f"{setting_key}={directory}: has no config.json that can be read ({error})") from None
        if not any(name.endswith("ForSequenceClassification") for name in architectures):
            listed = ", ".join(architectures) or "no architecture"
            raise ConfigError(
                f"{setting_key}={directory}: is {listed}; it must be a ...ForSequenceClassification of transformers"
            )
        if not labels:
            labels = ["LABEL_0", "LABEL_1"]  # transformers leaves its default labels out of config.json
        is_multi_label_problem = config.get("problem_type") == "multi_label_classification"
        return cls(labels, is_multi_label=is_multi_label_problem or len(labels) == 1)

    def toxic_label_index(self, label: Any, setting_key: str) -> int:
        """Which output of the classifier says how toxic a text is, as an index:

        - `label`, the user's setting, is set: that label.
        - The classifier has one label: 0.
        - Else: the only label whose name is in `TOXIC_LABEL_NAMES`.

        `setting_key`: the setting that names the label, for the error. Raises ConfigError that lists the labels if there is no
        such label, or several.
        """
        known_labels = ", ".join(self.names)
        if label is not None:
            if str(label) not in self.names:
                raise ConfigError(f"{setting_key}={label}: the classifier has no such label; it has {known_labels}")
            return self.names.index(str(label))
        if len(self.names) == 1:
            return 0
        toxic_indices = [index for index, name in enumerate(self.names) if name.lower() in TOXIC_LABEL_NAMES]
        if len(toxic_indices) != 1:
            raise ConfigError(
                f"{setting_key}: not set, and which label is the toxic one is not plain; name one of {known_labels}"
            )
        return toxic_indices[0]


class ClassifiedText(NamedTuple):
    """What a classifier says of a text."""

    probability: float
    """Of the label that was asked for."""
    is_truncated: bool
    """Whether the text was too long for the classifier, so that only its beginning was read."""


class Classifier:
    """The classifier of a directory, loaded on every rank."""

    def __init__(self, directory: Path, setting_key: str, runtime: Runtime, *, batch: int) -> None:
        """Load model and tokenizer from a directory, in float32, onto the rank's device.

        `setting_key`: the setting that names the directory, for the error. `batch`: texts in a forward pass. Raises
        ConfigError if they cannot be loaded.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.labels = ClassifierLabels.from_directory(directory, setting_key)
        self.runtime = runtime
        self.batch = batch
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
            self.model: Any = AutoModelForSequenceClassification.from_pretrained(
                directory, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"{setting_key}={directory}: cannot be loaded ({str(error).splitlines()[0]})") from error
        self.model.float().eval().to(runtime.device)
        positions = getattr(self.model.config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        usable_positions = max(8, positions - 2)  # RoBERTa's begin at 2
        self.max_tokens = int(min(self.tokenizer.model_max_length, usable_positions))
        """Longer texts are cut to this many tokens."""

    def classify(self, texts: Sequence[str], label_index: int) -> list[ClassifiedText]:
        """The probability of one label for each text, in their order, the same on every rank. All ranks must call.

        `label_index`: index of the label among the classifier's outputs. Each rank classifies every `world_size`-th text.
        """
        from strategies.runtime import gather_objects

        own_indices = range(self.runtime.rank, len(texts), self.runtime.world_size)
        by_length = sorted(own_indices, key=lambda index: len(texts[index]))  # similar lengths need little padding
        own_results: dict[int, ClassifiedText] = {}  # by index of the text
        for begin in range(0, len(by_length), self.batch):
            batch_indices = by_length[begin : begin + self.batch]
            batch_results = self._classify_texts([texts[index] for index in batch_indices], label_index)
            own_results |= zip(batch_indices, batch_results, strict=True)
        results: dict[int, ClassifiedText] = {}
        for rank_results in gather_objects(own_results, self.runtime):
            results |= rank_results
        return [results[index] for index in range(len(texts))]

    def _classify_texts(self, texts: list[str], label_index: int) -> list[ClassifiedText]:
        """The probability of one label for each of a few texts, from one forward pass on this rank."""
        import torch

        lengths = [len(ids) for ids in self.tokenizer(texts)["input_ids"]]  # before they are cut to `max_tokens`
        inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        with torch.inference_mode():
            logits = self.model(**inputs.to(self.runtime.device)).logits.float()  # [texts, labels]
        probabilities = logits.sigmoid() if self.labels.is_multi_label else logits.softmax(-1)
        results = []
        for probability, length in zip(probabilities[:, label_index].tolist(), lengths, strict=True):
            results.append(ClassifiedText(probability, is_truncated=length > self.max_tokens))
        return results
