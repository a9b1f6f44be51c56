"""Generation: transformers' `generate` inside the root module's own forward, with random numbers that belong to a row.

Sampling is greedy search over logits to which noise was added (the Gumbel-max trick: with noise of Gumbel's distribution the
argmax is a draw from the softmax). The noise of a row is a function of its own seed, of the place in the answer and of the
token alone, so that a text depends neither on ranks nor on what else is in the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from strategies.compat.modules import is_compiled
from trainer.model import attention, flex
from trainer.model.architecture import text_settings
from trainer.model.compat import attention_of, other_attention
from trainer.objectives.causal import plain_model

if TYPE_CHECKING:
    from trainer.evaluation.base import WritingConfig

_GOLDEN = -7046029254386353131
"""The odd integer nearest to 2^64 over the golden ratio, 0x9E3779B97F4A7C15, as a signed one."""


def generation_settings(base: Any, settings: WritingConfig, tokenizer: Any) -> Any:
    """The model's own generation settings, with our lengths and beams, and without its sampling.

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
    special_stops = [text for text in settings.stop if text in tokenizer.all_special_tokens]
    if special_stops:
        config.eos_token_id = sorted(ending_ids(config) | {*tokenizer.convert_tokens_to_ids(special_stops)})
    return config


def ending_ids(config: Any) -> frozenset[int]:
    """The tokens that end an answer."""
    ends = config.eos_token_id
    if ends is None:
        return frozenset()
    return frozenset(ends if isinstance(ends, list) else [ends])


class GenerateAnswers:
    """Takes the place of the objective in a step module: writes answers instead of computing a loss.

    `synced`: every forward pass is a collective, so a rank whose answers are finished keeps calling until all ranks are.
    """

    def __init__(self, config: Any, settings: WritingConfig, tokenizer: Any, *, synced: bool) -> None:
        self.config, self.settings, self.tokenizer, self.synced = config, settings, tokenizer, synced

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`answers`, `[S, M]`: new tokens, padded on the right.

        `batch["seeds"]` has a seed for each row; `batch["room"]`, if it is there, is the largest number of new tokens.
        """
        from transformers.generation import LogitsProcessorList, StoppingCriteriaList

        causal_model: Any = plain_model(model)
        prompts = {key: batch[key] for key in ("input_ids", "attention_mask")}
        begin = 1 if causal_model.config.is_encoder_decoder else prompts["input_ids"].shape[1]
        criteria = [StopAtText(self.tokenizer, self.settings.stop, begin)] if self.settings.stop else []
        config = copy.copy(self.config)
        config.max_new_tokens = batch.get("room", config.max_new_tokens)
        with stock_attention(causal_model):
            ids = causal_model.generate(
                **prompts,
                generation_config=config,
                logits_processor=LogitsProcessorList([*self._processors(batch["seeds"], begin)]),
                stopping_criteria=StoppingCriteriaList(criteria),
                synced_gpus=self.synced,
            )
        return {"answers": ids[:, begin:]}

    def _processors(self, seeds: Sequence[int], begin: int) -> Iterator[Any]:
        """The logits processors that sample: temperature, top-k, top-p, then the noise. Temperature 0 is greedy and has none."""
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
        yield SeededNoise(seeds, begin)


class SeededNoise:
    """A logits processor that adds Gumbel noise. A row's noise depends on its own seed and on the position in its answer."""

    def __init__(self, seeds: Sequence[int], begin: int) -> None:
        self.seeds = torch.tensor(list(seeds))
        self.begin = begin

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores [S, V]` with noise."""
        position = input_ids.shape[1] - self.begin
        noise = gumbel(self.seeds.to(scores.device), position, scores.shape[1])
        return scores + noise.to(scores.dtype)


def gumbel(seeds: Tensor, position: int, tokens: int) -> Tensor:
    """`[S, V]` float64 of Gumbel's distribution: a function of (seed of the row, position, token), the same on every device.

    The random numbers are SplitMix64's (Steele, Lea and Flood 2014), whose n-th number does not need those before it. Each row
    and position has its own sequence, with a number for each token.
    """
    sequence_start = _splitmix_output(_splitmix_output(seeds) + torch.full_like(seeds, position + 1) * _GOLDEN)
    token_steps = torch.arange(1, tokens + 1, device=seeds.device) * _GOLDEN
    # 52 random bits and a half, divided by 2^52: uniform in (0, 1), and neither end is ever reached.
    bits = _shift_right(_splitmix_output(sequence_start[:, None] + token_steps), 12)
    uniform = (bits.double() + 0.5) * 2.0**-52
    return -(-uniform.log()).log()


def _splitmix_output(state: Tensor) -> Tensor:
    """SplitMix64's output function, on int64 that stand for unsigned ones."""
    state = (state ^ _shift_right(state, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    state = (state ^ _shift_right(state, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return state ^ _shift_right(state, 31)


def _shift_right(state: Tensor, by: int) -> Tensor:
    """An unsigned shift to the right."""
    return (state >> by) & ((1 << (64 - by)) - 1)


class StopAtText:
    """A stopping criterion that ends a row once its answer contains a stop string, even one that is split over tokens."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], begin: int) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.begin = begin
        # Only the last tokens are decoded. A character may be four tokens of one byte each; special tokens decode to nothing.
        self.tail = 4 * max(map(len, stop)) + 8

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """bool `[S]`: which rows are done."""
        last = input_ids[:, max(self.begin, input_ids.shape[1] - self.tail) :].tolist()
        texts = self.tokenizer.batch_decode(last, skip_special_tokens=True)
        is_done = []
        for text in texts:
            is_done.append(any(stop in text for stop in self.stop))
        return torch.tensor(is_done, device=input_ids.device)


@contextmanager
def stock_attention(model: Any) -> Iterator[None]:
    """Within it the model uses an attention with a cache, in place of the padding-free one, and compiled blocks run eagerly.

    Generation would compile the blocks again for each length of the cache, up to torch's limit, and then training would run
    uncompiled.
    """
    config = model.config
    name = attention_of(config)
    if name in (attention.NAME, flex.NAME):
        name = "eager" if flex.needs_eager(model, text_settings(config)) else "sdpa"
    compiled = any(is_compiled(module) for module in model.modules())
    as_written = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with other_attention(config, name), as_written:
        yield
