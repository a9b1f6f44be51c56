"""Generation: transformers' `generate` inside the root module's own forward, with random numbers that belong to a row.

Sampling is greedy search over logits to which noise was added (the Gumbel-max trick: with noise of Gumbel's distribution the
argmax is a sample from the softmax). The noise of a row is a function of its own seed, of the position in the answer and of the
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
from trainer.model.architecture import text_model_config
from trainer.model.compat import attention_of, can_generate_with_cache, temporary_attention
from trainer.objectives.causal import unwrap_adapter

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from trainer.evaluation.base import DecodingConfig

BLOCK_TOKENS = 256
"""Tokens of the vocabulary in a block of `sample_in_two_levels`."""
_GOLDEN_RATIO_STEP = -7046029254386353131
"""The odd integer nearest to 2^64 over the golden ratio, 0x9E3779B97F4A7C15, as a signed one."""


def generation_config_for_answers(
    model_generation_config: GenerationConfig, decoding: DecodingConfig, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """What transformers' `generate` is called with: the model's GenerationConfig with our lengths, beams and end tokens.

    Returns a copy. Sampling is off in it: temperature, top_p and top_k act through logits processors of our own
    (`_sampling_processors`), whose random numbers belong to a row. A stop string that is a special token (`<|im_end|>`)
    becomes an end token, because decoded text does not show it.
    """
    generation: Any = copy.deepcopy(model_generation_config)
    generation.max_new_tokens = decoding.max_new_tokens
    generation.max_length = None
    generation.min_length = min(generation.min_length or 0, decoding.max_new_tokens)
    generation.num_beams = decoding.beams
    generation.do_sample = False
    generation.temperature = None
    generation.top_p = None
    generation.top_k = None
    generation.return_dict_in_generate = False
    generation.num_return_sequences = 1
    # Else transformers compiles a model with a static cache on a GPU, also a sharded one, which fails.
    generation.disable_compile = True
    generation.pad_token_id = tokenizer.pad_token_id
    if generation.eos_token_id is None:
        generation.eos_token_id = tokenizer.eos_token_id
    special_stops = [text for text in decoding.stop if text in tokenizer.all_special_tokens]
    if special_stops:
        stop_ids = set(tokenizer.convert_tokens_to_ids(special_stops))  # type: ignore[arg-type]  # a list gives a list
        generation.eos_token_id = sorted(end_token_ids(generation) | stop_ids)
    return generation  # type: ignore[no-any-return]


def end_token_ids(config: Any) -> frozenset[int]:
    """Ids of the tokens that end an answer, from transformers' GenerationConfig; empty if it names none."""
    eos_ids = config.eos_token_id  # one id, a list of them, or None
    if eos_ids is None:
        return frozenset()
    if not isinstance(eos_ids, list):
        eos_ids = [eos_ids]
    return frozenset(eos_ids)


