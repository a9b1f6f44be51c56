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
    """The model's own generation settings with the number of new tokens and beams asked for, and without its own sampling.

    A stop string that is a token which is not shown (`<|im_end|>`) ends an answer as a token.
    """
    config = copy.deepcopy(base)
    config.max_new_tokens, config.max_length, config.num_beams = settings.max_new_tokens, None, settings.beams
    config.do_sample, config.temperature, config.top_p, config.top_k = False, None, None, None
    config.min_length = min(config.min_length or 0, settings.max_new_tokens)
    config.return_dict_in_generate, config.num_return_sequences = False, 1
    config.disable_compile = True  # else transformers compiles a model with a static cache on a GPU, shards and all
    config.pad_token_id = tokenizer.pad_token_id
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if hidden := [s for s in settings.stop if s in tokenizer.all_special_tokens]:
        config.eos_token_id = sorted(ending_ids(config) | {*tokenizer.convert_tokens_to_ids(hidden)})
    return config


def ending_ids(config: Any) -> frozenset[int]:
    """The tokens that end an answer."""
    ends = config.eos_token_id
    return frozenset([] if ends is None else ends if isinstance(ends, list) else [ends])


class GenerateAnswers:
    """Stands in for the objective of a step module: answers instead of a loss."""

    def __init__(self, config: Any, settings: WritingConfig, tokenizer: Any, *, synced: bool) -> None:
        self.config, self.settings, self.tokenizer, self.synced = config, settings, tokenizer, synced

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`answers`, `[S, M]`: new tokens, filled up on the right. `batch["seeds"]` has a seed for each row, and `room`, where
        it is there, the most new tokens.
        """
        from transformers.generation import LogitsProcessorList, StoppingCriteriaList

        whole: Any = plain_model(model)
        prompts = {key: batch[key] for key in ("input_ids", "attention_mask")}
        begin = 1 if whole.config.is_encoder_decoder else prompts["input_ids"].shape[1]
        criteria = [StopAtText(self.tokenizer, self.settings.stop, begin)] if self.settings.stop else []
        config = copy.copy(self.config)
        config.max_new_tokens = batch.get("room", config.max_new_tokens)
        with stock_attention(whole):
            ids = whole.generate(
                **prompts,
                generation_config=config,
                logits_processor=LogitsProcessorList([*self._processors(batch["seeds"], begin)]),
                stopping_criteria=StoppingCriteriaList(criteria),
                synced_gpus=self.synced,
            )
        return {"answers": ids[:, begin:]}

    def _processors(self, seeds: Sequence[int], begin: int) -> Iterator[Any]:
        from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        asked = self.settings
        if asked.temperature == 0:
            return
        if asked.temperature != 1:
            yield TemperatureLogitsWarper(asked.temperature)
        if asked.top_k:
            yield TopKLogitsWarper(asked.top_k)
        if asked.top_p < 1:
            yield TopPLogitsWarper(asked.top_p)
        yield SeededNoise(seeds, begin)


class SeededNoise:
    """A logits processor: adds to each row's scores the noise of its own seed and of the place in its answer."""

    def __init__(self, seeds: Sequence[int], begin: int) -> None:
        self.seeds, self.begin = torch.tensor(list(seeds)), begin

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores [S, V]` with noise."""
        place = input_ids.shape[1] - self.begin
        return scores + gumbel(self.seeds.to(scores.device), place, scores.shape[1]).to(scores.dtype)


def gumbel(seeds: Tensor, place: int, tokens: int) -> Tensor:
    """`[S, V]` float64 of Gumbel's distribution: a function of (seed of the row, place, token), the same on every device.

    SplitMix64 (Steele, Lea and Flood 2014), whose n-th number can be had without those before it: one sequence for each
    row and place, mixed from both, with a number for each token.
    """
    begin = _splitmix_output(_splitmix_output(seeds) + torch.full_like(seeds, place + 1) * _GOLDEN)
    counted = torch.arange(1, tokens + 1, device=seeds.device) * _GOLDEN
    bits = _shift_right(_splitmix_output(begin[:, None] + counted), 12)  # 52 of them and a half are a float64 below 1
    return -(-((bits.double() + 0.5) * 2.0**-52).log()).log()


def _splitmix_output(state: Tensor) -> Tensor:
    """SplitMix64's output function, on int64 that stand for unsigned ones."""
    state = (state ^ _shift_right(state, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    state = (state ^ _shift_right(state, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return state ^ _shift_right(state, 31)


def _shift_right(state: Tensor, by: int) -> Tensor:
    """An unsigned shift to the right."""
    return (state >> by) & ((1 << (64 - by)) - 1)


class StopAtText:
    """A stopping criterion: ends a row once its answer holds one of the stop strings, wherever tokens part it."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], begin: int) -> None:
        self.tokenizer, self.stop, self.begin = tokenizer, stop, begin
        # A character may be four tokens of one byte each, and a token that is not shown has none.
        self.tail = 4 * max(map(len, stop)) + 8

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """bool `[S]`: which rows are done."""
        last = input_ids[:, max(self.begin, input_ids.shape[1] - self.tail) :].tolist()
        texts = self.tokenizer.batch_decode(last, skip_special_tokens=True)
        return torch.tensor([any(s in text for s in self.stop) for text in texts], device=input_ids.device)


@contextmanager
def stock_attention(model: Any) -> Iterator[None]:
    """Attention that can go on from what it has seen, in place of that of padding-free rows; compiled blocks run as written.

    They would be compiled anew for each layer's keys, up to torch's limit, and then not once more for the steps of training.
    """
    config = model.config
    name = attention_of(config)
    if name in (attention.NAME, flex.NAME):
        name = "eager" if flex.needs_eager(model, text_settings(config)) else "sdpa"
    compiled = any(is_compiled(module) for module in model.modules())
    as_written = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with other_attention(config, name), as_written:
        yield
