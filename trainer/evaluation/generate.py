"""Generates answers to prompts, and computes likelihoods of given texts, on all ranks and under every strategy.

Rows are sorted by length and split over the ranks in batches. Sharded weights are gathered once for all batches if they fit
(`full_weights.py`). If they do not, every forward pass is a collective: all ranks take the same number of batches, and a rank
whose answers are finished keeps calling until all are (transformers' `synced_gpus`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from strategies.errors import DataError, Interrupted
from strategies.runtime import Runtime, derived_seed, gather_objects
from trainer.data.batches.collate import to_device
from trainer.evaluation.base import DecodingConfig
from trainer.evaluation.decoding import GenerateAnswers, ending_ids, generation_settings
from trainer.evaluation.full_weights import GatherDecision, cache_bytes, decide_gathering
from trainer.evaluation.likelihood import Likelihood, Pair, ScoreContinuations, mask_of, padded, pair_rows
from trainer.model.architecture import text_settings
from trainer.objectives.causal import STOCK_PATH, plain_model

if TYPE_CHECKING:
    from strategies.base import Engine

__all__ = ["AnswerGenerator", "DecodingConfig", "GeneratedAnswer", "GenerationSpeed", "Likelihood", "cut_answer"]


@dataclass(frozen=True, slots=True)
class GeneratedAnswer:
    """One answer of the model."""

    prompt_index: int
    """Number of its prompt in the sequence that was given."""
    text: str
    """Without special tokens, and without the stop string that ended it."""
    ids: list[int]
    """New tokens, up to the one that ended it."""
    has_ended: bool
    """Whether it ended at an end token or a stop string, and not because it reached the longest length."""
    sample_index: int = 0
    """Number of the draw, if a prompt is answered several times."""
    logprobs: np.ndarray | None = None
    """float32 [len(ids)]: log-probability of each token where it was drawn, after the temperature; None unless asked for."""


@dataclass(frozen=True, slots=True)
class GenerationSpeed:
    """How fast answers were written."""

    tokens: int
    """New tokens, all ranks together."""
    seconds: float
    """Wall time of the slowest rank, including the gathering of weights and the reading of prompts."""
    gathering: GatherDecision

    @property
    def tokens_per_s(self) -> float:
        """New tokens a second, all ranks together."""
        return self.tokens / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        speed = f"{self.tokens} tokens written in {self.seconds:.1f} s, {self.tokens_per_s:.1f} a second"
        return f"{speed}; {self.gathering.description}"


class AnswerGenerator:
    """Writes answers and computes likelihoods with the model of an engine."""

    throughput: GenerationSpeed | None = None
    """The speed of the last call of `answers`."""

    def __init__(
        self,
        tokenizer: Any,
        generation_config: Any,
        runtime: Runtime,
        *,
        batch: int = 8,
        stop_now: Callable[[], bool] = lambda: False,
    ) -> None:
        self.tokenizer = tokenizer
        self.generation_config = generation_config
        self.runtime = runtime
        self.batch = batch
        """Most rows of one batch, per rank. It changes the answers only by rounding."""
        self._stop_now = stop_now
        self.on_batch: Callable[[int, int], None] = lambda done, batches: None
        """Called after each batch with the number of finished batches of this rank, and of all its batches."""

    def generate_answers(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        settings: DecodingConfig,
        *,
        seeds: Sequence[Sequence[int]] | None = None,
        averaged: bool = True,
        keep_logprobs: bool = False,
    ) -> list[GeneratedAnswer]:
        """What the model writes to each prompt, in their order and draw by draw, the same list on every rank.

        All ranks must call with the same prompts (token ids; for an encoder, if the model has one). An answer ends at the
        model's last position at the latest. `seeds`: a seed for each draw of each prompt; None: by `settings.seed` and the
        numbers of prompt and draw. `averaged`: see `Engine.inference`. `keep_logprobs`: keep those of the drawn tokens.

        Raises, on all ranks or none, DataError for a prompt without tokens or one that the model has no positions for, and
        Interrupted if the run is asked to stop.
        """
        # A row is one draw to one prompt.
        began = time.perf_counter()
        model = model_of(engine)
        config = generation_settings(self.generation_config, settings, self.tokenizer)
        # A decoder continues the row that holds the prompt, so prompts are padded on the left and take positions.
        is_decoder_only = not model.config.is_encoder_decoder
        answer_limits = max_answer_tokens(model.config, prompts, settings.max_new_tokens)
        check_rows("prompt", prompts, position_limit(model.config) if is_decoder_only else None)
        rows = [(prompt, draw) for prompt in range(len(prompts)) for draw in range(settings.draws)]
        limits = [answer_limits[prompt] for prompt, _ in rows]
        lengths = []
        for (prompt, _), limit in zip(rows, limits, strict=True):
            lengths.append(len(prompts[prompt]) + (limit if is_decoder_only else 0))

        # Divide the rows into batches, in each of which all answers have the same longest length.
        batches = self._own_batches(engine, lengths, settings.batch_tokens, limits)
        gathering = self._decide_gathering(engine, model, batches, lengths, settings.beams)
        objective = GenerateAnswers(
            config, settings, self.tokenizer, synced=gathering.in_step, keep_logprobs=keep_logprobs
        )

        def seed_of(prompt: int, draw: int) -> int:
            return derived_seed(settings.seed, "draw", prompt, draw) if seeds is None else seeds[prompt][draw]

        def make_batch(row_numbers: list[int]) -> dict[str, Any]:
            """The prompts of these rows, their seeds, and the most new tokens of an answer (`room`)."""
            batch_prompts = [prompts[rows[row][0]] for row in row_numbers]
            return {
                "input_ids": padded(batch_prompts, self.tokenizer.pad_token_id, left=is_decoder_only),
                "attention_mask": mask_of(batch_prompts, left=is_decoder_only),
                "seeds": [seed_of(*rows[row]) for row in row_numbers],
                "room": limits[row_numbers[0]],  # the same in all rows of a batch
            }

        # Write this rank's answers, then exchange them.
        own_answers: dict[int, GeneratedAnswer] = {}  # by number of the row
        end_ids = ending_ids(config)
        for row_numbers, terms in self.run_batches(
            engine, batches, objective, make_batch, gathering=gathering, averaged=averaged
        ):
            logprobs = terms["logprobs"].cpu().numpy() if keep_logprobs else None
            for index, (row, ids) in enumerate(zip(row_numbers, terms["answers"].tolist(), strict=True)):
                answer = cut_answer(*rows[row], ids, settings.stop, end_ids, self.tokenizer)
                if logprobs is not None:
                    answer = replace(answer, logprobs=logprobs[index, : len(answer.ids)].copy())
                own_answers[row] = answer
        answers: list[GeneratedAnswer] = self.gather_by_number(own_answers)
        seconds = max(gather_objects(time.perf_counter() - began, self.runtime))
        self.throughput = GenerationSpeed(sum(len(answer.ids) for answer in answers), seconds, gathering)
        return answers

    def _decide_gathering(
        self, engine: Engine, model: Any, batches: list[list[int]], lengths: Sequence[int], beams: int
    ) -> GatherDecision:
        """Whether the weights fit beside the keys of the largest batch. All ranks must call."""
        most_tokens = max((len(rows) * lengths[rows[0]] for rows in batches if rows), default=0) * beams
        itemsize = min(p.element_size() for p in model.parameters() if p.is_floating_point())
        return decide_gathering(engine, self.runtime, cache_bytes(model.config, most_tokens, 1, itemsize))

    def likelihoods(self, engine: Engine, pairs: Sequence[Pair]) -> list[Likelihood]:
        """How likely each continuation is after its context, in their order, the same list on every rank.

        All ranks must call with the same pairs of token ids; an encoder reads the context, if the model has one. Raises, on
        all ranks or none, DataError for a context without tokens or a pair that the model has no positions for, and
        Interrupted if the run is asked to stop.
        """
        # Refuse pairs that the model cannot read.
        model = model_of(engine)
        decoder_start = self.generation_config.decoder_start_token_id if model.config.is_encoder_decoder else None
        limit = position_limit(model.config)
        check_rows("context", [context for context, _ in pairs], None)
        if decoder_start is None:
            # The last token of a continuation is only a target: it takes no position.
            inputs = [[*context, *continuation[:-1]] for context, continuation in pairs]
            check_rows("pair", inputs, None if limit is None else limit + 1)

        def make_batch(numbers: list[int]) -> dict[str, Any]:
            """The tensors of the pairs of these numbers."""
            batch_pairs = [pairs[number] for number in numbers]
            return pair_rows(batch_pairs, pad_token_id=self.tokenizer.pad_token_id, decoder_start=decoder_start)

        lengths = [len(context) + len(continuation) for context, continuation in pairs]
        batches = self._own_batches(engine, lengths, None)
        gathering = decide_gathering(engine, self.runtime, 0)
        own_likelihoods: dict[int, Likelihood] = {}
        for numbers, terms in self.run_batches(engine, batches, ScoreContinuations(), make_batch, gathering=gathering):
            logprobs = terms["logprobs"].tolist()
            misses = terms["misses"].tolist()
            for number, logprob, missed in zip(numbers, logprobs, misses, strict=True):
                tokens = len(pairs[number][1])
                # `missed`: tokens that were not the model's likeliest.
                own_likelihoods[number] = Likelihood(logprob, tokens, greedy=missed == 0)
        return self.gather_by_number(own_likelihoods)

    def _own_batches(
        self, engine: Engine, lengths: Sequence[int], budget: int | None, kinds: Sequence[int] | None = None
    ) -> list[list[int]]:
        """This rank's batches of row numbers; see `sharded_batches`."""
        size = self.batch
        forward_path = getattr(model_of(engine), "forward_path", STOCK_PATH)
        if forward_path.alone:  # the model computes right for one row at a time only
            size = 1
            budget = None
        return [*sharded_batches(lengths, engine.rank, engine.world_size, size=size, budget=budget, kinds=kinds)]

    def run_batches(
        self,
        engine: Engine,
        batches: list[list[int]],
        objective: Any,
        make_batch: Callable[[list[int]], dict[str, Any]],
        *,
        gathering: GatherDecision,
        averaged: bool = True,
    ) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Run forward passes over batches of rows: yields (row numbers, what `objective` returns for them) on this rank.

        `objective` stands in for the training objective, and may generate or score instead of computing a loss. `batches`: this
        rank's row numbers by batch, as many batches on every rank. `make_batch` makes the tensors of some rows. `averaged`: by
        averaged weights, if the run keeps them. All ranks must exhaust it.
        """
        with (
            engine.inference(averaged=averaged) as module,
            engine.full_parameters.gathered() if gathering.gathered_once else nullcontext(),
        ):
            step: Any = module
            # The model is called through the root module's own forward: only there are its parameters gathered.
            training_objective = step.objective
            step.objective = objective
            try:
                for done, rows in enumerate(batches, 1):
                    # If each pass is a collective, a rank without rows takes part with the first row, and keeps nothing of it.
                    if rows or gathering.in_step:
                        terms = step(to_device(make_batch(rows or [0]), self.runtime.device))
                    if rows:
                        yield rows, terms
                    self.on_batch(done, len(batches))
                    if self._stop_now():
                        raise Interrupted
            finally:
                step.objective = training_objective

    def gather_by_number(self, own_results: dict[int, Any]) -> list[Any]:
        """The results of all ranks, in the order of their numbers. All ranks must call."""
        results: dict[int, Any] = {}
        for rank_results in gather_objects(own_results, self.runtime):
            results |= rank_results
        return [results[row] for row in range(len(results))]


def cut_answer(
    prompt: int, draw: int, ids: list[int], stop: Sequence[str], end_ids: frozenset[int], tokenizer: Any
) -> GeneratedAnswer:
    """An answer from new tokens, which may be padded after its end: cut at the first end token or stop string.

    `prompt` and `draw`: the numbers of its prompt and of the answer among those to it. The answer's tokens include the end token,
    or those that complete the stop string; its text ends before the stop string.
    """

    def text_of(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True)

    # The first end token.
    end = next((position + 1 for position, token in enumerate(ids) if token in end_ids), None)
    ids = ids[:end]
    text = text_of(ids)

    # The first stop string.
    stop_positions = [text.index(stop_text) for stop_text in stop if stop_text in text]
    if not stop_positions:
        return GeneratedAnswer(prompt, text, ids, end is not None, draw)
    # Bisect for the fewest tokens whose text has a stop string: once a text has one, longer texts have it too.
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        beginning = text_of(ids[:middle])
        if any(stop_text in beginning for stop_text in stop):
            high = middle
        else:
            low = middle + 1
    return GeneratedAnswer(prompt, text[: min(stop_positions)], ids[:low], True, draw)


def model_of(engine: Engine) -> Any:
    """The Hugging Face model of an engine, sharded as it is."""
    return plain_model(engine.step_module.model)  # type: ignore[arg-type]


def position_limit(config: Any) -> int | None:
    """The number of positions of a model, by its transformers config; None for rotary positions, which have no last one."""
    text = text_settings(config)
    if getattr(text, "rope_parameters", None) is not None:
        return None
    positions = getattr(text, "max_position_embeddings", None)
    if not positions or positions < 0:
        return None
    return int(positions)


def max_answer_tokens(config: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    """How many tokens the answer to each prompt may have: `max_new_tokens`, or what the model's positions leave."""
    limit = position_limit(config)
    if limit is None:
        return [max_new_tokens] * len(prompts)
    tokens = []
    for prompt in prompts:
        prompt_positions = 0 if config.is_encoder_decoder else len(prompt)
        tokens.append(max(1, min(max_new_tokens, limit - prompt_positions)))
    return tokens


