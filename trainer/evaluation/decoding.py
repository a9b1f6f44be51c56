"""Generation: transformers' `generate` inside the root module's own forward, with random numbers that belong to a row.

Sampling is greedy search over logits to which noise was added (the Gumbel-max trick: with noise of Gumbel's distribution the
argmax is a draw from the softmax). The noise of a row is a function of its own seed, of the place in the answer and of the
token alone, so that a text depends neither on ranks nor on what else is in the batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strategies.compat.modules import is_compiled
from trainer.model import attention, flex
from trainer.model.architecture import text_settings
from trainer.model.compat import attention_of, other_attention, writes_with_cache
from trainer.objectives.causal import plain_model

if TYPE_CHECKING:
    from trainer.evaluation.base import DecodingConfig

DRAW_BLOCK = 256
"""Tokens of a block in `draw_in_two_levels`."""
_GOLDEN_RATIO_STEP = -7046029254386353131
"""The odd integer nearest to 2^64 over the golden ratio, 0x9E3779B97F4A7C15, as a signed one."""


def generation_settings(base: Any, settings: DecodingConfig, tokenizer: Any) -> Any:
    """The model's own generation settings (`base`, transformers'), with our lengths and beams, and without its sampling.

    A stop string that is a special token (`<|im_end|>`) ends an answer as a token, since decoded text does not show it.
    """
    config = copy.deepcopy(base)
    config.max_new_tokens = settings.max_new_tokens
    config.max_length = None
    config.min_length = min(config.min_length or 0, settings.max_new_tokens)
    config.num_beams = settings.beams
    # Sampling is greedy search over logits with noise (see the head of this file).
    config.do_sample = False
    config.temperature = None
    config.top_p = None
    config.top_k = None
    config.return_dict_in_generate = False
    config.num_return_sequences = 1
    config.disable_compile = True  # else transformers compiles a model with a static cache on a GPU, shards and all
    config.pad_token_id = tokenizer.pad_token_id
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    # Stop strings that are special tokens end an answer as end tokens do: they do not appear in its text.
    special_stops = [text for text in settings.stop if text in tokenizer.all_special_tokens]
    if special_stops:
        stop_ids = {*tokenizer.convert_tokens_to_ids(special_stops)}
        config.eos_token_id = sorted(ending_ids(config) | stop_ids)
    return config


def ending_ids(config: Any) -> frozenset[int]:
    """Ids of the tokens that end an answer, by transformers' generation settings."""
    eos_ids = config.eos_token_id  # one id, a list of them, or None
    if eos_ids is None:
        return frozenset()
    if not isinstance(eos_ids, list):
        eos_ids = [eos_ids]
    return frozenset(eos_ids)


