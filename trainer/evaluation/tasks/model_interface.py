"""What tasks may ask a model for: answers, likelihoods, labels, losses. Every request is a collective: all ranks must call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from strategies.errors import ConfigError, DataError, Interrupted
from trainer.data.document import Document
from trainer.evaluation.base import DecodingConfig

if TYPE_CHECKING:
    from torch import Tensor

    from strategies.base import Engine
    from strategies.runtime import Runtime
    from trainer.data.store.sequences import Sample, TokenDataset
    from trainer.data.tokens.encode import Encoder
    from trainer.evaluation.endpoint.judge import Judge
    from trainer.evaluation.generate import AnswerGenerator, GeneratedAnswer
    from trainer.evaluation.likelihood import Likelihood
    from trainer.step import BuiltModel

TokenIds = list[int]
SHOWN_CHARACTERS = 4000
"""A prompt in a report is cut to this many characters, its last ones."""


@dataclass(frozen=True, slots=True)
class Question:
    """A document as tokens, split before its last answer. The answer is without the tokens that end it."""

    where: str
    context: TokenIds
    answer: TokenIds


class SequenceLoss(NamedTuple):
    """What the model makes of the targets of a sequence."""

    summed_loss: float
    """Nats."""
    num_right: float
    """Targets that are the model's likeliest token."""


class RowsChecked(Exception):
    """Ends a task whose rows are only checked: all of them are encoded and fit, and it would ask the model now."""