def check_rows(what: str, rows: Sequence[Sequence[int]], most: int | None) -> None:
    """Raise DataError for rows without tokens, or with `most` tokens or more (None: any number).

    `what`: what a row is, for the message, such as "prompt".
    """
    for number, row in enumerate(rows):
        if len(row) == 0:
            raise DataError(
                f"{what} {number} of {len(rows)} has no tokens, and a model needs at least one to continue; begin it with the "
                "tokenizer's first token (<s>, <|endoftext|>), or leave it out"
            )
        if most is not None and len(row) >= most:
            raise DataError(
                f"{what} {number} of {len(rows)} has {len(row)} tokens, and the model no position for a further one "
                f"(max_position_embeddings in its config.json); shorten it to {most - 1}, or leave it out"
            )


def sharded_batches(
    lengths: Sequence[int],
    rank: int,
    ranks: int,
    *,
    size: int,
    budget: int | None = None,
    kinds: Sequence[int] | None = None,
) -> Iterator[list[int]]:
    """The batches of row numbers of one rank: the longest rows first, similar lengths on all ranks, `size` rows each.

    `budget`: take as many rows as have that many tokens together, at least one. `kinds`: a number for each row; a batch has rows
    of one kind. Every rank has the same number of batches, and some of them may be empty.
    """
    kind_of_row = kinds or [0] * len(lengths)
    ordered = sorted(range(len(lengths)), key=lambda row: (kind_of_row[row], -lengths[row], row))
    begin = 0
    while begin < len(ordered):
        longest = ordered[begin]
        if budget is not None:
            size = max(1, budget // lengths[longest])
        candidates = ordered[begin : begin + size * ranks]
        rows = [row for row in candidates if kind_of_row[row] == kind_of_row[longest]]
        yield rows[rank::ranks]
        begin += len(rows)
