"""What tasks may ask of a model: answers, likelihoods, labels, losses. All are collectives: all ranks must call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from strategies.errors import ConfigError, DataError, Interrupted
from trainer.data.document import Document
from trainer.evaluation.base import WritingConfig

if TYPE_CHECKING:
    from torch import Tensor

    from strategies.base import Engine
    from strategies.runtime import Runtime
    from trainer.data.store.sequences import Sample, TokenDataset
    from trainer.data.tokens.encode import Encoder
    from trainer.evaluation.endpoint.judge import Judge
    from trainer.evaluation.generate import Writer, WrittenAnswer
    from trainer.evaluation.likelihood import Likelihood
    from trainer.step import Built

TokenIds = list[int]
SHOWN_CHARACTERS = 400
"""Characters of a prompt that are kept, its last ones."""


@dataclass(frozen=True, slots=True)
class Question:
    """A document as tokens: what the model is told, and what it should say, without the tokens that end it."""

    where: str
    context: TokenIds
    answer: TokenIds


class FirstRequest(Exception):
    """A task whose rows are only checked would now ask the model: its rows are encoded, and they fit."""


@dataclass(slots=True)
class ModelInterface:
    """A model that can be asked, and how."""

    engine: Engine
    built: Built
    writer: Writer
    encoder: Encoder
    runtime: Runtime
    max_positions: int | None
    """Most tokens that the model can see, where its configuration says so."""
    label_names: list[str] | None
    """Those of a classifier, in the order of their ids."""
    stop_now: Callable[[], bool]
    batch: int
    judge: Judge | None = None
    """The model that judges answers, where there is one."""
    cached_losses: dict[tuple[int, int | None], dict[int, tuple[float, float]]] = field(default_factory=dict)
    """What `terms` found since the weights were last changed, so that several tasks of one data set share a pass."""
    checks_only: bool = False
    """Whether rows are only encoded and checked: a request raises FirstRequest before the model or a server hears of it."""

    @property
    def model_config(self) -> Any:
        """The model's settings, transformers' own."""
        return self.built.config

    def encode_questions(self, documents: Sequence[Document]) -> list[Question]:
        """Documents as tokens, split before their last answer. No collective. Raises DataError with file and line."""
        asked = [_until_last_answer(document) for document in documents]
        found = []
        for document, sample in self.encoder.encode(asked):
            cut = sample.answer_begin()
            learned = sample.input_ids[cut:][sample.supervised[cut:]].tolist()
            while learned and learned[-1] in self.encoder.end_ids:
                learned.pop()
            if cut == 0 or not learned:
                what = "before its answer" if learned else "in its answer"
                raise DataError(f"{document.where}: has no tokens {what}, so that there is nothing to ask")
            found.append(Question(document.where, sample.input_ids[:cut].tolist(), learned))
        return found

    def text_ids(self, document: Document) -> TokenIds:
        """Token ids of a plain text, without the tokens that end it. No collective. Raises DataError with file and line."""
        ((_, sample),) = self.encoder.encode([document])
        ids: TokenIds = sample.input_ids.tolist()
        while ids and ids[-1] in self.encoder.end_ids:
            ids.pop()
        return ids

    def answers(self, questions: Sequence[Question], how: WritingConfig, key: str) -> list[WrittenAnswer]:
        """What the model writes. Raises DataError for a question that leaves no room."""
        self._check_lengths(questions, how.max_new_tokens, f"{key}.write.max_new_tokens={how.max_new_tokens}")
        self._stop_if_only_checking()
        return self.writer.answers(self.engine, [question.context for question in questions], how)

    def likelihoods(self, questions: Sequence[Question]) -> list[Likelihood]:
        """How likely the model holds each answer."""
        self._check_lengths(questions, max(len(question.answer) for question in questions), "the answers")
        self._stop_if_only_checking()
        return self.writer.likelihoods(self.engine, [(question.context, question.answer) for question in questions])

    def require_judge(self, key: str) -> Judge:
        """The judge. Raises ConfigError where there is none."""
        if self.judge is None:
            raise ConfigError(f"{key}: needs a judge; give evaluation.judge.url=http://host:port/v1")
        return self.judge

    def _check_lengths(self, questions: Sequence[Question], more: int, what: str) -> None:
        for question in questions:
            if self.max_positions is not None and len(question.context) + more > self.max_positions:
                raise DataError(
                    f"{question.where}: {len(question.context)} tokens, and {more} for {what}, are more than the "
                    f"{self.max_positions} positions of the model; shorten the row, or leave it out"
                )

    def shown_prompt(self, ids: TokenIds) -> str:
        """The end of a prompt as text."""
        text: str = self.writer.tokenizer.decode(ids, skip_special_tokens=True)
        return text if len(text) <= SHOWN_CHARACTERS else f"…{text[-SHOWN_CHARACTERS:]}"

    def logits(self, samples: Sequence[Sample]) -> list[list[float]]:
        """What a classifier's head says of each sample, a number for each label."""
        self._stop_if_only_checking()
        from strategies.runtime import gather_objects
        from trainer.data.batches.collate import to_device
        from trainer.evaluation.generate import sharded_batches

        found: dict[int, list[float]] = {}
        lengths = [len(sample.input_ids) for sample in samples]
        with self.engine.inference() as module:
            step: Any = module
            before, step.objective = step.objective, _ClassifierLogits()
            try:
                for turn in sharded_batches(lengths, self.engine.dp_rank, self.engine.dp_size, size=self.batch):
                    batch = self.built.collator([samples[row] for row in turn or [0]])
                    said = step(to_device(batch, self.runtime.device))["logits"].tolist()
                    found |= dict(zip(turn, said, strict=False))
                    self._check_stop()
            finally:
                step.objective = before
        together = {row: said for part in gather_objects(found, self.runtime) for row, said in part.items()}
        return [together[row] for row in range(len(samples))]

    def sequence_losses(self, dataset: TokenDataset, max_rows: int | None) -> dict[int, tuple[float, float]]:
        """(summed loss, targets that were the likeliest token) of each sequence, one in a micro-batch, by its number."""
        self._stop_if_only_checking()
        from strategies.runtime import gather_objects
        from trainer.data.batches.loader import EvalShare, eval_batches, eval_plan

        if (before := self.cached_losses.get((id(dataset), max_rows))) is not None:
            return before
        share = EvalShare(1, self.engine.dp_rank, self.engine.dp_size, max_rows)
        batches = eval_batches(dataset, share, self.built.collator, self.runtime.device)
        found: dict[int, tuple[float, float]] = {}
        with self.engine.inference() as module:
            for numbers, batch in zip(eval_plan(dataset, share), batches, strict=True):
                terms = module({**batch, "ahead": {}})
                for number in numbers:
                    found[number] = (float(terms["loss"].double()), float(terms["accuracy"].double()))
                self._check_stop()
        together = {number: each for part in gather_objects(found, self.runtime) for number, each in part.items()}
        self.cached_losses[id(dataset), max_rows] = together
        return together

    def _stop_if_only_checking(self) -> None:
        """Raises FirstRequest where rows are only checked."""
        if self.checks_only:
            raise FirstRequest

    def _check_stop(self) -> None:
        if self.stop_now():
            raise Interrupted


class _ClassifierLogits:
    """Stands in for the objective: the classifier's logits instead of a loss."""

    def terms(self, model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return {"logits": found.logits.float()}


def _until_last_answer(document: Document) -> Document:
    """The document up to its last answer, which alone is to be said."""
    if document.messages is None:
        return document
    last = max(place for place, turn in enumerate(document.messages) if turn["role"] == "assistant")
    turns = [{**turn, "train": place == last} for place, turn in enumerate(document.messages[: last + 1])]
    for turn in turns:
        turn.pop("weight", None)
    return replace(document, messages=turns)


def last_answer(document: Document) -> dict[str, Any] | None:
    """The last answer of a document as a turn; None where it has none."""
    if document.messages is None:
        return None if document.prompt is None else {"role": "assistant", "content": document.completion or ""}
    return next((turn for turn in reversed(document.messages) if turn["role"] == "assistant"), None)


def softmax(logits: Sequence[float]) -> list[float]:
    """Probabilities, float64."""
    values = np.exp(np.array(logits, np.float64) - max(logits))
    return (values / values.sum()).tolist()
