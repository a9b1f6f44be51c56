"""Generates answers to prompts, and computes likelihoods of given texts, on all ranks and under every strategy.

Rows are sorted by length and dealt to the ranks in batches. Sharded weights are gathered once for all batches if they
fit (`full_weights.py`). If they do not, every forward pass is a collective: all ranks take the same number of
batches, and a rank whose answers are finished keeps calling until all are (transformers' `synced_gpus`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from strategies.errors import DataError, Interrupted
from strategies.runtime import Runtime, derive_seed, gather_objects
from trainer.data.batches.collate import to_device
from trainer.evaluation.base import WritingConfig
from trainer.evaluation.decoding import GenerateAnswers, ending_ids, generation_settings
from trainer.evaluation.full_weights import GatherDecision, cache_bytes, decide_gathering
from trainer.evaluation.likelihood import Likelihood, Pair, ScoreContinuations, mask_of, padded, pair_rows
from trainer.model.architecture import text_settings
from trainer.objectives.causal import STOCK_PATH, plain_model

if TYPE_CHECKING:
    from strategies.base import Engine

__all__ = ["GenerationThroughput", "Likelihood", "Writer", "WritingConfig", "WrittenAnswer", "cut_answer"]


@dataclass(frozen=True, slots=True)
class WrittenAnswer:
    """One answer."""

    prompt: int
    """Number of its prompt in the sequence that was given."""
    text: str
    """Without special tokens, and without the stop string that ended it."""
    ids: list[int]
    """New tokens, up to the one that ended it."""
    ended: bool
    """Whether it ended by itself (at an end token or a stop string) rather than at the longest length."""
    draw: int = 0
    """Which of the prompt's draws it is."""


@dataclass(frozen=True, slots=True)
class GenerationThroughput:
    """How the last answers were written."""

    tokens: int
    """New tokens, all ranks together."""
    seconds: float
    """Wall time of the slowest rank, weights gathered and prompts read."""
    gathering: GatherDecision

    @property
    def tokens_per_s(self) -> float:
        """New tokens a second, all ranks together."""
        return self.tokens / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        speed = f"{self.tokens} tokens written in {self.seconds:.1f} s, {self.tokens_per_s:.1f} a second"
        return f"{speed}; {self.gathering.description}"


