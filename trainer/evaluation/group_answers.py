"""Several samples for each prompt with the prompt computed once: the answers of rounds (`trainer/rollout/generator.py`).

transformers' `generate` computes the prompt of each row, and computes all rows until the last one has ended. Here the KV cache
of a prompt is computed once and copied to the rows of all its samples, and rows that have ended leave the batch. The sampled
tokens are the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer.evaluation.base import DecodingConfig
from trainer.evaluation.decoding import (
    StopAtText,
    end_token_ids,
    generation_config_for_answers,
    sample_in_two_levels,
    stock_attention,
)
from trainer.evaluation.full_weights import (
    GatherDecision,
    bytes_per_parameter,
    decide_weight_gathering,
    kv_cache_bytes_upper_bound,
)
from trainer.evaluation.generate import (
    AnswerGenerator,
    GeneratedAnswer,
    answer_from_tokens,
    batches_of_rank,
    check_sequences_fit_positions,
    max_answer_tokens,
    max_positions,
    transformers_model_of,
)
from trainer.evaluation.likelihood import pad_sequences, padding_mask
from trainer.objectives.causal import HF_PATH, unwrap_adapter

if TYPE_CHECKING:
    from strategies.base import Engine

MIN_ENDED_SHARE = 0.25
"""Ended rows leave a batch once they are this share of its rows: selecting rows copies the cache, which must be worth it."""
NEEDED_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "cache", "logits_to_keep")
"""What a model's forward pass must take to be called without `generate`."""


@dataclass(frozen=True, slots=True)
class _PromptChunk:
    """Samples of one prompt that are generated in one batch: all of them, or as many as a batch has rows."""

    prompt_index: int
    sample_indices: range


