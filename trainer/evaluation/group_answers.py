"""Several draws to each prompt with the prompt computed once: the answers of rounds (`trainer/rollout/writer.py`).

transformers' `generate` computes each row's prompt, and all rows until the last has ended. Here the keys of a prompt are computed
once and taken by all its rows, and rows that have ended leave the batch. The draws are the same, token for token.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer.evaluation.base import DecodingConfig
from trainer.evaluation.decoding import StopAtText, draw_in_two_levels, ending_ids, generation_settings, stock_attention
from trainer.evaluation.full_weights import cache_bytes, decide_gathering
from trainer.evaluation.generate import (
    AnswerGenerator,
    GeneratedAnswer,
    check_rows,
    cut_answer,
    max_answer_tokens,
    model_of,
    position_limit,
    sharded_batches,
)
from trainer.evaluation.likelihood import mask_of, padded
from trainer.objectives.causal import STOCK_PATH, plain_model

if TYPE_CHECKING:
    from strategies.base import Engine

LEAVING_SHARE = 0.25
"""Share of a batch's rows that have ended at which they leave it: selecting rows of the cache copies it."""
NEEDED_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "cache", "logits_to_keep")
"""What a model's forward pass must take to be called without `generate`."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Draws to one prompt that are written in one batch: all of them, or as many as a batch has rows."""

    prompt: int
    draws: range