class Writer:
    """Answers and likelihoods by the model of an engine."""

    throughput: GenerationThroughput | None = None
    """Of the last call of `answers`."""

    def __init__(
        self,
        tokenizer: Any,
        generation_config: Any,
        runtime: Runtime,
        *,
        batch: int = 8,
        stop_now: Callable[[], bool] = lambda: False,
    ) -> None:
        self.tokenizer, self.generation_config, self.runtime = tokenizer, generation_config, runtime
        self.batch = batch
        """Most rows of one batch, per rank; does not change what is written but by rounding."""
        self._stop_now = stop_now
        self.on_batch: Callable[[int, int], None] = lambda done, turns: None
        """Hears after each batch how many of this rank's are done, and of how many."""

    def answers(self, engine: Engine, prompts: Sequence[Sequence[int]], settings: WritingConfig) -> list[WrittenAnswer]:
        """What the model writes to each prompt, in their order and draw by draw, the same list on every rank.

        All ranks must call with the same prompts (token ids, for an encoder where the model has one). An answer ends at the
        model's last position at the latest. Raises, on all ranks or none, DataError for a prompt without tokens or one that
        the model has no positions for, and Interrupted where the run is asked to stop.
        """
        began = time.perf_counter()
        model, config = model_of(engine), generation_settings(self.generation_config, settings, self.tokenizer)
        left, room = (
            not model.config.is_encoder_decoder,
            max_answer_tokens(model.config, prompts, settings.max_new_tokens),
        )
        _check_rows("prompt", prompts, position_limit(model.config) if left else None)
        rows = [(number, draw) for number in range(len(prompts)) for draw in range(settings.draws)]
        lengths = [len(prompts[number]) + (room[number] if left else 0) for number, _ in rows]
        turns = self._own_batches(engine, lengths, settings.batch_tokens, [room[number] for number, _ in rows])
        widest = max((len(turn) * lengths[turn[0]] for turn in turns if turn), default=0) * settings.beams
        itemsize = min(p.element_size() for p in model.parameters() if p.is_floating_point())
        gathered = decide_gathering(engine, self.runtime, cache_bytes(model.config, widest, 1, itemsize))
        generate = GenerateAnswers(config, settings, self.tokenizer, synced=not gathered.gathered_once)

        def batch_of(turn: list[int]) -> dict[str, Any]:
            some = [prompts[rows[row][0]] for row in turn]
            return {
                "input_ids": padded(some, self.tokenizer.pad_token_id, left=left),
                "attention_mask": mask_of(some, left=left),
                "seeds": [derive_seed(settings.seed, "draw", *rows[row]) for row in turn],
                "room": room[rows[turn[0]][0]],
            }

        found: dict[int, WrittenAnswer] = {}
        for turn, terms in self._run_batches(engine, turns, generate, batch_of, whole=gathered.gathered_once):
            for row, ids in zip(turn, terms["answers"].tolist(), strict=True):
                number, draw = rows[row]
                found[row] = cut_answer(number, draw, ids, settings.stop, ending_ids(config), self.tokenizer)
        answers: list[WrittenAnswer] = self._gather_by_number(found)
        seconds = max(gather_objects(time.perf_counter() - began, self.runtime))
        self.throughput = GenerationThroughput(sum(len(one.ids) for one in answers), seconds, gathered)
        return answers

    def likelihoods(self, engine: Engine, pairs: Sequence[Pair]) -> list[Likelihood]:
        """How likely each continuation is after its context, in their order, the same list on every rank.

        All ranks must call with the same pairs of token ids; an encoder reads the context where the model has one. Raises, on
        all ranks or none, DataError for a context without tokens or a pair that the model has no positions for, and
        Interrupted where the run is asked to stop.
        """
        model = model_of(engine)
        start = self.generation_config.decoder_start_token_id if model.config.is_encoder_decoder else None
        most = position_limit(model.config)
        _check_rows("context", [context for context, _ in pairs], None)
        if start is None:
            _check_rows("pair", [[*context, *more[:-1]] for context, more in pairs], None if most is None else most + 1)

        def batch_of(turn: list[int]) -> dict[str, Any]:
            some = [pairs[number] for number in turn]
            return pair_rows(some, pad_token_id=self.tokenizer.pad_token_id, decoder_start=start)

        found: dict[int, Likelihood] = {}
        turns = self._own_batches(engine, [len(context) + len(continuation) for context, continuation in pairs], None)
        whole = decide_gathering(engine, self.runtime, 0).gathered_once
        for turn, terms in self._run_batches(engine, turns, ScoreContinuations(), batch_of, whole=whole):
            scores = zip(turn, terms["logprobs"].tolist(), terms["misses"].tolist(), strict=True)
            found |= {n: Likelihood(logprob, len(pairs[n][1]), misses == 0) for n, logprob, misses in scores}
        return self._gather_by_number(found)

    def _own_batches(
        self, engine: Engine, lengths: Sequence[int], budget: int | None, kinds: Sequence[int] | None = None
    ) -> list[list[int]]:
        alone = getattr(model_of(engine), "forward_path", STOCK_PATH).alone  # right for one row at a time
        size, most = (1, None) if alone else (self.batch, budget)
        return [*sharded_batches(lengths, engine.dp_rank, engine.dp_size, size=size, budget=most, kinds=kinds)]

    def _run_batches(
        self,
        engine: Engine,
        turns: list[list[int]],
        objective: Any,
        batch_of: Callable[[list[int]], dict[str, Any]],
        *,
        whole: bool,
    ) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """This rank's rows of each turn, and what `objective` says of them. All ranks must exhaust it."""
        with engine.inference() as module, engine.full_parameters.gathered() if whole else nullcontext():
            step: Any = module
            # Asked through the root module's own forward: only there are its parameters gathered.
            before, step.objective = step.objective, objective
            try:
                for done, turn in enumerate(turns, 1):
                    if (
                        turn or not whole
                    ):  # a rank that has run out takes part with the first row, and keeps nothing of it
                        terms = step(to_device(batch_of(turn or [0]), self.runtime.device))
                    if turn:
                        yield turn, terms
                    self.on_batch(done, len(turns))
                    if self._stop_now():
                        raise Interrupted
            finally:
                step.objective = before

    def _gather_by_number(self, found: dict[int, Any]) -> list[Any]:
        """Every rank's rows, by their number. All ranks must call."""
        everyone: dict[int, Any] = {}
        for part in gather_objects(found, self.runtime):
            everyone |= part
        return [everyone[row] for row in range(len(everyone))]