class SharedPromptGenerator(AnswerGenerator):
    """Generates several samples for each prompt, and computes each prompt once for all of them, if the model allows it."""

    def generate_samples(
        self, engine: Engine, prompts: Sequence[Sequence[int]], decoding: DecodingConfig, seeds: Sequence[Sequence[int]]
    ) -> list[GeneratedAnswer]:
        """Let the model in training write `decoding.draws` answers to each prompt of a round, with log-probabilities.

        In a round of reinforcement learning, the answers are scored and then learned from. `seeds`: seeds[prompt][sample]. The
        trained weights generate, not averaged ones.

        Each prompt is computed once for all its samples, if the model can be called without transformers' `generate` and a
        forward pass is no collective; else `generate_answers` generates the same samples, each with its own prompt. All ranks
        must call, with the same arguments.

        Raises, on all ranks or none, DataError for a prompt without tokens or one that leaves no position for an answer, and
        Interrupted if the run is asked to stop.
        """
        model = transformers_model_of(engine)
        limits = max_answer_tokens(model.config, prompts, decoding.max_new_tokens)  # by prompt
        gathering = None
        # Otherwise `generate_answers` decides it by itself.
        if can_share_prompts(model):
            gathering = self._decide_gathering_for_samples(engine, model, prompts, limits, decoding)
        if gathering is None or gathering.forward_is_collective:
            return self.generate_answers(engine, prompts, decoding, seeds=seeds, averaged=False, keep_logprobs=True)
        # `generate_answers` checks this by itself.
        check_sequences_fit_positions("prompt", prompts, max_positions(model.config))
        return self._generate_with_shared_prompts(engine, prompts, decoding, seeds, limits, gathering)

    def _decide_gathering_for_samples(
        self,
        engine: Engine,
        model: Any,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        decoding: DecodingConfig,
    ) -> GatherDecision:
        """Decide whether sharded weights are gathered once for all samples: if they fit beside the largest KV cache.

        If they do not fit into memory, each forward pass gathers them block by block, which is slower. `limits`: most tokens
        of an answer, by prompt. All ranks must call.
        """
        most_tokens = max((len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)), default=0)
        kv_cache_bytes = kv_cache_bytes_upper_bound(
            model.config, self._rows_per_batch(decoding), most_tokens, bytes_per_parameter(model)
        )
        return decide_weight_gathering(engine, self.runtime, kv_cache_bytes)

    def _chunks_per_batch(self, decoding: DecodingConfig) -> int:
        """How many prompt chunks a batch holds; a chunk has at most `self.batch` samples of one prompt."""
        return max(1, self.batch // min(self.batch, decoding.draws))

    def _rows_per_batch(self, decoding: DecodingConfig) -> int:
        """Most samples of a batch."""
        return self._chunks_per_batch(decoding) * min(self.batch, decoding.draws)

    def _generate_with_shared_prompts(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        decoding: DecodingConfig,
        seeds: Sequence[Sequence[int]],
        limits: Sequence[int],
        gathering: GatherDecision,
    ) -> list[GeneratedAnswer]:
        """Generate the samples of `generate_samples`, with one computation of each prompt. All ranks must call.

        `limits`: most tokens of an answer, by prompt. `gathering`: whether sharded weights are gathered once. Returns the
        answers of all ranks, prompt by prompt.
        """
        chunks = []
        for prompt_index in range(len(prompts)):
            for first in range(0, decoding.draws, self.batch):
                sample_indices = range(first, min(first + self.batch, decoding.draws))
                # A batch has at most `self.batch` rows, so many samples of one prompt are several chunks.
                chunks.append(_PromptChunk(prompt_index, sample_indices))
        # All answers of a batch have the same limit, so chunks are grouped by it.
        chunk_limits = [limits[chunk.prompt_index] for chunk in chunks]
        chunk_lengths = [len(prompts[chunk.prompt_index]) + limits[chunk.prompt_index] for chunk in chunks]
        batches = batches_of_rank(
            chunk_lengths,
            engine.rank,
            engine.world_size,
            max_rows=self._chunks_per_batch(decoding),
            group_of_row=chunk_limits,
        )

        def make_batch(chunk_numbers: list[int]) -> dict[str, Any]:
            """The tensors of one batch; `max_new_tokens` is the same for all its chunks."""
            batch_chunks = [chunks[number] for number in chunk_numbers]
            batch = _batch_of_chunks(batch_chunks, prompts, seeds, pad_token_id=self.tokenizer.pad_token_id)
            return {**batch, "max_new_tokens": chunk_limits[chunk_numbers[0]]}

        end_ids = end_token_ids(generation_config_for_answers(self.generation_config, decoding, self.tokenizer))
        objective = SampleGroups(decoding, self.tokenizer, end_ids)
        own_answers: dict[int, GeneratedAnswer] = {}  # by number of the answer: prompt_index * draws + sample_index
        for chunk_numbers, terms in self.run_batches(
            engine, list(batches), objective, make_batch, gathering=gathering, averaged=False
        ):
            sample_ids = terms["answers"].tolist()
            logprobs = terms["logprobs"].cpu().numpy()
            row = 0
            for chunk in (chunks[number] for number in chunk_numbers):
                for sample_index in chunk.sample_indices:
                    answer = answer_from_tokens(
                        chunk.prompt_index, sample_index, sample_ids[row], decoding.stop, end_ids, self.tokenizer
                    )
                    answer = replace(answer, logprobs=logprobs[row, : len(answer.ids)].copy())
                    own_answers[chunk.prompt_index * decoding.draws + sample_index] = answer
                    row += 1
        return self.gather_in_order(own_answers)


def _batch_of_chunks(
    chunks: Sequence[_PromptChunk],
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
) -> dict[str, Any]:
    """Build what `SampleGroups.terms` reads: each prompt once, and for each sample which prompt it continues.

    `prompts`: token ids of all prompts, of which the chunks name theirs. `seeds`: seeds[prompt][sample].
    """
    chunk_prompts = [prompts[chunk.prompt_index] for chunk in chunks]
    prompt_row_of_sample: list[int] = []
    sample_seeds: list[int] = []
    for prompt_row, chunk in enumerate(chunks):
        prompt_row_of_sample += [prompt_row] * len(chunk.sample_indices)
        sample_seeds += [seeds[chunk.prompt_index][sample] for sample in chunk.sample_indices]
    return {
        "input_ids": pad_sequences(chunk_prompts, pad_token_id, left=True),
        "attention_mask": padding_mask(chunk_prompts, left=True),
        "prompt_row_of_sample": torch.tensor(prompt_row_of_sample),
        "seeds": torch.tensor(sample_seeds),
    }


def can_share_prompts(model: Any) -> bool:
    """Whether the KV cache of a prompt can be computed once for all its samples, without transformers' `generate`.

    False if one of these is missing: forward passes over several rows, positions as an argument, every argument of
    `NEEDED_ARGUMENTS`, and a KV cache whose rows can be selected and repeated.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    # How a batch goes through this model in training; without a path of its own, as transformers has it.
    forward_path = getattr(model, "forward_path", HF_PATH)
    needs_single_rows = forward_path.alone
    takes_positions = forward_path.positions
    arguments = inspect.signature(model.forward).parameters
    if needs_single_rows or not takes_positions or any(name not in arguments for name in NEEDED_ARGUMENTS):
        return False
    layer_types = {type(layer) for layer in DynamicCache(config=model.config).layers}
    return layer_types <= {DynamicLayer, DynamicSlidingWindowLayer}


class SampleGroups:
    """Takes the place of the objective in a step module, which calls `terms`: samples several answers to each prompt."""

    def __init__(self, decoding: DecodingConfig, tokenizer: Any, end_ids: frozenset[int]) -> None:
        self.decoding = decoding
        self.tokenizer = tokenizer
        self.end_ids = end_ids
        self.stop_criterion = StopAtText(tokenizer, decoding.stop, 0) if decoding.stop else None

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Sample the answers of one batch: `answers` int64 and `logprobs` float32, [samples, max_new_tokens].

        Values after the end of an answer mean nothing. The step module calls this in place of computing a loss.

        `batch["input_ids"]`: the prompts, int64 [prompts, N], padded on the left, with their `attention_mask`. Also
        `prompt_row_of_sample` and `seeds`, int64 [samples], and the number `max_new_tokens`.
        """
        causal_model: Any = unwrap_adapter(model)
        with stock_attention(causal_model):
            return self._sample(causal_model, batch)

    def _sample(self, causal_model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Sample the answers token by token (see `terms`), with one row for each sample that has not ended.

        Ended rows leave the batch once they are `MIN_ENDED_SHARE` of it.
        """
        from transformers.cache_utils import DynamicCache

        # Prefill: one row for each prompt, whose keys and values go into the cache.
        cache = DynamicCache(config=causal_model.config)
        prompt_mask = batch["attention_mask"]
        prompt_positions = (prompt_mask.cumsum(dim=-1) - 1).clamp(min=0)
        logits = _next_token_logits(causal_model, batch["input_ids"], prompt_mask, prompt_positions, cache)

        # From here on there is one row for each sample, with a copy of its prompt's cache.
        prompt_row_of_sample = batch["prompt_row_of_sample"]
        cache.batch_select_indices(prompt_row_of_sample)
        logits = logits[prompt_row_of_sample]
        mask = prompt_mask[prompt_row_of_sample]
        prompt_lengths = mask.sum(dim=-1)
        num_samples = len(prompt_row_of_sample)
        max_new_tokens = batch["max_new_tokens"]
        answers = torch.full((num_samples, max_new_tokens), self.tokenizer.pad_token_id, device=mask.device)
        logprobs = torch.zeros(num_samples, max_new_tokens, device=mask.device)
        has_ended = torch.zeros(num_samples, dtype=torch.bool, device=mask.device)

        sample_of_row = torch.arange(num_samples, device=mask.device)  # of each row that is still in the batch
        for position in range(max_new_tokens):
            tokens, token_logprobs = sample_in_two_levels(
                logits / self.decoding.temperature, batch["seeds"][sample_of_row], position
            )
            answers[sample_of_row, position] = tokens
            logprobs[sample_of_row, position] = token_logprobs
            has_ended[sample_of_row] |= self._has_just_ended(tokens, answers[sample_of_row, : position + 1])
            unfinished_rows = (~has_ended[sample_of_row]).nonzero()[:, 0]
            if not len(unfinished_rows) or position + 1 == max_new_tokens:
                break
            if len(unfinished_rows) <= (1 - MIN_ENDED_SHARE) * len(sample_of_row):
                cache.batch_select_indices(unfinished_rows)
                sample_of_row = sample_of_row[unfinished_rows]
                mask = mask[unfinished_rows]
                tokens = tokens[unfinished_rows]
            # The new token takes part in attention from now on.
            mask = torch.cat([mask, mask.new_ones(len(sample_of_row), 1)], dim=1)
            token_positions = (prompt_lengths[sample_of_row] + position)[:, None]
            logits = _next_token_logits(causal_model, tokens[:, None], mask, token_positions, cache)
        return {"answers": answers, "logprobs": logprobs}

    def _has_just_ended(self, last_tokens: Tensor, answers: Tensor) -> Tensor:
        """Whether each answer ends with its last token, because it is an end token or completes a stop string: bool [rows].

        `last_tokens`: int64 [rows]. `answers`: all tokens so far, int64 [rows, positions].
        """
        end_ids = torch.tensor(sorted(self.end_ids), dtype=last_tokens.dtype, device=last_tokens.device)
        is_end = torch.isin(last_tokens, end_ids)
        if self.stop_criterion is not None:
            is_end = is_end | self.stop_criterion(answers, last_tokens)
        return is_end


def _next_token_logits(causal_model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """Run the model on new tokens, and return the logits of the token after them, float32 [rows, V].

    `ids`: int64 [rows, N], the tokens since the last call, at `positions`. `mask`: over all tokens so far. Their keys and
    values are added to `cache`.
    """
    outputs = causal_model(
        input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True, logits_to_keep=1
    )
    logits: Tensor = outputs.logits[:, -1].float()
    return logits
