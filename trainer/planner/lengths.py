"""Lengths of the documents that a plan assumes: the longest allowed, or those of the data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.config.run import RunConfig
from trainer.data.batches.mixing import build_order
from trainer.data.batches.order import Order
from trainer.data.config import DataConfig
from trainer.data.store.sequences import TokenDataset
from trainer.objectives.registry import max_generated_tokens

MAX_MICRO_BATCH = 1024
"""Largest micro-batch that a plan considers."""


def micro_batch_divisors(samples_per_rank: int) -> list[int]:
    """Micro-batches that divide a rank's part of a step, ascending."""
    return [micro for micro in range(1, min(samples_per_rank, MAX_MICRO_BATCH) + 1) if samples_per_rank % micro == 0]


@dataclass(frozen=True, slots=True)
class DocumentLengths:
    """Tokens of the units that a run samples: a document (both, of an objective over pairs), or a pack."""

    longest: np.ndarray
    """int64, descending; one entry if all are as long as `data.max_length` allows."""
    mean: float
    mean_square: float
    sequences_per_unit: int = 1
    """2 for an objective over pairs."""
    units_per_epoch: int | None = None
    """None without data."""

    @classmethod
    def uniform(cls, length: int, sequences_per_unit: int) -> DocumentLengths:
        """The lengths to plan with if no data is given: each unit has `sequences_per_unit` sequences of `length` tokens."""
        unit_tokens = length * sequences_per_unit
        return cls(
            longest=np.array([unit_tokens]),
            mean=float(unit_tokens),
            mean_square=float(sequences_per_unit * length**2),
            sequences_per_unit=sequences_per_unit,
        )

    def num_tokens_of_longest(self, count: int) -> float:
        """Tokens of the `count` longest units together: what the worst micro-batch of `count` units holds."""
        if len(self.longest) == 1:
            return float(count * self.longest[0])
        return float(self.longest[:count].sum())

    def units_within(self, tokens: float) -> int:
        """How many of the longest units have at most `tokens` tokens together: the largest micro-batch that memory allows."""
        if len(self.longest) == 1:
            return int(min(tokens // float(self.longest[0]), MAX_MICRO_BATCH))
        return min(int(np.searchsorted(np.cumsum(self.longest), tokens, side="right")), MAX_MICRO_BATCH)


@dataclass(frozen=True, slots=True)
class SampledLengths:
    """The lengths of the units that a run draws from prepared data, and the order in which it draws them."""

    order: Order
    tokens: np.ndarray
    """int64: tokens of each unit."""
    squared_tokens: np.ndarray
    """int64: the sum of the squared lengths of each unit's documents, with which the work of attention grows."""

    @property
    def mean(self) -> float:
        """Tokens of a unit of the first epoch."""
        return float(self.tokens[self.order.units_of_epoch(0)].mean())

    def lengths(self, config: DataConfig, sequences_per_unit: int) -> DocumentLengths:
        """The lengths of the units that the first epoch draws. A pack (several documents in one row) counts as full."""
        epoch_units = self.order.units_of_epoch(0)
        # Another epoch may have fuller packs, so packs count as full.
        longest = np.array([config.max_length]) if config.packing else np.sort(self.tokens)[::-1]
        return DocumentLengths(
            longest, self.mean, float(self.squared_tokens[epoch_units].mean()), sequences_per_unit, self.order.num_units
        )


def sampled_lengths(config: RunConfig, train: TokenDataset, sequences_per_document: int) -> SampledLengths:
    """The lengths of prepared data in the units that a run draws: packs if it packs, else single documents (or pairs).

    If the model generates answers to the documents, each counts with an answer of the greatest length.
    `sequences_per_document`: 2 for an objective over pairs of answers, else 1. Raises what `build_order` raises.
    """
    document_tokens = train.lengths.astype(np.int64) + max_generated_tokens(config.objective)
    packs, order = build_order(config.data, train, sequences_per_document=sequences_per_document, seed=config.run.seed)
    if packs is None:  # each document (or pair) is a unit of its own
        return SampledLengths(order, tokens=document_tokens, squared_tokens=document_tokens**2)
    pack_tokens = np.array([document_tokens[documents].sum() for documents in packs])
    pack_squares = np.array([(document_tokens[documents] ** 2).sum() for documents in packs])
    return SampledLengths(order, tokens=pack_tokens, squared_tokens=pack_squares)