def cut_answer(
    prompt: int, draw: int, ids: list[int], stop: Sequence[str], ends: frozenset[int], tokenizer: Any
) -> WrittenAnswer:
    """An answer out of new tokens, which may be filled up after its end: at the first end token or stop string."""

    def text_of(some: list[int]) -> str:
        return tokenizer.decode(some, skip_special_tokens=True)

    end = next((place + 1 for place, token in enumerate(ids) if token in ends), None)
    ids = ids[:end]
    text = text_of(ids)
    stops = [text.index(one) for one in stop if one in text]
    if not stops:
        return WrittenAnswer(prompt, text, ids, end is not None, draw)
    low, high = 1, len(ids)  # the fewest tokens whose text has a stop string: one that has it keeps it
    while low < high:
        middle = (low + high) // 2
        has = any(one in text_of(ids[:middle]) for one in stop)
        low, high = (low, middle) if has else (middle + 1, high)
    return WrittenAnswer(prompt, text[: min(stops)], ids[:low], True, draw)


def model_of(engine: Engine) -> Any:
    """The Hugging Face model of an engine, sharded as it is."""
    return plain_model(engine.step_module.model)  # type: ignore[arg-type]


def position_limit(config: Any) -> int | None:
    """How many positions a model has, by its transformers config; None where it reckons them and there is no last one."""
    text = text_settings(config)
    most = getattr(text, "max_position_embeddings", None)
    return None if getattr(text, "rope_parameters", None) is not None or not most or most < 0 else int(most)


def max_answer_tokens(config: Any, prompts: Sequence[Sequence[int]], most: int) -> list[int]:
    """How many tokens each answer may have: `most`, or what the model's positions leave."""
    last = position_limit(config)
    if last is None:
        return [most] * len(prompts)
    return [max(1, min(most, last - (0 if config.is_encoder_decoder else len(prompt)))) for prompt in prompts]


def _check_rows(what: str, rows: Sequence[Sequence[int]], most: int | None) -> None:
    """Raise DataError for rows without tokens, or with `most` or more."""
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
    """Rows of each turn of one rank: the longest first, similar lengths on all ranks in a turn, `size` rows each.

    With a `budget` as many as it has tokens for, one at least; with `kinds`, one for each row, those of one kind in a turn.
    Every rank has the same number of turns; in some it may have none.
    """
    of = kinds or [0] * len(lengths)
    ordered = sorted(range(len(lengths)), key=lambda row: (of[row], -lengths[row], row))
    begin = 0
    while begin < len(ordered):
        first = ordered[begin]
        if budget is not None:
            size = max(1, budget // lengths[first])
        turn = [row for row in ordered[begin : begin + size * ranks] if of[row] == of[first]]
        yield turn[rank::ranks]
        begin += len(turn)