@dataclass(slots=True)
class ModelInterface:
    """The model under evaluation, as tasks see it."""

    engine: Engine
    built: BuiltModel
    answer_generator: AnswerGenerator
    encoder: Encoder
    runtime: Runtime
    max_positions: int | None
    """Most tokens that the model can see; None if its configuration has no limit."""
    label_names: list[str] | None
    """Labels of a classification head, in the order of their ids; None for a language model."""
    stop_now: Callable[[], bool]
    batch: int
    judge: Judge | None = None
    """The model that judges answers; None if none is configured."""
    cached_losses: dict[tuple[int, int | None], dict[int, SequenceLoss]] = field(default_factory=dict)
    """Results of `sequence_losses` by (id of the data set, max_rows), so that tasks on the same data share one pass.

    `TaskEvaluator` clears it before each evaluation, since the weights have changed."""
    checks_only: bool = False
    """Whether rows are only encoded and checked. Then each request raises RowsChecked and nothing is sent to the model."""

    @property
    def model_config(self) -> Any:
        """The configuration of the transformers model."""
        return self.built.config

    def encode_questions(self, documents: Sequence[Document]) -> list[Question]:
        """Turn documents into questions, the form in which tasks ask the model: token ids, split before the last answer.

        `context` is what the model reads; `answer` is the right answer, without the tokens that end it. One question for each
        document, in their order. No collective. Raises DataError with file and line for a document without tokens before its
        answer, or in its answer.
        """
        questions = []
        documents_to_ask = [_document_until_last_answer(document) for document in documents]
        for document, sample in self.encoder.encode(documents_to_ask):  # each document with its tokens
            answer_start = sample.answer_begin()
            # Marks the tokens that training would learn from; what stands between them is of the template.
            is_answer = sample.supervised[answer_start:]
            answer = sample.input_ids[answer_start:][is_answer].tolist()
            while answer and answer[-1] in self.encoder.end_ids:
                answer.pop()
            if not answer or answer_start == 0:
                where_empty = "before its answer" if answer else "in its answer"
                raise DataError(f"{document.location}: has no tokens {where_empty}, so that there is nothing to ask")
            context = sample.input_ids[:answer_start].tolist()
            questions.append(Question(where=document.location, context=context, answer=answer))
        return questions

    def text_ids(self, document: Document) -> TokenIds:
        """Token ids of a plain text, without the tokens that end it. No collective. Raises DataError with file and line."""
        ((_, sample),) = self.encoder.encode([document])
        ids: TokenIds = sample.input_ids.tolist()
        while ids and ids[-1] in self.encoder.end_ids:
            ids.pop()
        return ids

    def generate_answers(
        self, questions: Sequence[Question], decoding: DecodingConfig, task_key: str
    ) -> list[GeneratedAnswer]:
        """Let the model answer questions: as many answers to each as `decoding.draws` says, question by question.

        `decoding`: how answers are generated (`evaluation.tasks.NAME.write`). `task_key`: the settings of the task
        (`evaluation.tasks.NAME`), for the error. All ranks must call. Raises DataError for a question that leaves too few
        positions for an answer, RowsChecked if rows are only checked.
        """
        answer_tokens = decoding.max_new_tokens
        self._raise_if_too_long(questions, answer_tokens, f"{task_key}.write.max_new_tokens={answer_tokens}")
        self._raise_if_only_checking()
        prompts = [question.context for question in questions]
        return self.answer_generator.generate_answers(self.engine, prompts, decoding)

    def likelihoods(self, questions: Sequence[Question]) -> list[Likelihood]:
        """How likely the model finds each question's answer after its context, in their order. All ranks must call.

        There must be one question at least. Raises DataError for a question that is too long for the model, RowsChecked if
        rows are only checked (`checks_only`).
        """
        longest_answer = max(len(question.answer) for question in questions)
        self._raise_if_too_long(questions, longest_answer, "the answers")
        self._raise_if_only_checking()
        from trainer.evaluation.likelihood import ContinuationPair

        pairs = [ContinuationPair(question.context, question.answer) for question in questions]
        return self.answer_generator.likelihoods(self.engine, pairs)

    def require_judge(self, task_key: str) -> Judge:
        """The judge model, for a task that cannot do without. `task_key`: the task's settings.

        Raises ConfigError if none is configured.
        """
        if self.judge is None:
            raise ConfigError(f"{task_key}: needs a judge; give evaluation.judge.url=http://host:port/v1")
        return self.judge

    def _raise_if_too_long(self, questions: Sequence[Question], answer_tokens: int, purpose: str) -> None:
        """Refuse a question whose context and answer do not fit the model's positions. Raises DataError with file and line.

        `answer_tokens`: the most tokens of an answer. `purpose`: what they are for, in the message, such as "the answers".
        """
        if self.max_positions is None:
            return
        for question in questions:
            if len(question.context) + answer_tokens > self.max_positions:
                raise DataError(
                    f"{question.where}: {len(question.context)} tokens, and {answer_tokens} for {purpose}, are more than the "
                    f"{self.max_positions} positions of the model; shorten the row, or leave it out"
                )

    def decode_prompt_end(self, ids: TokenIds) -> str:
        """The text of a prompt for the report: its last `SHOWN_CHARACTERS` characters, after "…" if it is longer."""
        text: str = self.answer_generator.tokenizer.decode(ids, skip_special_tokens=True)
        return text if len(text) <= SHOWN_CHARACTERS else f"…{text[-SHOWN_CHARACTERS:]}"

    def logits(self, samples: Sequence[Sample]) -> list[list[float]]:
        """The logits of the classification head for tokenised texts, [samples][labels], the same on every rank.

        All ranks must call. The model is run as for training, with an objective that returns logits in place of a loss. Raises
        RowsChecked if rows are only checked, Interrupted if the run is asked to stop.
        """
        self._raise_if_only_checking()
        from strategies.runtime import gather_objects
        from trainer.data.batches.collate import to_device
        from trainer.evaluation.generate import batches_of_rank, replaced_objective

        own_logits: dict[int, list[float]] = {}  # by index of the sample
        lengths = [len(sample.input_ids) for sample in samples]
        # Lists of indices of samples.
        batches = batches_of_rank(lengths, self.engine.rank, self.engine.world_size, max_rows=self.batch)
        with self.engine.inference() as module:
            step_module: Any = module
            with replaced_objective(step_module, _ClassifierLogits()):
                for row_numbers in batches:
                    # The forward pass is a collective: a rank without rows in this batch runs it on row 0 and drops the result.
                    batch = self.built.collator([samples[row] for row in row_numbers or [0]])
                    logits = step_module(to_device(batch, self.runtime.device))["logits"].tolist()
                    own_logits |= dict(zip(row_numbers, logits, strict=False))
                    self._raise_if_stop_requested()
        all_logits: dict[int, list[float]] = {}
        for rank_logits in gather_objects(own_logits, self.runtime):
            all_logits |= rank_logits
        return [all_logits[row] for row in range(len(samples))]

    def sequence_losses(self, dataset: TokenDataset, max_rows: int | None) -> dict[int, SequenceLoss]:
        """Loss and number of right targets of each sequence of a data set, by its index, by forward passes as in training.

        The result is kept in `cached_losses`, so that a second task on the same data needs no forward pass. `max_rows`:
        evaluate the first so many documents; None: all. All ranks must call. Raises RowsChecked if rows are only checked,
        Interrupted if the run is asked to stop.
        """
        self._raise_if_only_checking()
        from strategies.runtime import gather_objects
        from trainer.data.batches.cutting import sequence_cut
        from trainer.data.batches.loader import EvalShare, eval_batches, eval_micro_batches

        cache_key = (id(dataset), max_rows)
        if cache_key in self.cached_losses:
            return self.cached_losses[cache_key]
        # One sequence in a micro-batch, so that the sums of a batch are those of a sequence.
        runtime = self.runtime
        # The slice of each row that this rank takes under sequence parallelism; None without it.
        cut = sequence_cut(runtime)
        share = EvalShare(1, runtime.dp_rank, runtime.dp_size, max_rows, cut=cut)
        batches = eval_batches(dataset, share, self.built.collator, self.runtime.device)
        own_results: dict[int, SequenceLoss] = {}
        with self.engine.inference() as module:
            for sequence_indices, batch in zip(eval_micro_batches(dataset, share), batches, strict=True):
                # "step_means": means of a first pass, which these losses do without.
                terms = module({**batch, "step_means": {}})
                for index in sequence_indices:
                    own_results[index] = SequenceLoss(
                        summed_loss=float(terms["loss"].double()), num_right=float(terms["accuracy"].double())
                    )
                self._raise_if_stop_requested()
        all_results: dict[int, SequenceLoss] = {}
        for rank_results in gather_objects(own_results, runtime):
            for index, result in rank_results.items():
                # Ranks that split a row (`parallel.sequence`) have a share of its sums each: they are added up.
                so_far = all_results.get(index, SequenceLoss(0.0, 0.0))
                all_results[index] = SequenceLoss(
                    so_far.summed_loss + result.summed_loss, so_far.num_right + result.num_right
                )
        self.cached_losses[cache_key] = all_results
        return all_results

    def _raise_if_only_checking(self) -> None:
        """Raise RowsChecked if rows are only checked."""
        if self.checks_only:
            raise RowsChecked

    def _raise_if_stop_requested(self) -> None:
        """Raise Interrupted if the run is asked to stop; all ranks must call, as `stop_now` is agreed on by all of them."""
        if self.stop_now():
            raise Interrupted


