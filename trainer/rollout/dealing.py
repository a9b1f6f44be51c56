"""Deals the answers of a step to ranks and micro-batches, by their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.data.batches.cutting import Cut
from trainer.data.batches.order import deal
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

    def num_micro_batches(self, num_answers: int) -> int:
        """Micro-batches of each reader for so many answers; at least one."""
        return max(1, -(-num_answers // (self.micro_batch * self.readers)))

    def deal(self, samples: Sequence[AnswerSample], filler: AnswerSample) -> tuple[list[DealtMicroBatch], float]:
        """(the micro-batches of this reader, the balance of the whole step as `StepBatch.balance` has it).

        Every reader gets as many micro-batches as the others. One without an answer gets `filler` with nothing to learn.
        """
        costs = np.array([len(sample.input_ids) for sample in samples], dtype=np.int64)
        num_slots = self.num_micro_batches(len(samples)) * self.readers
        # Sorted by load, so that the readers' m-th micro-batches weigh about the same and none waits long.
        slots = deal(costs, num_slots, self.micro_batch)
        loads = np.array([costs[slot].sum() for slot in slots], dtype=np.float64).reshape(-1, self.readers)
        balance = float(loads.mean(axis=1).sum() / max(1.0, loads.max(axis=1).sum()))
        return [self._collate(samples, slot, filler) for slot in slots[self.reader :: self.readers]], balance

    def _collate(self, samples: Sequence[AnswerSample], slot: list[int], filler: AnswerSample) -> DealtMicroBatch:
        """The micro-batch of the answers at these positions."""
        if not slot:
            blank = self.collator.blank(filler)
            return DealtMicroBatch(pin_batch(self.collator([blank], self.cut), self.device), [None])
        batch = self.collator([samples[position] for position in slot], self.cut)
        return DealtMicroBatch(pin_batch(batch, self.device), [*slot])

    def local_tokens(self, dealt: Sequence[DealtMicroBatch]) -> int:
        """Tokens that this rank computes, fillers included."""
        tokens = 0
        for micro_batch in dealt:
            mask = micro_batch.batch.get("attention_mask")
            ids = micro_batch.batch["input_ids"]
            tokens += ids.numel() if mask is None else int(mask.sum())
        return tokens
