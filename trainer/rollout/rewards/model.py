"""Reward models: frozen classifiers with one label that score written answers between two steps, sharded as the run is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from strategies.base import Engine, InferenceWeights
from strategies.errors import ConfigError, DataError, Interrupted, ShardtuneError
from strategies.runtime import Runtime, gather_objects
from trainer.data.document import Document
from trainer.data.tokens.characters import ESCAPE_MARK
from trainer.data.tokens.encode import Encoder
from trainer.data.tokens.template import RenderedText
from trainer.rollout.types import AnswerGroup

SCORES = "scores"
"""The term that a pass of a reward model returns in place of a loss."""


@dataclass(frozen=True, slots=True)
class RewardModelReader:
    """Makes tokens of prompts with their answers, as a reward model reads them: by its own tokenizer and chat template."""

    encoder: Encoder
    pad_token_id: int
    vocabulary_size: int
    """Rows of the model's embeddings. A token without a row would end the process, on a GPU without a word."""
    max_positions: int | None
    """Most tokens that the model can read; None: any number."""
    max_batch_tokens: int
    """Tokens of a micro-batch, padding included."""

    def encode_group(self, group: AnswerGroup) -> list[list[int] | None]:
        """Turn a prompt with each answer into token ids as the reward model reads them; None for one that is too long for it.

        The chat template writes prompt and answer as a conversation; a prompt that is a text is a user's turn. Control tokens
        such as <|im_end|> in an answer are plain text, as in prompts: else a policy could learn to write turns of its own. Raises
        DataError for a conversation that the template does not write, and for a token that the model has no row for.
        """
        prompt = group.prompt.text
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        rendered = []
        for answer in group.answers:
            text = self._render_conversation(turns, answer.text, group.prompt.origin)
            # `_render_conversation` has escaped control tokens, with a mark. The encoder undoes that: they become ordinary
            # characters.
            rendered.append(RenderedText(text, spans=[], escaped=ESCAPE_MARK in text))
        ids_of_answers: list[list[int] | None] = []
        for encoded in self.encoder.tokenize(rendered):
            self._raise_if_unknown_token(encoded.ids, group.prompt.origin)
            fits = self.max_positions is None or len(encoded.ids) <= self.max_positions
            ids_of_answers.append(list(encoded.ids) if fits else None)
        return ids_of_answers

    def _raise_if_unknown_token(self, token_ids: Sequence[int], origin: str) -> None:
        """Raise DataError for a token id that the model has no embedding for. `origin`: what has the token, for the message."""
        largest = max(token_ids, default=0)
        if largest >= self.vocabulary_size:
            raise DataError(
                f"{origin}: the reward model's tokenizer makes token {largest} of it, and the model "
                f"has {self.vocabulary_size} rows of "
                "embeddings; give it the tokenizer that it was trained with"
            )

    def _render_conversation(self, turns: Sequence[Mapping[str, Any]], answer: str, origin: str) -> str:
        """Write a prompt's turns and an answer by the chat template, with control tokens in their texts escaped.

        Control tokens in the turns are handled by the policy for prompts (`data.control_tokens`); those in the answer are always
        escaped. `origin`: row of the prompt, for errors. Raises DataError if the template refuses the conversation.
        """
        assert self.encoder.template is not None, "checked when the reader was made"
        conversation = []
        for turn in turns:
            content = str(turn["content"])
            document = Document(origin, 0, text=content)  # for errors, and to look for control tokens
            escaped = self.encoder.escape_text(document, content)
            conversation.append({**turn, "content": escaped})
        # `ESCAPE_MARK`, a private character that marks escaped text, is removed from the answer, which could else forge the mark.
        answer = answer.replace(ESCAPE_MARK, "")
        if self.encoder.escaper.is_spelled_in(answer):
            answer = self.encoder.escaper.escape(answer)
        conversation.append({"role": "assistant", "content": answer})
        return self.encoder.template.render_text(conversation, origin)

    def raise_if_unable_to_score(self, setting: str) -> None:
        """Raise ConfigError before training, beginning with `setting`, if the model cannot read a question and its answer.

        That is so if its padding token is out of its vocabulary, if its chat template refuses the conversation or leaves the
        answer out, or if its tokenizer makes tokens that the model has no embedding for.
        """
        if not 0 <= self.pad_token_id < self.vocabulary_size:
            raise ConfigError(
                f"{setting}: its pad_token_id is {self.pad_token_id}, and the model has tokens 0 to "
                f"{self.vocabulary_size - 1}; mend pad_token_id in its config.json"
            )
        answer = "An answer."
        try:
            text = self._render_conversation([{"role": "user", "content": "A question?"}], answer, "a question")
        except ShardtuneError as error:
            raise ConfigError(
                f"{setting}: its chat template cannot write a question with its answer ({error})"
            ) from error
        if answer not in text:
            raise ConfigError(
                f"{setting}: its chat template leaves the answer out, which would score all answers alike; give another one with "
                "options.chat_template=FILE"
            )
        rendered = RenderedText(text, spans=[], escaped=ESCAPE_MARK in text)
        (encoded,) = self.encoder.tokenize([rendered])
        try:
            self._raise_if_unknown_token(encoded.ids, "a question and its answer")
        except DataError as error:
            raise ConfigError(f"{setting}: {error}") from error

    def micro_batch_indices(self, texts: Sequence[list[int]]) -> list[list[int]]:
        """Divide texts (token ids) into micro-batches, the longest texts first; returns the indices of the texts of each.

        A micro-batch has at most `max_batch_tokens` tokens, padding included, but at least one text.
        """
        batches: list[list[int]] = []
        current: list[int] = []
        for index in sorted(range(len(texts)), key=lambda index: len(texts[index]), reverse=True):
            # All texts of a batch are padded to the first one, which is the longest.
            if current and (len(current) + 1) * len(texts[current[0]]) > self.max_batch_tokens:
                batches.append(current)
                current = []
            current.append(index)
        return [*batches, current] if current else batches

    def padded_batch(self, texts: Sequence[list[int]], device: torch.device) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` of some texts, int64 [texts, longest], padded on the right."""
        longest = max(map(len, texts))
        input_ids = torch.full((len(texts), longest), self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(texts):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            attention_mask[row, : len(ids)] = 1
        return {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}


class _ModelScores:
    """Stands in for the objective during a pass: the scores of one reward model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`SCORES`, float32 `[texts]`; the trained model is not asked."""
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return {SCORES: logits[:, 0].float()}


class _AnswerText(NamedTuple):
    """A prompt with an answer that this rank scores."""

    group_index: int
    answer_index: int
    """Of the answer in its group."""
    ids: list[int]
    """Token ids of prompt and answer."""


class _AnswerScore(NamedTuple):
    """The score of an answer by a reward model."""

    group_index: int
    answer_index: int
    """Of the answer in its group."""
    score: float


class RewardModelScorer:
    """Scores whole groups by the reward models of an engine. Group g is scored by rank g modulo the number of ranks."""

    def __init__(
        self,
        readers: Mapping[str, RewardModelReader],
        engine: Engine,
        runtime: Runtime,
        stop_now: Callable[[], bool] = lambda: False,
    ) -> None:
        """`stop_now`: asked on all ranks after each micro-batch, whether to stop."""
        self.readers = readers
        self.engine = engine
        self.runtime = runtime
        self.stop_now = stop_now

    def scores(self, name: str, groups: Sequence[AnswerGroup]) -> list[np.ndarray]:
        """Score groups by reward model `name`: float64 [answers] of each group; nan for a text that is too long.

        A group is all answers to one prompt. All ranks must call, with the same groups. Raises on all ranks alike: DataError for
        a conversation that the chat template does not write, Interrupted if the run is asked to stop.
        """
        local_texts: list[_AnswerText] = []
        problem: str | None = None
        try:
            local_texts = self._local_texts(name, groups)
        except ShardtuneError as error:
            problem = str(error)
        problems = [message for message in gather_objects(problem, self.runtime) if message is not None]
        if problems:
            raise DataError(f"objective.rewards.{name}: {problems[0]}")
        local_scores = self._score_texts(name, [text.ids for text in local_texts])
        local_results = []
        for text, score in zip(local_texts, local_scores, strict=True):
            local_results.append(_AnswerScore(text.group_index, text.answer_index, score))
        scores = [np.full(len(group.answers), np.nan) for group in groups]  # stays nan for a text that is too long
        for rank_results in gather_objects(local_results, self.runtime):
            for group_index, answer_index, score in rank_results:
                scores[group_index][answer_index] = score
        return scores

    def _local_texts(self, name: str, groups: Sequence[AnswerGroup]) -> list[_AnswerText]:
        """The texts that this rank scores: prompts with answers of every `world_size`-th group, but for too long ones."""
        texts = []
        for group_index in range(self.runtime.rank, len(groups), self.runtime.world_size):
            for answer_index, ids in enumerate(self.readers[name].encode_group(groups[group_index])):
                if ids:
                    texts.append(_AnswerText(group_index, answer_index, ids))
        return texts

    def _score_texts(self, name: str, texts: Sequence[list[int]]) -> list[float]:
        """Score each text (token ids) of this rank by reward model `name`.

        All ranks must call, and each makes as many forward passes as the rank with the most texts. Raises Interrupted if the run
        is asked to stop.
        """
        reader = self.readers[name]
        batches = reader.micro_batch_indices(texts)
        num_passes = max(gather_objects(len(batches), self.runtime))
        filler = [[reader.pad_token_id]]  # read by a rank that has no batch left, because the pass is a collective
        scores = [0.0] * len(texts)
        with self.engine.inference(InferenceWeights.trained) as module:
            # The model is called through the root module's own forward, because only there a sharding engine gathers parameters.
            # While answers are scored, the reward model takes the place of the objective, and nothing is added to a loss.
            step_module: Any = module
            training_objective = step_module.objective
            added_losses = step_module.added_losses
            step_module.objective = _ModelScores(step_module.reward_models[name])
            step_module.added_losses = None
            try:
                for number in range(num_passes):
                    indices = batches[number] if number < len(batches) else []
                    batch = reader.padded_batch([texts[index] for index in indices] or filler, self.runtime.device)
                    batch_scores = step_module(batch)[SCORES].tolist()
                    for index, score in zip(indices, batch_scores, strict=False):  # that of a filler is dropped
                        scores[index] = score
                    if self.stop_now():
                        raise Interrupted
            finally:
                step_module.objective = training_objective
                step_module.added_losses = added_losses
        return scores
