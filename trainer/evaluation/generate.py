"""Generates answers to prompts, and computes likelihoods of given texts, on all ranks and under every strategy.

Rows are sorted by length and split over the ranks in batches. Sharded weights are gathered once for all batches if they fit
(`full_weights.py`). If they do not, every forward pass is a collective: all ranks take the same number of batches, and a rank
whose answers are finished keeps calling until all are (transformers' `synced_gpus`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from strategies.base import InferenceWeights
from strategies.errors import DataError, Interrupted
from strategies.runtime import Runtime, derived_seed, gather_objects
from trainer.data.batches.collate import to_device
from trainer.evaluation.base import DecodingConfig
from trainer.evaluation.decoding import GenerateAnswers, end_token_ids, generation_config_for_answers
from trainer.evaluation.full_weights import (
    GatherDecision,
    bytes_per_parameter,
    decide_weight_gathering,
    kv_cache_bytes_upper_bound,
)
from trainer.evaluation.likelihood import (
    ContinuationPair,
    Likelihood,
    ScoreContinuations,
    continuation_batch,
    pad_sequences,
    padding_mask,
)
from trainer.model.architecture import text_model_config
from trainer.objectives.causal import HF_PATH, unwrap_adapter

if TYPE_CHECKING:
    from strategies.base import Engine

__all__ = ["AnswerGenerator", "DecodingConfig", "GeneratedAnswer", "GenerationThroughput", "Likelihood"]


@dataclass(frozen=True, slots=True)
class GeneratedAnswer:
    """One answer of the model: one sample for one prompt."""

    prompt_index: int
    """Index of its prompt among the prompts of the call."""
    text: str
    """The decoded answer, without special tokens and without the stop string that ended it."""
    ids: list[int]
    """The new token ids, up to and with the token that ended the answer."""
    has_ended: bool
    """Whether it ended at an end token or a stop string; False if it reached the largest number of tokens."""
    sample_index: int = 0
    """Which of the prompt's samples it is, if a prompt is answered several times."""
    logprobs: np.ndarray | None = None
    """float32 [len(ids)]: log-probability of each token, after the temperature; None unless asked for."""


@dataclass(frozen=True, slots=True)
class GenerationThroughput:
    """How fast answers were generated."""

    tokens: int
    """New tokens, all ranks together."""
    seconds: float
    """Wall time of the slowest rank, including the time to gather weights and to prefill prompts."""
    gathering: GatherDecision

    @property
    def tokens_per_s(self) -> float:
        """New tokens a second, all ranks together."""
        return self.tokens / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        speed = f"{self.tokens} tokens written in {self.seconds:.1f} s, {self.tokens_per_s:.1f} a second"
        return f"{speed}; {self.gathering.description}"


