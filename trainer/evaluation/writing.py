"""What a model writes to prompts, and how likely it holds given texts, all ranks together and under every strategy.

Prompts are sorted by length and dealt to the ranks in turns. Where parameters are sharded every forward pass is a
collective: ranks take the same number of turns, and one whose answers are finished goes on with the others until all are
(transformers' `synced_gpus`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from strategies.errors import DataError
from strategies.runtime import Runtime, derive_seed, gather_objects
from trainer.data.batches.collate import to_device
from trainer.evaluation.base import WritingConfig
from trainer.evaluation.decoding import Generate, decoding, ending_ids
from trainer.evaluation.likelihood import Likelihood, Likelihoods, Pair, mask_of, padded, pair_rows
from trainer.evaluation.loss import Interrupted
from trainer.objectives.causal import PLAIN, plain_model

if TYPE_CHECKING:
    from strategies.base import Engine

__all__ = ["Likelihood", "Writer", "WritingConfig", "Written"]


@dataclass(frozen=True, slots=True)
class Written:
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


class Writer:
    """Answers and likelihoods by the model of an engine."""

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

    def answers(self, engine: Engine, prompts: Sequence[Sequence[int]], settings: WritingConfig) -> list[Written]:
        """What the model writes to each prompt, in their order and draw by draw, the same list on every rank.

        All ranks must call with the same prompts (token ids, for an encoder where the model has one). Raises, on all ranks or
        none, DataError for a prompt without tokens, and Interrupted where the run is asked to stop.
        """
        _check_tokens("prompt", prompts)
        rows = [(number, draw) for number in range(len(prompts)) for draw in range(settings.draws)]
        config = decoding(self.generation_config, settings, self.tokenizer)
        generate = Generate(config, settings, self.tokenizer, synced=engine.dp_size > 1)
        whole: Any = plain_model(engine.step_module.model)  # type: ignore[arg-type]
        left = not whole.config.is_encoder_decoder  # a decoder goes on from the last token

        def batch_of(turn: list[int]) -> dict[str, Any]:
            some = [prompts[rows[row][0]] for row in turn]
            return {
                "input_ids": padded(some, self.tokenizer.pad_token_id, left=left),
                "attention_mask": mask_of(some, left=left),
                "seeds": [derive_seed(settings.seed, "draw", *rows[row]) for row in turn],
            }

        found: dict[int, Written] = {}
        lengths = [len(prompts[number]) for number, _ in rows]
        ends = ending_ids(config)
        for turn, terms in self._turns(engine, lengths, generate, batch_of):
            for row, ids in zip(turn, terms["answers"].tolist(), strict=True):
                found[row] = self._written(*rows[row], ids, settings, ends)
        return self._together(found)

    def likelihoods(self, engine: Engine, pairs: Sequence[Pair]) -> list[Likelihood]:
        """How likely each continuation is after its context, in their order, the same list on every rank.

        All ranks must call with the same pairs of token ids; an encoder reads the context where the model has one. Raises, on
        all ranks or none, DataError for a context without tokens, and Interrupted where the run is asked to stop.
        """
        _check_tokens("context", [context for context, _ in pairs])
        whole: Any = plain_model(engine.step_module.model)  # type: ignore[arg-type]
        start = self.generation_config.decoder_start_token_id if whole.config.is_encoder_decoder else None

        def batch_of(turn: list[int]) -> dict[str, Any]:
            some = [pairs[number] for number in turn]
            return pair_rows(some, pad_token_id=self.tokenizer.pad_token_id, decoder_start=start)

        found: dict[int, Likelihood] = {}
        lengths = [len(context) + len(continuation) for context, continuation in pairs]
        for turn, terms in self._turns(engine, lengths, Likelihoods(), batch_of):
            scores = zip(turn, terms["logprobs"].tolist(), terms["misses"].tolist(), strict=True)
            found |= {n: Likelihood(logprob, len(pairs[n][1]), misses == 0) for n, logprob, misses in scores}
        return self._together(found)

    def _turns(
        self, engine: Engine, lengths: list[int], objective: Any, batch_of: Callable[[list[int]], dict[str, Any]]
    ) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """This rank's rows of each turn, and what `objective` says of them. All ranks must exhaust it."""
        whole: Any = plain_model(engine.step_module.model)  # type: ignore[arg-type]
        size = 1 if getattr(whole, "way", PLAIN).alone else self.batch
        with engine.inference() as module:
            step: Any = module
            # Asked through the root module's own forward: only there are its parameters gathered.
            before, step.objective = step.objective, objective
            try:
                for turn in dealt(lengths, engine.dp_rank, engine.dp_size, size):
                    # A rank that has run out takes part with the first row, of which nothing is kept.
                    terms = step(to_device(batch_of(turn or [0]), self.runtime.device))
                    if turn:
                        yield turn, terms
                    if self._stop_now():
                        raise Interrupted
            finally:
                step.objective = before

    def _written(
        self, prompt: int, draw: int, ids: list[int], settings: WritingConfig, ends: frozenset[int]
    ) -> Written:
        """An answer out of a row of new tokens that is filled up after its end."""
        end = next((place + 1 for place, token in enumerate(ids) if token in ends), None)
        ids = ids[:end]
        text = self._text(ids)
        stops = [text.index(stop) for stop in settings.stop if stop in text]
        if stops:
            ids = self._until_stop(ids, settings.stop)
            text = text[: min(stops)]
        return Written(prompt, text, ids, end is not None or bool(stops), draw)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _until_stop(self, ids: list[int], stop: list[str]) -> list[int]:
        """The fewest tokens whose text has a stop string, by bisection: a text that has one keeps it."""
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            if any(one in self._text(ids[:middle]) for one in stop):
                high = middle
            else:
                low = middle + 1
        return ids[:low]

    def _together(self, found: dict[int, Any]) -> list[Any]:
        """Every rank's rows, by their number. All ranks must call."""
        everyone: dict[int, Any] = {}
        for part in gather_objects(found, self.runtime):
            everyone |= part
        return [everyone[row] for row in range(len(everyone))]


def _check_tokens(what: str, rows: Sequence[Sequence[int]]) -> None:
    empty = [number for number, row in enumerate(rows) if len(row) == 0]
    if empty:
        raise DataError(
            f"{what} {empty[0]} of {len(rows)} has no tokens, and a model goes on from at least one; begin it with the "
            "tokenizer's first token (<s>, <|endoftext|>), or leave it out"
        )


def dealt(lengths: Sequence[int], rank: int, ranks: int, size: int) -> Iterator[list[int]]:
    """Rows of each turn of one rank: the longest first, at most `size` a turn, similar lengths on all ranks in a turn.

    Every rank has the same number of turns; in the last one it may have none.
    """
    ordered = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    for begin in range(0, len(ordered), size * ranks):
        yield ordered[begin : begin + size * ranks][rank::ranks]