class _ClassifierLogits:
    """Takes the place of the objective in a step module: returns the classifier's logits instead of a loss."""

    def terms(self, model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        from trainer.objectives.pooled import classifier_logits

        return {"logits": classifier_logits(model, batch)}


def _document_until_last_answer(document: Document) -> Document:
    """Cut a conversation behind its last answer, and leave only that answer to be learned: it is the one that is asked.

    Returns a copy. A document without messages is returned as it is. A conversation must have an answer.
    """
    if document.messages is None:
        return document
    last_index = max(index for index, turn in enumerate(document.messages) if turn["role"] == "assistant")
    turns = [{**turn, "train": index == last_index} for index, turn in enumerate(document.messages[: last_index + 1])]
    for turn in turns:
        turn.pop("weight", None)  # of a turn in the loss of training: an answer that is asked counts whole
    return replace(document, messages=turns)


def last_answer(document: Document) -> dict[str, Any] | None:
    """The last answer of a document as a turn, {"role": "assistant", "content": ...}; None if it has no answer."""
    if document.messages is not None:
        return next((turn for turn in reversed(document.messages) if turn["role"] == "assistant"), None)
    if document.prompt is None or document.completion is None:
        return None
    return {"role": "assistant", "content": document.completion}


def softmax(logits: Sequence[float]) -> list[float]:
    """Probabilities, float64. The highest logit is subtracted first, so that no exponential overflows."""
    exponentials = np.exp(np.array(logits, np.float64) - max(logits))
    return (exponentials / exponentials.sum()).tolist()
