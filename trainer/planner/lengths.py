"""Lengths of the documents that a plan assumes: the longest allowed, or those of the data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.config.run import RunConfig
from trainer.data.batches.mixing import build_order
from trainer.data.batches.order import Order
from trainer.data.config import DataConfig
from trainer.data.store.sequences import TokenDataset
from trainer.objectives.registry import data_spec_of, max_generated_tokens

MAX_MICRO_BATCH = 1024
"""Largest micro-batch that a plan considers."""


def micro_batch_divisors(samples_per_rank: int) -> list[int]:
    """Micro-batches that divide a rank's part of a step, ascending."""
    return [
        micro_batch
        for micro_batch in range(1, min(samples_per_rank, MAX_MICRO_BATCH) + 1)
        if samples_per_rank % micro_batch == 0
    ]


@dataclass(frozen=True, slots=True)
class DocumentLengths:
    """Lengths in tokens of a run's samples: what its batch sizes count (units of `Order`).

    A sample is a document (of an objective over pairs: both of its sequences), or a pack of documents in one row.
    """

    longest: np.ndarray
    """int64: tokens of the samples, descending; one entry if all are as long as `data.max_length` allows."""
    mean: float
    """Mean tokens of a sample."""
    mean_square: float
    """Mean over the samples of the sum of their sequences' squared lengths, with which the FLOPs of attention grow."""
    sequences_per_sample: int = 1
    """2 for an objective over pairs."""
    samples_per_epoch: int | None = None
    """None without data."""

    @classmethod
    def uniform(cls, length: int, sequences_per_sample: int) -> DocumentLengths:
        """The lengths to plan with if no data is given: each sample has `sequences_per_sample` sequences of `length` tokens."""
        sample_tokens = length * sequences_per_sample
        return cls(
            longest=np.array([sample_tokens]),
            mean=float(sample_tokens),
            mean_square=float(sequences_per_sample * length**2),
            sequences_per_sample=sequences_per_sample,
        )

    def num_tokens_of_longest(self, num_samples: int) -> float:
        """Tokens of the `num_samples` longest samples together: what the worst micro-batch of `num_samples` samples holds."""
        if len(self.longest) == 1:
            return float(num_samples * self.longest[0])
        return float(self.longest[:num_samples].sum())

    def size_of_longest(self, num_samples: int, *, in_rows: bool) -> float:
        """The size of a micro-batch of the `num_samples` longest samples, as a cost model counts it: in rows, or in tokens."""
        return float(num_samples) if in_rows else self.num_tokens_of_longest(num_samples)

    def num_samples_within(self, tokens: float) -> int:
        """How many of the longest samples have at most `tokens` tokens together: the largest micro-batch that memory allows.

        At most `MAX_MICRO_BATCH`.
        """
        if len(self.longest) == 1:
            return int(min(tokens // float(self.longest[0]), MAX_MICRO_BATCH))
        return min(int(np.searchsorted(np.cumsum(self.longest), tokens, side="right")), MAX_MICRO_BATCH)


@dataclass(frozen=True, slots=True)
class SampledLengths:
    """The lengths of the samples that a run draws from prepared data, and the order in which it draws them."""

    order: Order
    tokens: np.ndarray
    """int64: tokens of each sample."""
    squared_tokens: np.ndarray
    """int64: the sum of the squared lengths of each sample's documents, with which the FLOPs of attention grow."""

    @property
    def mean(self) -> float:
        """Mean tokens of a sample of the first epoch."""
        return float(self.tokens[self.order.units_of_epoch(0)].mean())

    def lengths(self, config: DataConfig, sequences_per_sample: int) -> DocumentLengths:
        """Summarise the lengths of the samples that the first epoch draws, for a plan: the longest by memory, the mean by time.

        A pack (several documents in one row) counts as full. `sequences_per_sample`: 2 for an objective over pairs, else 1.
        """
        epoch_samples = self.order.units_of_epoch(0)
        # Another epoch may have fuller packs, so packs count as full.
        longest = np.array([config.max_length]) if config.packing else np.sort(self.tokens)[::-1]
        return DocumentLengths(
            longest=longest,
            mean=self.mean,
            mean_square=float(self.squared_tokens[epoch_samples].mean()),
            sequences_per_sample=sequences_per_sample,
            samples_per_epoch=self.order.num_units,
        )


def lengths_of_data(config: RunConfig, train: TokenDataset) -> DocumentLengths:
    """The lengths of the samples that a run draws from its prepared data in the first epoch."""
    sequences_per_document = data_spec_of(config.objective).sequences_per_document
    samples = sampled_lengths(config, train, sequences_per_document)
    return samples.lengths(config.data, sequences_per_document)


def sampled_lengths(config: RunConfig, train: TokenDataset, sequences_per_document: int) -> SampledLengths:
    """Find how long the samples of a run are: packs of documents if it packs, else single documents (or pairs of answers).

    `train`: the prepared data, with the length of each sequence. If the model generates answers to the documents, each counts
    with an answer of the greatest length. `sequences_per_document`: 2 for an objective over pairs of answers, else 1. Raises what
    `build_order` raises.
    """
    # `max_generated_tokens` is 0 for objectives without generation.
    sequence_tokens = train.lengths.astype(np.int64) + max_generated_tokens(config.objective)
    # `samples`: for each, the indices of its sequences in the data.
    samples, order = build_order(
        config.data, train, sequences_per_document=sequences_per_document, seed=config.run.seed
    )
    if samples is None:  # each sequence is a sample of its own
        return SampledLengths(order, tokens=sequence_tokens, squared_tokens=sequence_tokens**2)
    sample_tokens = np.array([sequence_tokens[sequences].sum() for sequences in samples])
    sample_squares = np.array([(sequence_tokens[sequences] ** 2).sum() for sequences in samples])
    return SampledLengths(order, tokens=sample_tokens, squared_tokens=sample_squares)