class GenerateAnswers:
    """Takes the place of the objective in a step module, which calls `terms`: generates answers instead of computing a loss.

    `config`: transformers' GenerationConfig. `synced_gpus`: every forward pass is a collective, so a rank whose answers are
    finished keeps calling until those of all ranks are. `keep_logprobs`: also return the log-probability of each sampled token;
    needs a temperature above 0.
    """

    def __init__(
        self, config: Any, decoding: DecodingConfig, tokenizer: Any, *, synced_gpus: bool, keep_logprobs: bool = False
    ) -> None:
        assert decoding.temperature or not keep_logprobs, "greedy answers have no law that they were drawn by"
        self.config = config
        self.decoding = decoding
        self.tokenizer = tokenizer
        self.synced_gpus = synced_gpus
        self.keep_logprobs = keep_logprobs

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Generate an answer to each prompt of a batch: `answers`, int64 [S, M], the new tokens, padded on the right.

        The step module calls this in place of computing a loss. If `keep_logprobs` is set, also returns `logprobs`, float32
        [S, M]; values after the end of an answer mean nothing.

        `batch["input_ids"]` are the prompts, padded on the left. `batch["seeds"]` has a seed for each row.
        `batch["max_new_tokens"]` is the largest number of new tokens; without it, that of the GenerationConfig holds.
        """
        from transformers.generation import LogitsProcessorList, StoppingCriteriaList

        # The model of transformers, without peft's model around it.
        causal_model: Any = unwrap_adapter(model)
        prompts = {key: batch[key] for key in ("input_ids", "attention_mask")}
        # Where new tokens begin in what `generate` returns: after the prompt, or after the start token of a decoder with an
        # encoder.
        answer_start = 1 if causal_model.config.is_encoder_decoder else prompts["input_ids"].shape[1]
        criteria = []
        if self.decoding.stop:
            criteria.append(StopAtText(self.tokenizer, self.decoding.stop, answer_start))
        # A copy, since the number of new tokens differs between batches.
        config = copy.copy(self.config)
        config.max_new_tokens = batch.get("max_new_tokens", config.max_new_tokens)
        # A model that cannot use a cache computes the whole row again for each token.
        if not can_generate_with_cache(causal_model):
            config.use_cache = False
        processors = list(self._sampling_processors(batch["seeds"], answer_start))
        # The padding-free attention of training has no KV cache.
        with stock_attention(causal_model):
            ids = causal_model.generate(
                **prompts,
                generation_config=config,
                logits_processor=LogitsProcessorList(processors),
                stopping_criteria=StoppingCriteriaList(criteria),
                synced_gpus=self.synced_gpus,
            )
        terms = {"answers": ids[:, answer_start:]}
        if self.keep_logprobs:  # the last processor is a SamplerWithLogprobs
            terms["logprobs"] = torch.stack(processors[-1].logprobs, dim=1)
        return terms

    def _sampling_processors(self, seeds: Sequence[int], answer_start: int) -> Iterator[Any]:
        """The logits processors by which transformers' greedy search samples, in their order; none at temperature 0.

        First temperature, top-k and top-p, then the noise that makes the argmax a sample: a `SamplerWithLogprobs` if
        `keep_logprobs` is set, else a `GumbelNoise`. `seeds`: one for each row. `answer_start`: position of the first new
        token.
        """
        from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        decoding = self.decoding
        # Greedy search takes the likeliest token by itself.
        if decoding.temperature == 0:
            return
        if decoding.temperature != 1:
            yield TemperatureLogitsWarper(decoding.temperature)
        if decoding.top_k:
            yield TopKLogitsWarper(decoding.top_k)
        if decoding.top_p < 1:
            yield TopPLogitsWarper(decoding.top_p)
        if self.keep_logprobs:
            yield SamplerWithLogprobs(seeds, answer_start)
        else:
            yield GumbelNoise(seeds, answer_start)


class GumbelNoise:
    """A logits processor that adds Gumbel noise. A row's noise depends on its own seed and on the position in its answer."""

    def __init__(self, seeds: Sequence[int], answer_start: int) -> None:
        """`seeds`: one for each row. `answer_start`: position of the first new token in `input_ids`."""
        self.seeds = torch.tensor(list(seeds))
        self.answer_start = answer_start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The logits `scores`, [S, V], plus noise, so that their argmax is a sample from their softmax."""
        position = input_ids.shape[1] - self.answer_start
        noise = gumbel_noise(self.seeds.to(scores.device), position, scores.shape[1])
        return scores + noise.to(scores.dtype)


class SamplerWithLogprobs:
    """A logits processor that samples the next token of each row, and keeps the log-probability of that token.

    It samples from the same distribution as `GumbelNoise`, in two levels (`sample_in_two_levels`). For a vocabulary of 49,152
    tokens that takes 448 random numbers instead of 49,152.
    """

    def __init__(self, seeds: Sequence[int], answer_start: int) -> None:
        """`seeds`: one for each row. `answer_start`: position of the first new token in `input_ids`."""
        self.seeds = torch.tensor(list(seeds))
        self.answer_start = answer_start
        self.logprobs: list[Tensor] = []
        """float32 [S] for each position of the answer: log-probability of the token that was sampled there."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [S, V] that are 0 for the sampled token of each row and -inf for all others, so that greedy search takes it."""
        tokens, logprobs = sample_in_two_levels(scores, self.seeds, input_ids.shape[1] - self.answer_start)
        self.logprobs.append(logprobs)
        return torch.full_like(scores, -math.inf).scatter_(1, tokens[:, None], 0.0)