class AnswerGenerator:
    """Generates answers and computes likelihoods with the model of an engine."""

    throughput: GenerationThroughput | None = None
    """The speed of the last call of `generate_answers`."""

    def __init__(
        self,
        tokenizer: Any,
        generation_config: Any,
        runtime: Runtime,
        *,
        batch: int = 8,
        stop_now: Callable[[], bool] = lambda: False,
    ) -> None:
        """`generation_config`: the model's, of transformers; it names end tokens, for example. `batch`: most rows of a batch
        on this rank. `stop_now`: whether the run must stop, the same on all ranks.
        """
        self.tokenizer = tokenizer
        self.generation_config = generation_config
        self.runtime = runtime
        self.batch = batch
        """Most rows of one batch, per rank. It changes the answers only by rounding."""
        self._stop_now = stop_now
        self.on_batch: Callable[[int, int], None] = lambda num_finished, num_batches: None
        """Called after each batch with (batches that this rank has finished, all batches of this rank)."""

    def generate_answers(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        decoding: DecodingConfig,
        *,
        seeds: Sequence[Sequence[int]] | None = None,
        averaged: bool = True,
        keep_logprobs: bool = False,
    ) -> list[GeneratedAnswer]:
        """Let the model answer prompts: `decoding.draws` answers to each, prompt by prompt, the same list on every rank.

        `prompts`: token ids; an encoder reads them, if the model has one. `decoding`: how answers are generated. `seeds`:
        seeds[prompt][sample]; None: derived from `decoding.seed` and both indices. `averaged`: whether the averaged weights
        generate, if the run keeps some. `keep_logprobs`: whether answers have `logprobs`. An answer is shorter than
        `decoding.max_new_tokens` if the model has too few positions.

        All ranks must call with the same prompts. Also sets `throughput`. Raises, on all ranks or none, DataError for a prompt
        without tokens or one that leaves no position for an answer, and Interrupted if the run is asked to stop.
        """
        began = time.perf_counter()
        model = transformers_model_of(engine)
        config = generation_config_for_answers(self.generation_config, decoding, self.tokenizer)
        # A decoder continues the row that has the prompt, so prompts are padded on the left, and take positions from the answer.
        is_decoder_only = not model.config.is_encoder_decoder
        check_sequences_fit_positions("prompt", prompts, max_positions(model.config) if is_decoder_only else None)

        # A row of a batch is one sample of one prompt.
        answer_limits = max_answer_tokens(model.config, prompts, decoding.max_new_tokens)  # by prompt
        rows = []
        row_limits = []
        row_lengths = []
        for prompt_index, prompt in enumerate(prompts):
            for sample_index in range(decoding.draws):
                rows.append(_SampleRow(prompt_index, sample_index))
                row_limits.append(answer_limits[prompt_index])
                row_lengths.append(len(prompt) + (answer_limits[prompt_index] if is_decoder_only else 0))
        # All answers of a batch have the same limit, so rows are grouped by it.
        batches = self._own_batches_of_rows(engine, row_lengths, decoding.batch_tokens, row_limits)
        gathering = self._decide_weight_gathering(engine, model, batches, row_lengths, decoding.beams)

        def seed_of(row: _SampleRow) -> int:
            """The seed of one sample, which decides its random numbers whatever rank and batch it is in."""
            if seeds is not None:
                return seeds[row.prompt_index][row.sample_index]
            return derived_seed(decoding.seed, "draw", row.prompt_index, row.sample_index)

        def make_batch(row_numbers: list[int]) -> dict[str, Any]:
            """What `GenerateAnswers.terms` reads for these rows: padded prompts, seeds, and the most new tokens."""
            batch_prompts = [prompts[rows[number].prompt_index] for number in row_numbers]
            return {
                "input_ids": pad_sequences(batch_prompts, self.tokenizer.pad_token_id, left=is_decoder_only),
                "attention_mask": padding_mask(batch_prompts, left=is_decoder_only),
                "seeds": [seed_of(rows[number]) for number in row_numbers],
                "max_new_tokens": row_limits[row_numbers[0]],
            }

        # Generate this rank's answers, then gather those of all ranks.
        own_answers: dict[int, GeneratedAnswer] = {}  # by row number
        end_ids = end_token_ids(config)
        objective = GenerateAnswers(
            config, decoding, self.tokenizer, synced_gpus=gathering.forward_is_collective, keep_logprobs=keep_logprobs
        )
        for row_numbers, terms in self.run_batches(
            engine, batches, objective, make_batch, gathering=gathering, averaged=averaged
        ):
            logprobs = terms["logprobs"].cpu().numpy() if keep_logprobs else None
            for index, (number, ids) in enumerate(zip(row_numbers, terms["answers"].tolist(), strict=True)):
                answer = answer_from_tokens(*rows[number], ids, decoding.stop, end_ids, self.tokenizer)
                if logprobs is not None:
                    answer = replace(answer, logprobs=logprobs[index, : len(answer.ids)].copy())
                own_answers[number] = answer
        answers: list[GeneratedAnswer] = self.gather_in_order(own_answers)
        seconds = max(gather_objects(time.perf_counter() - began, self.runtime))
        self.throughput = GenerationThroughput(sum(len(answer.ids) for answer in answers), seconds, gathering)
        return answers

    def _decide_weight_gathering(
        self,
        engine: Engine,
        model: Any,
        row_numbers_by_batch: list[list[int]],
        row_lengths: Sequence[int],
        num_beams: int,
    ) -> GatherDecision:
        """Decide by memory whether sharded weights are gathered once for all these batches. All ranks must call.

        `row_numbers_by_batch`: the batches of this rank, the longest row of each first. `row_lengths`: tokens of each row,
        prompt and answer together. `num_beams`: of beam search; 1 without it.
        """
        # The rows of a batch are padded to its longest one, and beam search caches each row once for each beam.
        tokens_of_batches = [len(numbers) * row_lengths[numbers[0]] for numbers in row_numbers_by_batch if numbers]
        most_cached_tokens = max(tokens_of_batches, default=0) * num_beams
        kv_cache_bytes = kv_cache_bytes_upper_bound(
            model.config, rows=1, tokens=most_cached_tokens, bytes_per_number=bytes_per_parameter(model)
        )
        return decide_weight_gathering(engine, self.runtime, kv_cache_bytes)

    def likelihoods(self, engine: Engine, pairs: Sequence[ContinuationPair]) -> list[Likelihood]:
        """How likely each continuation is after its context, in the order of the pairs, the same list on every rank.

        All ranks must call with the same pairs of token ids; an encoder reads the context, if the model has one. Raises, on
        all ranks or none, DataError for a context without tokens or a pair that the model has too few positions for, and
        Interrupted if the run is asked to stop.
        """
        model = transformers_model_of(engine)
        # The decoder's first token; None for a model without an encoder.
        decoder_start = self.generation_config.decoder_start_token_id if model.config.is_encoder_decoder else None
        _check_pairs_fit_positions(pairs, model.config, is_decoder_only=decoder_start is None)

        def make_batch(pair_numbers: list[int]) -> dict[str, Any]:
            batch_pairs = [pairs[number] for number in pair_numbers]
            return continuation_batch(
                batch_pairs, pad_token_id=self.tokenizer.pad_token_id, decoder_start=decoder_start
            )

        lengths = [len(context) + len(continuation) for context, continuation in pairs]
        # Lists of pair numbers.
        batches = self._own_batches_of_rows(engine, lengths, max_tokens=None)
        gathering = decide_weight_gathering(engine, self.runtime, kv_cache_bytes=0)  # scoring needs no KV cache
        own_likelihoods: dict[int, Likelihood] = {}  # by pair number
        for pair_numbers, terms in self.run_batches(
            engine, batches, ScoreContinuations(), make_batch, gathering=gathering
        ):
            # Of each pair: its log-probability, and how many tokens of its continuation are not the model's likeliest.
            logprobs = terms["logprobs"].tolist()
            not_greedy_counts = terms["num_not_greedy"].tolist()
            for number, logprob, num_not_greedy in zip(pair_numbers, logprobs, not_greedy_counts, strict=True):
                _, continuation = pairs[number]
                own_likelihoods[number] = Likelihood(logprob, num_tokens=len(continuation), greedy=num_not_greedy == 0)
        return self.gather_in_order(own_likelihoods)

    def _own_batches_of_rows(
        self,
        engine: Engine,
        row_lengths: Sequence[int],
        max_tokens: int | None,
        group_of_row: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Split rows into batches of similar length, and return those of this rank, as row numbers (see `batches_of_rank`).

        A batch is one row if the model computes correctly only for one row at a time. `max_tokens`: a batch has as many rows
        as fit into that many tokens; None: `self.batch` rows. `group_of_row`: rows of different groups are never in one batch.
        """
        max_rows = self.batch
        forward_path = getattr(transformers_model_of(engine), "forward_path", HF_PATH)
        needs_single_rows = forward_path.alone  # the model computes correctly only for one row at a time
        if needs_single_rows:
            max_rows = 1
            max_tokens = None
        batches = batches_of_rank(
            row_lengths,
            engine.rank,
            engine.world_size,
            max_rows=max_rows,
            max_tokens=max_tokens,
            group_of_row=group_of_row,
        )
        return list(batches)

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
        """Run the model on this rank's batches: yields (row numbers, what `objective` returns for these rows).

        `objective` takes the place of the training objective: it generates or scores instead of computing a loss. `batches`:
        row numbers of each batch, as many batches on every rank, some of them empty. `make_batch`: builds the tensors of some
        rows. `gathering`: whether sharded weights are gathered once. `averaged`: use the averaged weights, if the run keeps
        them.

        All ranks must exhaust the generator. Raises Interrupted, on all ranks or none, if the run is asked to stop: the ranks
        agree on it after each batch (`stop_now` is a collective).
        """
        with (
            engine.inference(InferenceWeights.averaged if averaged else InferenceWeights.trained) as module,
            engine.full_parameters.gathered() if gathering.gathered_once else nullcontext(),
        ):
            step_module: Any = module
            with replaced_objective(step_module, objective):
                for num_finished, row_numbers in enumerate(batches, 1):
                    # If a forward pass is a collective, a rank without rows runs it on row 0 and drops the result.
                    if row_numbers or gathering.forward_is_collective:
                        terms = step_module(to_device(make_batch(row_numbers or [0]), self.runtime.device))
                    if row_numbers:
                        yield row_numbers, terms
                    self.on_batch(num_finished, len(batches))
                    if self._stop_now():
                        raise Interrupted

    def gather_in_order(self, own_results: dict[int, Any]) -> list[Any]:
        """Bring the results of all ranks together, sorted by their row numbers, on every rank. All ranks must call.

        `own_results`: this rank's results by row number. Rank 0 has {0: "a", 2: "c"}, rank 1 {1: "b"} -> ["a", "b", "c"].
        """
        result_by_row: dict[int, Any] = {}
        for rank_results in gather_objects(own_results, self.runtime):
            result_by_row |= rank_results
        return [result_by_row[row] for row in range(len(result_by_row))]


@contextmanager
def replaced_objective(step_module: Any, objective: Any) -> Iterator[None]:
    """Inside the context the step module calls `objective.terms` in place of its own objective's, to generate or score.

    A step module is the model together with its objective. The model is called through the root module's own forward, because
    only there its sharded parameters are gathered.
    """
    training_objective = step_module.objective
    step_module.objective = objective
    try:
        yield
    finally:
        step_module.objective = training_objective


class _SampleRow(NamedTuple):
    """A row of a batch that generates: one sample of one prompt."""

    prompt_index: int
    sample_index: int


def answer_from_tokens(
    prompt_index: int,
    sample_index: int,
    ids: list[int],
    stop_strings: Sequence[str],
    end_ids: frozenset[int],
    tokenizer: Any,
) -> GeneratedAnswer:
    """Turn the new token ids of one row into an answer, cut at the first end token or stop string.

    It is sample number `sample_index` of prompt number `prompt_index`, both from 0. `ids` may have padding after the end. The
    answer's `ids` include the end token, or the tokens that complete the stop string; its text ends before the stop string.
    `end_ids`: the tokens that end an answer.
    """
    num_tokens = next((position + 1 for position, token in enumerate(ids) if token in end_ids), None)
    ids = ids[:num_tokens]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    stop_positions = [text.index(stop) for stop in stop_strings if stop in text]
    if not stop_positions:
        return GeneratedAnswer(
            prompt_index=prompt_index, text=text, ids=ids, has_ended=num_tokens is not None, sample_index=sample_index
        )
    ids = ids[: _num_tokens_until_stop(ids, stop_strings, tokenizer)]
    return GeneratedAnswer(
        prompt_index=prompt_index, text=text[: min(stop_positions)], ids=ids, has_ended=True, sample_index=sample_index
    )


def _num_tokens_until_stop(ids: list[int], stop_strings: Sequence[str], tokenizer: Any) -> int:
    """How many tokens an answer has up to the one that completes a stop string; `ids` as a whole must contain one.

    Found by bisection: once a text has a stop string, longer texts have it too.
    """
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        beginning = tokenizer.decode(ids[:middle], skip_special_tokens=True)
        if any(stop in beginning for stop in stop_strings):
            high = middle
        else:
            low = middle + 1
    return low


def _check_pairs_fit_positions(pairs: Sequence[ContinuationPair], config: Any, *, is_decoder_only: bool) -> None:
    """Refuse a pair without tokens in its context, or one that is too long for the model. Raises DataError.

    `config`: the transformers config of the model. An encoder-decoder model reads the context with its encoder, without a
    limit.
    """
    check_sequences_fit_positions("context", [context for context, _ in pairs], positions=None)
    if is_decoder_only:
        # The last token of a continuation is only predicted, never read: it takes no position.
        inputs = [[*context, *continuation[:-1]] for context, continuation in pairs]
        positions = max_positions(config)
        # One more, because the check keeps a position free for a further token, and nothing follows these inputs.
        check_sequences_fit_positions("pair", inputs, positions=None if positions is None else positions + 1)


def transformers_model_of(engine: Engine) -> Any:
    """The Hugging Face model of an engine; its parameters stay sharded."""
    return unwrap_adapter(engine.step_module.model)  # type: ignore[arg-type]


def max_positions(config: Any) -> int | None:
    """The most tokens that a model can read, by its transformers config; None if there is no limit, as with rotary positions."""
    text_config = text_model_config(config)
    if getattr(text_config, "rope_parameters", None) is not None:
        return None
    positions = getattr(text_config, "max_position_embeddings", None)
    if not positions or positions < 0:
        return None
    return int(positions)


def max_answer_tokens(config: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    """How many tokens the answer to each prompt may have, so that prompt and answer fit the model's positions; at least 1.

    `max_new_tokens`, or fewer: with 512 positions and 64 new tokens, a prompt of 500 tokens leaves 12. `config`: the model's
    transformers config.
    """
    positions = max_positions(config)
    if positions is None:
        return [max_new_tokens] * len(prompts)
    limits = []
    for prompt in prompts:
        prompt_positions = 0 if config.is_encoder_decoder else len(prompt)  # the encoder has positions of its own
        limits.append(max(1, min(max_new_tokens, positions - prompt_positions)))
    return limits


def check_sequences_fit_positions(noun: str, sequences: Sequence[Sequence[int]], positions: int | None) -> None:
    """Refuse a sequence without tokens, or one that leaves no position for a further token. Raises DataError.

    `noun`: what a sequence is called in the message, such as "prompt". `positions`: the model's; None is no limit.
    """
    for number, sequence in enumerate(sequences):
        if len(sequence) == 0:
            raise DataError(
                f"{noun} {number} of {len(sequences)} has no tokens, and a model needs at least one to continue; begin it with "
                "the tokenizer's first token (<s>, <|endoftext|>), or leave it out"
            )
        if positions is not None and len(sequence) >= positions:
            raise DataError(
                f"{noun} {number} of {len(sequences)} has {len(sequence)} tokens, and the model no position for a further one "
                f"(max_position_embeddings in its config.json); shorten it to {positions - 1}, or leave it out"
            )


def batches_of_rank(
    row_lengths: Sequence[int],
    rank: int,
    world_size: int,
    *,
    max_rows: int,
    max_tokens: int | None = None,
    group_of_row: Sequence[int] | None = None,
) -> Iterator[list[int]]:
    """Split rows over all ranks into batches of similar length; yields those of one rank, as lists of row numbers.

    The longest rows come first. Every rank has the same number of batches, and some of them may be empty. `row_lengths`:
    tokens of each row. `max_rows`: rows of a batch. `max_tokens`: if set, a batch has instead as many rows of its longest
    length as fit into that many tokens, at least one. `group_of_row`: if set, all rows of a batch are of the same group.

    Lengths [5, 9, 7, 3], 2 ranks, batches of 1 row: rank 0 has [[1], [0]], rank 1 has [[2], [3]].
    """
    groups = group_of_row or [0] * len(row_lengths)
    ordered_rows = sorted(range(len(row_lengths)), key=lambda row: (groups[row], -row_lengths[row], row))
    begin = 0
    while begin < len(ordered_rows):
        longest_row = ordered_rows[begin]
        rows_per_batch = max_rows
        if max_tokens is not None:
            rows_per_batch = max(1, max_tokens // row_lengths[longest_row])
        # One batch for each rank.
        candidates = ordered_rows[begin : begin + rows_per_batch * world_size]
        rows_of_all_ranks = [row for row in candidates if groups[row] == groups[longest_row]]
        yield rows_of_all_ranks[rank::world_size]
        begin += len(rows_of_all_ranks)