class SharedPromptGenerator(AnswerGenerator):
    """Writes several draws to each prompt."""

    def generate_samples(
        self, engine: Engine, prompts: Sequence[Sequence[int]], settings: DecodingConfig, seeds: Sequence[Sequence[int]]
    ) -> list[GeneratedAnswer]:
        """`settings.draws` answers to each prompt by the trained weights, with the log-probabilities of the drawn tokens.

        A prompt is computed once for all its answers. If the model must be called by transformers' `generate`, or each pass is a
        collective, `answers` writes them instead. `seeds`: of each prompt, one for each draw. All ranks must call. Errors: those
        of `answers`.
        """
        # Divide the answers into parts that fit a batch.
        model = model_of(engine)
        limits = max_answer_tokens(model.config, prompts, settings.max_new_tokens)
        parts = []
        for prompt in range(len(prompts)):
            for first in range(0, settings.draws, self.batch):
                parts.append(_Part(prompt, range(first, min(first + self.batch, settings.draws))))
        lengths = [len(prompts[part.prompt]) + limits[part.prompt] for part in parts]
        rows_of_part = min(self.batch, settings.draws)
        parts_per_batch = max(1, self.batch // rows_of_part)

        # Decide how weights are gathered, and so whether the loop of this class can be used.
        gathering = None
        if shares_prompts(model):
            itemsize = min(p.element_size() for p in model.parameters() if p.is_floating_point())
            rows = parts_per_batch * rows_of_part
            gathering = decide_gathering(
                engine, self.runtime, cache_bytes(model.config, rows, max(lengths, default=0), itemsize)
            )
        if gathering is None or gathering.in_step:
            return self.generate_answers(engine, prompts, settings, seeds=seeds, averaged=False, keep_logprobs=True)

        # Make batches of parts whose answers have the same longest length (`kinds`).
        check_rows("prompt", prompts, position_limit(model.config))
        config = generation_settings(self.generation_config, settings, self.tokenizer)
        end_ids = ending_ids(config)
        objective = GroupAnswers(settings, self.tokenizer, end_ids)
        part_limits = [limits[part.prompt] for part in parts]
        batches = [*sharded_batches(lengths, engine.rank, engine.world_size, size=parts_per_batch, kinds=part_limits)]

        def make_batch(part_numbers: list[int]) -> dict[str, Any]:
            """The prompts of these parts as rows, and for each answer its prompt's row and its seed."""
            batch_parts = [parts[number] for number in part_numbers]
            batch_prompts = [prompts[part.prompt] for part in batch_parts]
            row_prompts: list[int] = []
            row_seeds: list[int] = []
            for prompt_row, part in enumerate(batch_parts):
                row_prompts += [prompt_row] * len(part.draws)
                row_seeds += [seeds[part.prompt][draw] for draw in part.draws]
            return {
                "input_ids": padded(batch_prompts, self.tokenizer.pad_token_id, left=True),
                "attention_mask": mask_of(batch_prompts, left=True),
                "row_prompts": torch.tensor(row_prompts),
                "seeds": torch.tensor(row_seeds),
                "room": part_limits[part_numbers[0]],  # the same in all parts of a batch
            }

        # Write them. An answer's number is prompt * draws + draw.
        own_answers: dict[int, GeneratedAnswer] = {}
        for part_numbers, terms in self.run_batches(
            engine, batches, objective, make_batch, gathering=gathering, averaged=False
        ):
            ids_of_rows = terms["answers"].tolist()
            logprobs = terms["logprobs"].cpu().numpy()
            row_draws: list[tuple[int, int]] = []  # (prompt, draw) of each row of the batch
            for number in part_numbers:
                row_draws += [(parts[number].prompt, draw) for draw in parts[number].draws]
            for row, (prompt, draw) in enumerate(row_draws):
                answer = cut_answer(prompt, draw, ids_of_rows[row], settings.stop, end_ids, self.tokenizer)
                answer = replace(answer, logprobs=logprobs[row, : len(answer.ids)].copy())
                own_answers[prompt * settings.draws + draw] = answer
        return self.gather_by_number(own_answers)


def shares_prompts(model: Any) -> bool:
    """Whether the prompt of a group can be computed once for all its answers, with the loop here instead of `generate`.

    It needs a cache of keys and values from which rows can be selected and repeated, and a forward pass with positions.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    path = getattr(model, "forward_path", STOCK_PATH)
    arguments = inspect.signature(model.forward).parameters
    if path.alone or not path.positions or any(name not in arguments for name in NEEDED_ARGUMENTS):
        return False
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    return kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


class GroupAnswers:
    """Takes the place of the objective in a step module: writes several answers to each prompt of a batch."""

    def __init__(self, settings: DecodingConfig, tokenizer: Any, end_ids: frozenset[int]) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.end_ids = end_ids
        self.stop = StopAtText(tokenizer, settings.stop, 0) if settings.stop else None

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`answers`, int64 [rows, tokens], and `logprobs`, float32 likewise; what follows the end of an answer means nothing.

        `batch["input_ids"]` are the prompts, padded on the left; `row_prompts` says for each row whose it is, `seeds` has its
        seed, and `room` is the largest number of new tokens.
        """
        causal_model: Any = plain_model(model)
        with stock_attention(causal_model):
            return self._write(causal_model, batch)

    def _write(self, causal_model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Sample answers: `answers` int64 [rows, room] and `logprobs` float32 of their tokens, padded after an answer's end.

        `batch` has the prompts, padded on the left; `row_prompts` (int64 [rows]), the prompt that each answer belongs to;
        `seeds`, one an answer; `room`, the most new tokens. Rows whose answers have ended leave the batch in bunches.
        """
        from transformers.cache_utils import DynamicCache

        # One row for each prompt: its keys and values go into the cache.
        cache = DynamicCache(config=causal_model.config)
        mask = batch["attention_mask"]
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        logits = _next_logits(causal_model, batch["input_ids"], mask, positions, cache)

        # From here on a row for each draw: all rows of a prompt take its keys.
        row_prompts = batch["row_prompts"]
        cache.batch_select_indices(row_prompts)
        logits = logits[row_prompts]
        mask = mask[row_prompts]
        lengths = mask.sum(dim=-1)
        room = batch["room"]
        rows = torch.arange(len(row_prompts), device=mask.device)  # those that are still in the batch
        tokens = torch.full((len(rows), room), self.tokenizer.pad_token_id, device=mask.device)
        logprobs = torch.zeros(len(rows), room, device=mask.device)
        has_ended = torch.zeros(len(rows), dtype=torch.bool, device=mask.device)

        # Each pass draws the next token of the answers that have not ended.
        for position in range(room):
            drawn, drawn_logprobs = draw_in_two_levels(
                logits / self.settings.temperature, batch["seeds"][rows], position
            )
            tokens[rows, position] = drawn
            logprobs[rows, position] = drawn_logprobs
            has_ended[rows] |= self._ends(drawn, tokens[rows, : position + 1])
            going = (~has_ended[rows]).nonzero()[:, 0]  # indices into `rows`
            if not len(going) or position + 1 == room:
                break
            if len(going) <= (1 - LEAVING_SHARE) * len(rows):  # enough answers have ended: drop their rows
                cache.batch_select_indices(going)
                rows = rows[going]
                mask = mask[going]
                drawn = drawn[going]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            next_positions = (lengths[rows] + position)[:, None]
            logits = _next_logits(causal_model, drawn[:, None], mask, next_positions, cache)
        return {"answers": tokens, "logprobs": logprobs}

    def _ends(self, drawn: Tensor, answers: Tensor) -> Tensor:
        """bool [rows]: whether an answer ends with the token that was drawn, which is its last one."""
        end_ids = torch.tensor(sorted(self.end_ids), dtype=drawn.dtype, device=drawn.device)
        ends = torch.isin(drawn, end_ids)
        if self.stop is not None:
            ends = ends | self.stop(answers, drawn)
        return ends


def _next_logits(causal_model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """float32 [rows, V]: the logits of the token after `ids`, whose keys the cache takes."""
    outputs = causal_model(
        input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True, logits_to_keep=1
    )
    logits: Tensor = outputs.logits[:, -1].float()
    return logits
