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
"""Labels that are taken without being named."""


@dataclass(frozen=True, slots=True)
class ClassifierLabels:
    """What a classifier's config.json says of its labels."""

    names: list[str]
    is_multi_label: bool
    """Whether each label is judged by itself (a sigmoid), not one against the others (a softmax)."""

    @classmethod
    def from_directory(cls, directory: Path, key: str) -> ClassifierLabels:
        """That of a directory. Raises ConfigError where it holds no sequence classifier."""
        try:
            config = read_object(directory / "config.json")
            names = [str(name) for name in config.get("architectures") or []]
            known = config.get("id2label") or {}
            labels = [str(known[number]) for number in sorted(known, key=int)]
        except (ConfigError, ValueError, AttributeError, TypeError) as error:
            raise ConfigError(f"{key}={directory}: has no config.json that can be read ({error})") from None
        if not any(name.endswith("ForSequenceClassification") for name in names):
            said = ", ".join(names) or "no architecture"
            raise ConfigError(
                f"{key}={directory}: is {said}; it must be a ...ForSequenceClassification of transformers"
            )
        labels = labels or ["LABEL_0", "LABEL_1"]  # transformers' own, which it does not write down
        return cls(labels, config.get("problem_type") == "multi_label_classification" or len(labels) == 1)

    def label_number(self, label: Any, key: str) -> int:
        """Which label is meant, None for the usual ones. Raises ConfigError with those that there are."""
        there = ", ".join(self.names)
        if label is not None:
            if str(label) not in self.names:
                raise ConfigError(f"{key}={label}: the classifier has no such label; it has {there}")
            return self.names.index(str(label))
        usual = [number for number, name in enumerate(self.names) if name.lower() in TOXIC_LABELS]
        if len(self.names) == 1:
            return 0
        if len(usual) != 1:
            raise ConfigError(f"{key}: not set, and which label is the toxic one is not plain; name one of {there}")
        return usual[0]


class Classifier:
    """The classifier of a directory, loaded on every rank."""

    def __init__(self, directory: Path, key: str, runtime: Runtime, *, batch: int) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.labels, self.runtime, self.batch = ClassifierLabels.from_directory(directory, key), runtime, batch
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
            self.model: Any = AutoModelForSequenceClassification.from_pretrained(
                directory, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"{key}={directory}: cannot be loaded ({str(error).splitlines()[0]})") from error
        self.model.float().eval().to(runtime.device)
        positions = getattr(self.model.config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        self.max_tokens = int(min(self.tokenizer.model_max_length, max(8, positions - 2)))  # RoBERTa's begin at 2
        """Most tokens of a text that it reads."""

    def probabilities(self, texts: Sequence[str], label: int) -> list[tuple[float, bool]]:
        """(probability of the label, whether the text was cut) of each text, the same on every rank. All ranks must call."""
        import torch

        from strategies.runtime import gather_objects

        found: dict[int, tuple[float, bool]] = {}
        mine = sorted(range(self.runtime.rank, len(texts), self.runtime.world_size), key=lambda n: len(texts[n]))
        for begin in range(0, len(mine), self.batch):
            turn = mine[begin : begin + self.batch]
            some = [texts[number] for number in turn]
            sizes = [len(ids) for ids in self.tokenizer(some)["input_ids"]]
            inputs = self.tokenizer(
                some, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
            )
            with torch.inference_mode():
                logits = self.model(**inputs.to(self.runtime.device)).logits.float()
            likely = logits.sigmoid() if self.labels.is_multi_label else logits.softmax(-1)
            cut = [size > self.max_tokens for size in sizes]
            found |= dict(zip(turn, zip(likely[:, label].tolist(), cut, strict=True), strict=True))
        together = {number: said for part in gather_objects(found, self.runtime) for number, said in part.items()}
        return [together[number] for number in range(len(texts))]