class GenerateAnswers:
    """Takes the place of the objective in a step module: writes answers instead of computing a loss.

    `synced`: every forward pass is a collective, so a rank whose answers are finished keeps calling until all ranks are.
    `keep_logprobs`: also return the log-probability of each drawn token; the temperature is above 0 then.
    """

    def __init__(
        self, config: Any, settings: DecodingConfig, tokenizer: Any, *, synced: bool, keep_logprobs: bool = False
    ) -> None:
        assert settings.temperature or not keep_logprobs, "greedy answers have no law that they were drawn by"
        self.config = config
        self.settings = settings
        self.tokenizer = tokenizer
        self.synced = synced
        self.keep_logprobs = keep_logprobs

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Generate an answer to each prompt. Returns `answers`, int64 [S, M]: the new tokens, padded on the right.

        With `keep_logprobs` also `logprobs`, float32 [S, M], which mean nothing after the end of an answer.

        `batch["input_ids"]` are the prompts, padded on the left. `batch["seeds"]` has a seed for each row; `batch["room"]`, if
        it is there, is the largest number of new tokens.
        """
        from transformers.generation import LogitsProcessorList, StoppingCriteriaList

        causal_model: Any = plain_model(model)
        prompts = {key: batch[key] for key in ("input_ids", "attention_mask")}
        # Position of the first new token: a decoder of its own begins with one start token, not with the prompt.
        begin = 1 if causal_model.config.is_encoder_decoder else prompts["input_ids"].shape[1]
        criteria = []
        if self.settings.stop:
            criteria.append(StopAtText(self.tokenizer, self.settings.stop, begin))
        config = copy.copy(self.config)
        config.max_new_tokens = batch.get("room", config.max_new_tokens)
        if not writes_with_cache(causal_model):
            config.use_cache = False
        processors = [*self._processors(batch["seeds"], begin)]
        with stock_attention(causal_model):
            ids = causal_model.generate(
                **prompts,
                generation_config=config,
                logits_processor=LogitsProcessorList(processors),
                stopping_criteria=StoppingCriteriaList(criteria),
                synced_gpus=self.synced,
            )
        terms = {"answers": ids[:, begin:]}
        if self.keep_logprobs:
            terms["logprobs"] = torch.stack(processors[-1].logprobs, dim=1)
        return terms

    def _processors(self, seeds: Sequence[int], begin: int) -> Iterator[Any]:
        """The logits processors that sample: temperature, top-k, top-p, then the noise. Temperature 0 is greedy and has none.

        `seeds`: one for each row. `begin`: position of the first new token.
        """
        from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        settings = self.settings
        if settings.temperature == 0:
            return
        if settings.temperature != 1:
            yield TemperatureLogitsWarper(settings.temperature)
        if settings.top_k:
            yield TopKLogitsWarper(settings.top_k)
        if settings.top_p < 1:
            yield TopPLogitsWarper(settings.top_p)
        if self.keep_logprobs:
            yield RoundDraws(seeds, begin)
        else:
            yield SeededNoise(seeds, begin)


class SeededNoise:
    """A logits processor that adds Gumbel noise. A row's noise depends on its own seed and on the position in its answer."""

    def __init__(self, seeds: Sequence[int], begin: int) -> None:
        """`begin`: position of the first new token in `input_ids`."""
        self.seeds = torch.tensor(list(seeds))
        self.begin = begin

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores [S, V]` with noise."""
        position = input_ids.shape[1] - self.begin
        noise = gumbel(self.seeds.to(scores.device), position, scores.shape[1])
        return scores + noise.to(scores.dtype)


class RoundDraws:
    """A logits processor that draws the next token of each row for a round, and keeps how likely the token was.

    The law is that of `SeededNoise`, drawn in two levels: first a block of `DRAW_BLOCK` tokens by the noisy logarithm of its
    probability, then a token of the block. For a vocabulary of 49,152 that takes 448 random numbers instead of 49,152.
    """

    def __init__(self, seeds: Sequence[int], begin: int) -> None:
        """`begin`: position of the first new token in `input_ids`."""
        self.seeds = torch.tensor(list(seeds))
        self.begin = begin
        self.logprobs: list[Tensor] = []
        """float32 [S] for each position: log-probability of the token that was drawn there."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`[S, V]`: 0 for the drawn token of each row and -inf for all others, so that greedy search takes it."""
        drawn, logprobs = draw_in_two_levels(scores, self.seeds, input_ids.shape[1] - self.begin)
        self.logprobs.append(logprobs)
        return torch.full_like(scores, -math.inf).scatter_(1, drawn[:, None], 0.0)


def draw_in_two_levels(scores: Tensor, seeds: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """(tokens int64 [S] drawn from the softmax of `scores [S, V]`, their log-probabilities float32 [S]).

    The vocabulary is divided into blocks: first a block is drawn, then a token in it, each as the argmax of logits plus Gumbel
    noise. A function of (scores, seed of the row, position) alone: `seeds` int64 [S], `position` the number of the new token.
    """
    missing = -scores.shape[1] % DRAW_BLOCK
    blocks = F.pad(scores.float(), (0, missing), value=-math.inf).unflatten(1, (-1, DRAW_BLOCK))
    block_logits = blocks.logsumexp(dim=-1)
    seeds = seeds.to(scores.device)
    # Added in float64: two blocks change places only where rounding of the scores themselves does it.
    block_noise = gumbel(seeds, 2 * position, block_logits.shape[1])
    block = (block_logits.double() + block_noise).argmax(dim=-1)
    rows = torch.arange(len(block), device=block.device)
    token_logits = blocks[rows, block]
    token = (token_logits.double() + gumbel(seeds, 2 * position + 1, DRAW_BLOCK)).argmax(dim=-1)
    return block * DRAW_BLOCK + token, token_logits[rows, token] - block_logits.logsumexp(dim=-1)


def gumbel(seeds: Tensor, position: int, tokens: int) -> Tensor:
    """Gumbel noise, float64 [S, V]: a function of (seed of the row, position, token) alone, the same on every device.

    `seeds`: int64 [S]. `position`: number of the new token in its answer, from 0. `tokens`: V, the size of the vocabulary. The
    random numbers are SplitMix64's (Steele, Lea and Flood 2014), whose n-th number does not need those before it. Each row and
    position has its own sequence, with a number for each token.
    """
    # The state of SplitMix64 grows by the golden ratio step with each number, so the n-th state is start + n * step.
    position_step = torch.full_like(seeds, position + 1) * _GOLDEN_RATIO_STEP
    sequence_start = _splitmix_output(_splitmix_output(seeds) + position_step)
    token_steps = torch.arange(1, tokens + 1, device=seeds.device) * _GOLDEN_RATIO_STEP
    # 52 random bits and a half, divided by 2^52: uniform in (0, 1), and neither end is ever reached.
    bits = _shift_right(_splitmix_output(sequence_start[:, None] + token_steps), 12)
    uniform = (bits.double() + 0.5) * 2.0**-52
    return -(-uniform.log()).log()  # the inverse of Gumbel's distribution function


def _splitmix_output(state: Tensor) -> Tensor:
    """SplitMix64's output function, which mixes the bits of a state, on int64 that stand for unsigned ones."""
    state = (state ^ _shift_right(state, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    state = (state ^ _shift_right(state, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return state ^ _shift_right(state, 31)


def _shift_right(state: Tensor, bits: int) -> Tensor:
    """An unsigned shift to the right of int64: torch's own fills with the sign bit, so the upper bits are cleared."""
    kept_bits = (1 << (64 - bits)) - 1
    return (state >> bits) & kept_bits


class StopAtText:
    """A stopping criterion that ends a row once its answer contains a stop string, even one that is split over tokens."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], begin: int) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.begin = begin
        # Only the last tokens are decoded. A character may be four tokens of one byte each; special tokens decode to nothing.
        longest_stop = max(map(len, stop))
        self.tail_tokens = 4 * longest_stop + 8

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """bool `[S]`: which rows are done."""
        tail_start = max(self.begin, input_ids.shape[1] - self.tail_tokens)
        last_ids = input_ids[:, tail_start:].tolist()
        texts = self.tokenizer.batch_decode(last_ids, skip_special_tokens=True)
        is_done = []
        for text in texts:
            is_done.append(any(stop in text for stop in self.stop))
        return torch.tensor(is_done, device=input_ids.device)


@contextmanager
def stock_attention(model: Any) -> Iterator[None]:
    """Within it the model uses an attention of transformers that has a cache, and compiled blocks run eagerly.

    The padding-free attention of training has no cache. Generation would compile the blocks again for each length of the
    cache, up to torch's limit, and then training would run uncompiled.
    """
    config = model.config
    name = attention_of(config)
    if name in (attention.NAME, flex.NAME):
        name = "eager" if flex.needs_eager(model, text_settings(config)) else "sdpa"
    has_compiled_blocks = any(is_compiled(module) for module in model.modules())
    eager_blocks = torch.compiler.set_stance("force_eager") if has_compiled_blocks else nullcontext()
    with other_attention(config, name), eager_blocks:
        yield