def sample_in_two_levels(scores: Tensor, seeds: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """Sample a token for each row from the softmax of its logits: (tokens int64 [S], log-probabilities float32 [S]).

    The vocabulary is divided into blocks of `BLOCK_TOKENS`. First a block is sampled, then a token in it, each as the argmax
    of logits plus Gumbel noise. The log-probabilities are float32.

    `scores`: logits [S, V]. `seeds`: int64 [S], one for each row. `position`: of the new token in its answer. The result
    depends on these alone, not on what else is in the batch.
    """
    num_padded = -scores.shape[1] % BLOCK_TOKENS  # fills up the last block
    blocks = F.pad(scores.float(), (0, num_padded), value=-math.inf).unflatten(1, (-1, BLOCK_TOKENS))
    block_logits = blocks.logsumexp(dim=-1)
    seeds = seeds.to(scores.device)
    # Noise is added in float64, so that its rounding changes no argmax.
    block_noise = gumbel_noise(seeds, 2 * position, block_logits.shape[1])
    block = (block_logits.double() + block_noise).argmax(dim=-1)
    rows = torch.arange(len(block), device=block.device)
    token_logits = blocks[rows, block]
    token_noise = gumbel_noise(seeds, 2 * position + 1, BLOCK_TOKENS)
    token_in_block = (token_logits.double() + token_noise).argmax(dim=-1)
    logprobs = token_logits[rows, token_in_block] - block_logits.logsumexp(dim=-1)
    return block * BLOCK_TOKENS + token_in_block, logprobs


def gumbel_noise(seeds: Tensor, position: int, num_tokens: int) -> Tensor:
    """Noise whose argmax, added to logits, is a sample from their softmax: Gumbel's, float64 [S, num_tokens].

    A function of (seed of the row, position, token), the same on every device. `seeds`: int64 [S]. `position`: position of the
    new token in its answer, from 0. The random numbers are SplitMix64's (Steele, Lea and Flood 2014), whose n-th number does
    not need those before it. Each row and position has a sequence of its own, with a number for each token.
    """
    # The state of SplitMix64 grows by the golden ratio step with each number, so the n-th state is start + n * step.
    position_step = torch.full_like(seeds, position + 1) * _GOLDEN_RATIO_STEP
    sequence_start = _splitmix_output(_splitmix_output(seeds) + position_step)
    token_steps = torch.arange(1, num_tokens + 1, device=seeds.device) * _GOLDEN_RATIO_STEP
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

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str], answer_start: int) -> None:
        """`answer_start`: position of the first new token in `input_ids`."""
        self.tokenizer = tokenizer
        self.stop_strings = stop_strings
        self.answer_start = answer_start
        # Only the last tokens are decoded. A character may be four tokens of one byte each; the 8 are for special tokens, which
        # decode to nothing.
        longest_stop = max(map(len, stop_strings))
        self.num_decoded_tokens = 4 * longest_stop + 8

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Whether the end of each answer contains a stop string, bool [S]; asked after each new token.

        `input_ids`: int64 [S, N], prompts and answers so far. `scores` are not used.
        """
        decode_start = max(self.answer_start, input_ids.shape[1] - self.num_decoded_tokens)
        last_ids = input_ids[:, decode_start:].tolist()
        texts = self.tokenizer.batch_decode(last_ids, skip_special_tokens=True)
        has_stop_string = []
        for text in texts:
            has_stop_string.append(any(stop in text for stop in self.stop_strings))
        return torch.tensor(has_stop_string, device=input_ids.device)


@contextmanager
def stock_attention(model: Any) -> Iterator[None]:
    """A context in which the model can generate: with an attention that has a KV cache, and without compiled blocks.

    The padding-free attention of training has no cache. Compiled blocks would be compiled again for each length of the cache,
    up to torch's limit, after which training too would run uncompiled.
    """
    config = model.config
    attention_name = attention_of(config)
    if attention_name in (attention.VARLEN_ATTENTION, flex.FLEX_ATTENTION):  # the two padding-free kernels of training
        attention_name = "eager" if flex.needs_eager(model, text_model_config(config)) else "sdpa"
    has_compiled_blocks = any(is_compiled(module) for module in model.modules())
    eager_blocks = torch.compiler.set_stance("force_eager") if has_compiled_blocks else nullcontext()
    with temporary_attention(config, attention_name), eager_blocks:
        yield
