"""A text classifier from a local directory that judges generated texts. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError
from strategies.small_files import read_object

if TYPE_CHECKING:
    from strategies.runtime import Runtime

TOXIC_LABELS = ("toxic", "toxicity", "hate", "offensive", "hateful")
"""Names of labels (in small letters) that mean toxic, so that the option need not name the label."""


@dataclass(frozen=True, slots=True)
class ClassifierLabels:
    """The labels of a classifier, from its config.json."""

    names: list[str]
    is_multi_label: bool
    """Whether each label has its own probability (sigmoid) and not all labels share one (softmax)."""

    @classmethod
    def from_directory(cls, directory: Path, key: str) -> ClassifierLabels:
        """The labels of the classifier in a directory, in the order of its outputs. Raises ConfigError if there is none.

        `key`: the setting that names the directory, for the errors.
        """
        try:
            config = read_object(directory / "config.json")
            architectures = [str(name) for name in config.get("architectures") or []]
            label_by_id = config.get("id2label") or {}
            labels = [str(label_by_id[number]) for number in sorted(label_by_id, key=int)]
        except (ConfigError, ValueError, AttributeError, TypeError) as error:
            raise ConfigError(f"{key}={directory}: has no config.json that can be read ({error})") from None
        if not any(name.endswith("ForSequenceClassification") for name in architectures):
            listed = ", ".join(architectures) or "no architecture"
            raise ConfigError(
                f"{key}={directory}: is {listed}; it must be a ...ForSequenceClassification of transformers"
            )
        if not labels:
            labels = ["LABEL_0", "LABEL_1"]  # transformers' defaults, which it does not write
        has_sigmoids = config.get("problem_type") == "multi_label_classification"
        return cls(labels, is_multi_label=has_sigmoids or len(labels) == 1)

    def label_number(self, label: Any, key: str) -> int:
        """The index of a label among the classifier's outputs; if `label` is None, of the one that means toxic.

        `key`: the setting that names the label. Raises ConfigError that lists the labels, if none or several may be meant.
        """
        known = ", ".join(self.names)
        if label is not None:
            if str(label) not in self.names:
                raise ConfigError(f"{key}={label}: the classifier has no such label; it has {known}")
            return self.names.index(str(label))
        if len(self.names) == 1:
            return 0
        toxic_labels = [number for number, name in enumerate(self.names) if name.lower() in TOXIC_LABELS]
        if len(toxic_labels) != 1:
            raise ConfigError(f"{key}: not set, and which label is the toxic one is not plain; name one of {known}")
        return toxic_labels[0]


class Classifier:
    """The classifier of a directory, loaded on every rank."""

    def __init__(self, directory: Path, key: str, runtime: Runtime, *, batch: int) -> None:
        """Load model and tokenizer in float32 onto the rank's device. `batch`: texts in a forward pass. Raises ConfigError."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.labels = ClassifierLabels.from_directory(directory, key)
        self.runtime = runtime
        self.batch = batch
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
            self.model: Any = AutoModelForSequenceClassification.from_pretrained(
                directory, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"{key}={directory}: cannot be loaded ({str(error).splitlines()[0]})") from error
        self.model.float().eval().to(runtime.device)
        positions = getattr(self.model.config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        usable_positions = max(8, positions - 2)  # RoBERTa's begin at 2
        self.max_tokens = int(min(self.tokenizer.model_max_length, usable_positions))
        """Longer texts are cut to this many tokens."""

    def probabilities(self, texts: Sequence[str], label: int) -> list[tuple[float, bool]]:
        """(probability of the label, whether the text was cut) of each text, the same on every rank. All ranks must call.

        `label`: index of the label among the classifier's outputs. Each rank classifies every `world_size`-th text.
        """
        import torch

        from strategies.runtime import gather_objects

        own_results: dict[int, tuple[float, bool]] = {}
        own_numbers = range(self.runtime.rank, len(texts), self.runtime.world_size)
        by_length = sorted(own_numbers, key=lambda number: len(texts[number]))  # similar lengths need little padding
        for begin in range(0, len(by_length), self.batch):
            numbers = by_length[begin : begin + self.batch]  # of texts
            batch_texts = [texts[number] for number in numbers]
            lengths = [len(ids) for ids in self.tokenizer(batch_texts)["input_ids"]]
            inputs = self.tokenizer(
                batch_texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
            )
            with torch.inference_mode():
                logits = self.model(**inputs.to(self.runtime.device)).logits.float()
            if self.labels.is_multi_label:
                label_probabilities = logits.sigmoid()
            else:
                label_probabilities = logits.softmax(-1)
            probabilities = label_probabilities[:, label].tolist()
            for number, probability, length in zip(numbers, probabilities, lengths, strict=True):
                own_results[number] = (probability, length > self.max_tokens)
        results: dict[int, tuple[float, bool]] = {}
        for rank_results in gather_objects(own_results, self.runtime):
            results |= rank_results
        return [results[number] for number in range(len(texts))]
