"""Divides the answers of a step among ranks and micro-batches, so that all take about as many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from trainer.data.batches.cutting import RowCut
from trainer.data.batches.order import assign_to_slots
from trainer.data.batches.prefetch import pin_batch
from trainer.objectives.answers import AnswerCollator, AnswerSample


@dataclass(frozen=True, slots=True)
class AnswerMicroBatch:
    """One micro-batch of this rank, on the CPU."""

    batch: dict[str, Any]
    answer_indices: list[int | None]
    """For each sequence of the batch, the index of its answer among the samples of the step; None for a filler."""


class RankShare(NamedTuple):
    """What one rank computes of a step."""

    micro_batches: list[AnswerMicroBatch]
    balance: float
    """Mean of the ranks' tokens as a share of the highest, summed over micro-batches: 1.0 if no rank waits for another."""


class GroupChunks(NamedTuple):
    """How a group of answers to one prompt is divided so that each chunk fits into a micro-batch."""

    num_chunks: int
    chunk_size: int
    """Answers of the largest chunk."""


@dataclass(frozen=True, slots=True)
class AnswerBatcher:
    """Divides answers among data-parallel ranks and micro-batches. Every rank divides all answers of a step alike."""

    micro_batch: int
    """Most answers in one forward pass of one data-parallel rank."""
    dp_rank: int
    dp_size: int
    """Data-parallel ranks; those that split rows of tokens (`parallel.sequence`) count as one."""
    cut: RowCut | None
    """Which slice of each row this rank has, if ranks split rows."""
    collator: AnswerCollator
    device: torch.device
    shares_prompts: bool = False
    """Whether the model computes a prompt once for all of its answers in a micro-batch."""

    def num_micro_batches(self, num_answers: int, group_size: int) -> int:
        """How many micro-batches each data-parallel rank has in a step; at least one.

        `num_answers`: of the step, with `group_size` to each prompt.
        """
        if not self.shares_prompts:
            return max(1, _rounded_up_quotient(num_answers, self.micro_batch * self.dp_size))
        chunks = self._chunks_of_group(group_size)
        num_chunks = _rounded_up_quotient(num_answers, group_size) * chunks.num_chunks
        chunks_per_micro_batch = self.micro_batch // chunks.chunk_size
        return max(1, _rounded_up_quotient(num_chunks, chunks_per_micro_batch * self.dp_size))

    def _chunks_of_group(self, group_size: int) -> GroupChunks:
        """The fewest chunks of about equal size into which a group is divided so that each fits into a micro-batch.

        10 answers with micro-batches of 4 -> 3 chunks of at most 4.
        """
        num_chunks = _rounded_up_quotient(group_size, self.micro_batch)
        return GroupChunks(num_chunks, chunk_size=_rounded_up_quotient(group_size, num_chunks))

    def divide(self, samples: Sequence[AnswerSample], filler: AnswerSample) -> RankShare:
        """Divide the answers of a step, so that all ranks take about as many tokens; returns this rank's micro-batches.

        Answers that share a prompt's computation stay in one micro-batch. Every rank has the same number of micro-batches, since
        each forward pass is collective. One without an answer has only `filler`, whose tokens have no target.
        """
        # A unit is the answers that stay together; a slot is the units of one micro-batch.
        units = self._units_kept_together(samples)
        unit_tokens = np.array([self._num_tokens_of_unit(samples, unit) for unit in units], dtype=np.int64)
        # As many as fit if each unit were as large as the largest: `assign_to_slots` counts units, not answers.
        units_per_slot = self.micro_batch // max(map(len, units), default=1)
        num_slots = max(1, _rounded_up_quotient(len(units), units_per_slot * self.dp_size)) * self.dp_size
        # `assign_to_slots` sorts slots by their tokens, so the micro-batches that ranks compute at the same time have about as
        # many.
        slots = assign_to_slots(unit_tokens, num_slots, units_per_slot)
        slot_tokens = np.array([unit_tokens[slot].sum() for slot in slots], dtype=np.float64)
        tokens_by_rank = slot_tokens.reshape(-1, self.dp_size)  # [micro-batches, ranks]
        balance = float(tokens_by_rank.mean(axis=1).sum() / max(1.0, tokens_by_rank.max(axis=1).sum()))

        local_micro_batches = []
        for slot in slots[self.dp_rank :: self.dp_size]:
            answer_indices: list[int] = []
            for unit in slot:
                answer_indices += units[unit]
            local_micro_batches.append(self._collate(samples, answer_indices, filler))
        return RankShare(local_micro_batches, balance)

    def _units_kept_together(self, samples: Sequence[AnswerSample]) -> list[list[int]]:
        """The units of a step, that is answers that stay in one micro-batch: for each, their indices in `samples`.

        - The model does not share prompts: each answer alone.
        - It does: all answers to a prompt, or chunks of them if they are more than a micro-batch holds.
        """
        if not self.shares_prompts:
            return [[index] for index in range(len(samples))]
        indices_by_prompt: dict[int, list[int]] = {}
        for index, sample in enumerate(samples):
            indices_by_prompt.setdefault(sample.prompt_index, []).append(index)
        units: list[list[int]] = []
        for indices in indices_by_prompt.values():
            chunk_size = self._chunks_of_group(len(indices)).chunk_size
            units += [indices[start : start + chunk_size] for start in range(0, len(indices), chunk_size)]
        return units

    def _num_tokens_of_unit(self, samples: Sequence[AnswerSample], unit: list[int]) -> int:
        """Tokens that are computed for a unit: the prompt once, and each answer."""
        first = samples[unit[0]]
        num_tokens = len(first.input_ids)
        for index in unit[1:]:
            num_tokens += len(samples[index].input_ids) - first.answer_begin()
        return num_tokens

    def _collate(
        self, samples: Sequence[AnswerSample], answer_indices: list[int], filler: AnswerSample
    ) -> AnswerMicroBatch:
        """Make the micro-batch of the answers with these indices; of `filler` without targets if there are none.

        `answer_indices` of the result has None for a sequence that is no answer.
        """
        if not answer_indices:
            blank_sample = self.collator.without_targets(filler)
            filler_batch = pin_batch(self.collator([blank_sample], self.cut), self.device)
            return AnswerMicroBatch(filler_batch, answer_indices=[None])  # its sequence is no answer
        answer_samples = [samples[index] for index in answer_indices]
        if self.shares_prompts:  # then no ranks split rows, so that there is nothing to cut
            batch = self.collator.collate_with_shared_prompts(answer_samples)
        else:
            batch = self.collator(answer_samples, self.cut)
        return AnswerMicroBatch(pin_batch(batch, self.device), list(answer_indices))

    def num_local_tokens(self, micro_batches: Sequence[AnswerMicroBatch]) -> int:
        """Tokens that this rank computes in these micro-batches, fillers included and padding excluded."""
        num_tokens = 0
        for micro_batch in micro_batches:
            mask = micro_batch.batch.get("attention_mask")  # missing if there is no padding
            ids = micro_batch.batch["input_ids"]
            num_tokens += ids.numel() if mask is None else int(mask.sum())
        return num_tokens


def _rounded_up_quotient(number: int, divisor: int) -> int:
    """The quotient in whole numbers, rounded up: 7 and 3 -> 3."""
    return -(-number // divisor)
