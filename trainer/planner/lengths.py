"""Lengths of the documents that a plan assumes: the longest allowed, or those of the data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.config.run import RunConfig
from trainer.data.batches.mixing import build_order
from trainer.data.batches.order import Order
from trainer.data.config import DataConfig
from trainer.data.store.sequences import TokenDataset
from trainer.objectives.registry import written_tokens

LARGEST_MICRO = 1024
"""Largest micro-batch that a plan considers."""


def divisors(samples_per_rank: int) -> list[int]:
    """Micro-batches that divide a rank's part of a step, ascending."""
    return [micro for micro in range(1, min(samples_per_rank, LARGEST_MICRO) + 1) if samples_per_rank % micro == 0]


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
        """Without data: as long as `data.max_length` allows, `sequences_per_unit` sequences each."""
        return cls(
            np.array([length * sequences_per_unit]),
            float(length * sequences_per_unit),
            float(sequences_per_unit * length**2),
            sequences_per_unit,
        )

    def tokens_of_longest(self, count: int) -> float:
        """Tokens of the `count` longest units together: what the worst micro-batch of `count` units holds."""
        if len(self.longest) == 1:
            return float(count * self.longest[0])
        return float(self.longest[:count].sum())

    def units_within(self, tokens: float) -> int:
        """How many of the longest units have at most `tokens` tokens together: the largest micro-batch that memory allows."""
        if len(self.longest) == 1:
            return int(min(tokens // float(self.longest[0]), LARGEST_MICRO))
        return min(int(np.searchsorted(np.cumsum(self.longest), tokens, side="right")), LARGEST_MICRO)


@dataclass(frozen=True, slots=True)
class SampledLengths:
    """Prepared data as a run draws it."""

    order: Order
    tokens: np.ndarray
    """int64: tokens of each unit."""
    squares: np.ndarray
    """int64: the sum of the squared lengths of each unit's documents."""

    @property
    def mean(self) -> float:
        """Tokens of a unit of the first epoch."""
        return float(self.tokens[self.order.epoch(0)].mean())

    def lengths(self, config: DataConfig, sequences_per_unit: int) -> DocumentLengths:
        """The lengths of the units that the first epoch draws. A pack (several documents in one row) counts as full."""
        epoch_units = self.order.epoch(0)
        # Another epoch may have fuller packs, so packs count as full.
        longest = np.array([config.max_length]) if config.packing else np.sort(self.tokens)[::-1]
        return DocumentLengths(
            longest, self.mean, float(self.squares[epoch_units].mean()), sequences_per_unit, self.order.num_units
        )


def sampled_lengths(config: RunConfig, train: TokenDataset, sequences_per_document: int) -> SampledLengths:
    """The lengths of prepared data in the units that a run draws: packs if it packs, else single documents (or pairs).

    `sequences_per_document`: 2 for an objective over pairs of answers, else 1. Raises what `build_order` raises.
    """
    # What the model writes is learned behind its prompt: at most as long as it may be.
    lengths = train.lengths.astype(np.int64) + written_tokens(config.objective)
    units, order = build_order(config.data, train, sequences_per_document=sequences_per_document, seed=config.run.seed)
    if units is None:  # each document is drawn alone
        return SampledLengths(order, lengths, lengths**2)
    tokens = np.array([lengths[documents].sum() for documents in units])
    squares = np.array([(lengths[documents] ** 2).sum() for documents in units])
    return SampledLengths(order, tokens, squares)
