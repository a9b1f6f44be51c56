"""Deals the answers of a step to ranks and micro-batches, by their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.data.batches.cutting import Cut
from trainer.data.batches.order import assign_to_slots
from trainer.data.batches.prefetch import pin_batch
from trainer.objectives.answers import AnswerCollator, AnswerSample


@dataclass(frozen=True, slots=True)
class DealtMicroBatch:
    """One micro-batch of this reader, on the CPU."""

    batch: dict[str, Any]
    positions: list[int | None]
    """Which of the dealt answers its sequences are; None for one that only fills up."""


@dataclass(frozen=True, slots=True)
class Dealer:
    """How answers are divided among readers and micro-batches. Every rank deals all answers of a step alike."""

    micro_batch: int
    """Most answers in one forward pass of one reader."""
    reader: int
    readers: int
    cut: Cut | None
    collator: AnswerCollator
    device: torch.device
    shares_prompts: bool = False
    """Whether answers to one prompt lie behind it once, in one micro-batch as far as that holds them."""

    def num_micro_batches(self, num_answers: int, group_size: int) -> int:
        """Micro-batches of each reader for so many answers, `group_size` to a prompt; at least one."""
        if not self.shares_prompts:
            return max(1, -(-num_answers // (self.micro_batch * self.readers)))
        parts, size = self._parts_of_group(group_size)
        num_parts = -(-num_answers // group_size) * parts
        return max(1, -(-num_parts // (self.micro_batch // size * self.readers)))

    def _parts_of_group(self, group_size: int) -> tuple[int, int]:
        """(parts that a group is divided into, answers of the largest part): as few as micro-batches hold."""
        parts = -(-group_size // self.micro_batch)
        return parts, -(-group_size // parts)

    def deal(self, samples: Sequence[AnswerSample], filler: AnswerSample) -> tuple[list[DealtMicroBatch], float]:
        """Spread the answers of a step over the ranks that read rows of their own (readers), so that all take about as long.

        Returns (this reader's micro-batches, balance of the whole step: mean over the readers' costs as a share of the highest,
        which is 1.0 if all take equally long). Answers that share a prompt's computation stay together as a unit. Every reader
        gets as many micro-batches as the others; one without an answer has only `filler`, whose tokens have no target.
        """
        # A unit is a list of positions in `samples`, a slot the units of one micro-batch.
        units = self._units(samples)
        costs = np.array([self._cost(samples, unit) for unit in units], dtype=np.int64)  # tokens of each unit
        per_slot = self.micro_batch // max(map(len, units), default=1)
        num_slots = max(1, -(-len(units) // (per_slot * self.readers))) * self.readers
        # Sorted by load, so that the readers' m-th micro-batches weigh about the same and none waits long.
        slots = assign_to_slots(costs, num_slots, per_slot)
        loads = np.array([costs[slot].sum() for slot in slots], dtype=np.float64).reshape(-1, self.readers)
        balance = float(loads.mean(axis=1).sum() / max(1.0, loads.max(axis=1).sum()))

        own_micro_batches = []
        for slot in slots[self.reader :: self.readers]:
            positions: list[int] = []
            for unit in slot:
                positions += units[unit]
            own_micro_batches.append(self._collate(samples, positions, filler))
        return own_micro_batches, balance

    def _units(self, samples: Sequence[AnswerSample]) -> list[list[int]]:
        """Positions in `samples` of the answers that stay in one micro-batch: each alone, or those to one prompt.

        Answers to one prompt are together if the model computes their prompt once; a large group is split in parts that fit.
        """
        if not self.shares_prompts:
            return [[position] for position in range(len(samples))]
        by_prompt: dict[int, list[int]] = {}
        for position, sample in enumerate(samples):
            by_prompt.setdefault(sample.prompt, []).append(position)
        units: list[list[int]] = []
        for positions in by_prompt.values():
            _, size = self._parts_of_group(len(positions))
            units += [positions[start : start + size] for start in range(0, len(positions), size)]
        return units

    def _cost(self, samples: Sequence[AnswerSample], unit: list[int]) -> int:
        """Tokens that are computed for a unit."""
        first = samples[unit[0]]
        tokens = len(first.input_ids)
        for position in unit[1:]:
            tokens += len(samples[position].input_ids) - first.answer_begin()
        return tokens

    def _collate(self, samples: Sequence[AnswerSample], slot: list[int], filler: AnswerSample) -> DealtMicroBatch:
        """The micro-batch of the answers at these positions."""
        if not slot:
            blank = self.collator.without_targets(filler)
            return DealtMicroBatch(pin_batch(self.collator([blank], self.cut), self.device), [None])
        dealt = [samples[position] for position in slot]
        batch = self.collator.with_shared_prompts(dealt) if self.shares_prompts else self.collator(dealt, self.cut)
        return DealtMicroBatch(pin_batch(batch, self.device), [*slot])

    def local_tokens(self, dealt: Sequence[DealtMicroBatch]) -> int:
        """Tokens that this rank computes, fillers included."""
        tokens = 0
        for micro_batch in dealt:
            mask = micro_batch.batch.get("attention_mask")
            ids = micro_batch.batch["input_ids"]
            tokens += ids.numel() if mask is None else int(mask.sum())
        return tokens
