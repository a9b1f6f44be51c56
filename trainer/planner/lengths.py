"""Lengths of the documents that a plan assumes: the longest allowed, or those of the data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.config.run import RunConfig
from trainer.data.batches.mixing import build_order
from trainer.data.batches.order import Order
from trainer.data.config import DataConfig
from trainer.data.store.sequences import TokenDataset

MOST_MICRO = 1024
"""Largest micro-batch that is looked at."""


def divisors(part: int) -> list[int]:
    """Micro-batches that divide a rank's part of a step, ascending."""
    return [micro for micro in range(1, min(part, MOST_MICRO) + 1) if part % micro == 0]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of what is drawn as one: a document (of an objective over pairs, both), or a pack."""

    longest: np.ndarray
    """int64, descending; of one entry where all are as long as they may be."""
    mean: float
    mean_squares: float
    per: int = 1
    """Sequences of each."""
    number: int | None = None
    """How many an epoch has; None without data."""

    @classmethod
    def all_of(cls, length: int, per: int) -> Lengths:
        """Without data: as long as `data.max_length` allows, `per` sequences each."""
        return cls(np.array([length * per]), float(length * per), float(per * length**2), per)

    def most(self, number: int) -> float:
        """Tokens of the `number` longest."""
        if len(self.longest) == 1:
            return float(number * self.longest[0])
        return float(self.longest[:number].sum())

    def holding(self, tokens: float) -> int:
        """How many of the longest are together at most so many tokens."""
        if len(self.longest) == 1:
            return int(min(tokens // float(self.longest[0]), MOST_MICRO))
        return min(int(np.searchsorted(np.cumsum(self.longest), tokens, side="right")), MOST_MICRO)


@dataclass(frozen=True, slots=True)
class DrawnLengths:
    """Prepared data as a run draws it."""

    order: Order
    tokens: np.ndarray
    """int64, of each unit that is drawn as one."""
    squares: np.ndarray
    """int64, of each unit the sum of its documents' squared lengths."""

    @property
    def mean(self) -> float:
        """Tokens of a unit of the first epoch."""
        return float(self.tokens[self.order.epoch(0)].mean())

    def lengths(self, config: DataConfig, per: int) -> Lengths:
        """For `per` sequences each; packs are as long as they may be."""
        drawn = self.order.epoch(0)
        longest = np.array([config.max_length]) if config.packing else np.sort(self.tokens)[::-1]
        return Lengths(longest, self.mean, float(self.squares[drawn].mean()), per, self.order.num_units)


def drawn(config: RunConfig, train: TokenDataset, per: int) -> DrawnLengths:
    """How a run draws `train`, whose documents have `per` sequences each. Errors: those of `build_order`."""
    lengths = train.lengths.astype(np.int64)
    units, order = build_order(config.data, train, sequences_per_document=per, seed=config.run.seed)
    if units is None:
        return DrawnLengths(order, lengths, lengths**2)
    tokens = np.array([lengths[unit].sum() for unit in units])
    return DrawnLengths(order, tokens, np.array([(lengths[unit] ** 2).sum() for unit in units]))
