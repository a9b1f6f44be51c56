"""Units of sampling (a document, a pack, the sequences of one document), and how many of each source make an epoch.

A weight is the share of a source relative to the other weights. The plan is a function of sizes and weights alone,
that of packs one of lengths: no tokens are read. The units are drawn in the order of `trainer.data.batches.order`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from strategies.errors import ConfigError, DataError
from trainer.data.batches.order import GlobalOrder, MixedOrder, Order
from trainer.data.config import DataConfig, EpochEnd, MixingConfig, MixOver
from trainer.data.store.sequences import TokenDataset


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Pack documents into rows (packs) of at most `capacity` tokens, so that few tokens of a row stay unused.

    The longest go first, each into the fullest pack with room. `lengths`: tokens of each document. Returns the document numbers
    of each pack: lengths 3, 6, 4 and 5 with capacity 10 give [[1, 2], [3, 0]]. Deterministic: equal lengths keep their order, and
    of equally full packs the latest is taken. Raises ValueError for a length below 1 or above `capacity`.

    A bitset of the free rooms (tokens left in a pack) finds the best fit by integer arithmetic, so that 50,000 documents take a
    fraction of a second.
    """
    if len(lengths) and (int(lengths.max()) > capacity or int(lengths.min()) < 1):
        raise ValueError(f"lengths must lie in 1..{capacity}, found {int(lengths.min())}..{int(lengths.max())}")
    packs: list[list[int]] = []
    packs_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # free room -> packs that have exactly that
    room_bits = 0  # bit r is set while packs_by_room[r] is not empty
    for document in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        length = int(lengths[document])
        large_enough_bits = room_bits >> length
        if large_enough_bits:
            # The lowest bit that is set is the smallest room in which the document fits: the fullest pack.
            lowest_bit = (large_enough_bits & -large_enough_bits).bit_length() - 1
            room = length + lowest_bit
            pack = packs_by_room[room].pop()
            if not packs_by_room[room]:
                room_bits &= ~(1 << room)
        else:
            room = capacity
            pack = len(packs)
            packs.append([])
        packs[pack].append(document)
        room_left = room - length
        if room_left:
            packs_by_room[room_left].append(pack)
            room_bits |= 1 << room_left
    return packs


MAX_EPOCH_UNITS = 1 << 28
"""Most units of one epoch: its order is held in memory, at 8 bytes a unit and three times that while it is drawn."""


@dataclass(slots=True)
class SourceMix:
    """Decides how many units of each source one epoch holds, from the sizes of the sources and their weights.

    A unit is what is drawn as a whole: a document, a pack, or a pair of answers. All lists are by the source's number.
    """

    source_names: list[str]
    weight_by_source: Sequence[float]
    num_units_by_source: Sequence[int] | np.ndarray
    """Documents, or packs."""
    num_documents_by_source: Sequence[int] | np.ndarray
    """Documents, also those in packs."""
    num_tokens_by_source: Sequence[int] | np.ndarray

    @classmethod
    def from_units(
        cls,
        config: DataConfig,
        source_names: list[str],
        source_of_unit: np.ndarray,
        tokens_of_unit: np.ndarray,
        documents_of_unit: np.ndarray | None = None,
    ) -> SourceMix:
        """Make a mix of a data set: the sizes of its sources are added up over the units (documents or packs) that are drawn.

        The weights are those of `config`. `source_of_unit`: int [units], into `source_names`. `tokens_of_unit`: int [units].
        `documents_of_unit`: int [units], how many documents are in each unit; None: one in each.
        """

        def sum_by_source(amounts: np.ndarray | None) -> np.ndarray:
            """int64 [sources]: the sum of `amounts` over the units of each source; of None, the number of its units."""
            return np.bincount(source_of_unit, amounts, minlength=len(source_names)).astype(np.int64)

        return cls(
            source_names,
            source_weights(config, source_names),
            num_units_by_source=sum_by_source(None),
            num_documents_by_source=sum_by_source(documents_of_unit),
            num_tokens_by_source=sum_by_source(tokens_of_unit),
        )

    def quotas(self, mixing: MixingConfig) -> np.ndarray:
        """Decide how many units (documents or packs) of each source one epoch holds, int64 [sources].

        Two sources of 100 and 300 documents with equal weights give 100 each, or with `EpochEnd.all` 300 each.

        The sources' shares of documents or tokens (`mixing.over`) come as near to the weights as whole units allow, by the
        largest remainder; a source with a weight above 0 gives at least one unit, so that none vanishes by rounding. An epoch
        ends when the first source has been seen once, or all have (`mixing.epoch`). Raises DataError for a weighted source
        without documents or without tokens, ConfigError for an epoch that is too long.
        """
        units_per_length = self._units_per_length_of_epoch(mixing)
        # By source with a weight: the length of an epoch in which all of its units are seen once.
        length_seen_once: dict[str, Fraction] = {}
        for name, num_units, units_of_length_1 in zip(
            self.source_names, self.num_units_by_source, units_per_length, strict=True
        ):
            if units_of_length_1:
                length_seen_once[name] = int(num_units) / units_of_length_1
        choose_length = min if mixing.epoch is EpochEnd.first else max
        epoch_length = choose_length(length_seen_once.values())
        quotas = _round_by_largest_remainder(
            [epoch_length * units_of_length_1 for units_of_length_1 in units_per_length]
        )
        if sum(quotas) > MAX_EPOCH_UNITS:
            smallest = min(length_seen_once, key=lambda name: (length_seen_once[name], name))
            raise ConfigError(
                f"data.mixing.epoch={mixing.epoch}: an epoch would hold {sum(quotas):,} units, more than {MAX_EPOCH_UNITS:,}, "
                f"for {smallest} is repeated until every source has been seen; set data.mixing.epoch=first or weights nearer "
                "to the sizes"
            )
        return np.array(quotas, dtype=np.int64)

    def _units_per_length_of_epoch(self, mixing: MixingConfig) -> list[Fraction]:
        """How many units of each source an epoch of length 1 holds: weight / (documents or tokens in one unit, on average).

        The length of an epoch is its number of documents or tokens (`mixing.over`), divided by the sum of all weights. With
        weights 2 and 1, and packs of 4 and 5 documents: [2/4, 1/5], so that an epoch of length 20 has 10 and 4 packs, of 40 and
        20 documents. A source of weight 0 has 0. Exact, so that rounding to whole units depends on no floating-point error.
        Raises DataError for a source that has a weight, but no documents or no tokens.
        """
        amounts = self.num_tokens_by_source if mixing.over is MixOver.tokens else self.num_documents_by_source
        units_per_length: list[Fraction] = []
        for name, weight, num_units, amount in zip(
            self.source_names, self.weight_by_source, self.num_units_by_source, amounts, strict=True
        ):
            exact_weight = Fraction(repr(float(weight)))  # the decimal number the user wrote
            if exact_weight == 0:
                units_per_length.append(Fraction(0))
                continue
            if num_units < 1 or amount < 1:
                lacking = "documents" if num_units < 1 else str(mixing.over)
                raise DataError(
                    f"data.sources.{name}.weight={float(exact_weight):g}: the source has no {lacking} to mix in; "
                    "set its weight to 0 or look at what cleaning dropped"
                )
            units_per_length.append(exact_weight * int(num_units) / int(amount))
        return units_per_length

    def report_by_source(self, quotas: np.ndarray) -> dict[str, dict[str, float]]:
        """Say for the report, by name of the source, which share of an epoch was requested, and what the source gives.

        `quotas`: units of each source in an epoch. Of a source:
        - `weight` as set, and the share `requested` of an epoch;
        - `units` (documents or packs) of one epoch;
        - means over epochs of `documents` and `tokens`, and their shares of an epoch, `share_documents` and `share_tokens`;
        - `passes`: how often a document is seen in an epoch.
        """
        # All lists are by the source's number.
        passes: list[float] = []
        for quota, num_units in zip(quotas, self.num_units_by_source, strict=True):
            passes.append(int(quota) / int(num_units) if num_units else 0.0)
        documents = [
            num_passes * int(count) for num_passes, count in zip(passes, self.num_documents_by_source, strict=True)
        ]
        tokens = [num_passes * int(count) for num_passes, count in zip(passes, self.num_tokens_by_source, strict=True)]
        column_by_key = {
            "weight": self.weight_by_source,
            "requested": _shares_of_total(self.weight_by_source),
            "units": quotas.tolist(),
            "documents": documents,
            "tokens": tokens,
            "share_documents": _shares_of_total(documents),
            "share_tokens": _shares_of_total(tokens),
            "passes": passes,
        }
        by_name: dict[str, dict[str, float]] = {}
        for source, name in enumerate(self.source_names):
            by_name[name] = {key: column[source] for key, column in column_by_key.items()}
        return by_name


def _round_by_largest_remainder(amounts: list[Fraction]) -> list[int]:
    """Round `amounts` of units to whole numbers with the same (rounded) sum: those with the largest remainders are rounded up.

    An amount above 0 becomes at least 1, so that no source vanishes, by which the sum may grow: [1.6, 2.2, 0.2] -> [2, 2, 1].
    """
    whole = [math.floor(amount) for amount in amounts]
    rounded_sum = math.floor(sum(amounts, Fraction(0)) + Fraction(1, 2))
    # The amounts with the largest remainders are rounded up, as many as the sum lacks: no more than have a remainder, so
    # that an amount of 0 stays 0.
    num_to_round_up = rounded_sum - sum(whole)
    by_remainder = sorted(range(len(amounts)), key=lambda index: (whole[index] - amounts[index], index))
    for index in by_remainder[:num_to_round_up]:
        whole[index] += 1
    return [max(count, 1) if amount else 0 for count, amount in zip(whole, amounts, strict=True)]


def _shares_of_total(amounts: Sequence[float]) -> list[float]:
    """Each amount divided by the sum of all; zeros if the sum is 0."""
    total = math.fsum(amounts)
    if not total:
        return [0.0] * len(amounts)
    return [amount / total for amount in amounts]


def pack_by_source(
    lengths: np.ndarray, source_of_document: np.ndarray, capacity: int
) -> tuple[list[list[int]], np.ndarray]:
    """Pack documents into rows of at most `capacity` tokens, each of one source only, so that sources can be drawn by weight.

    `lengths` (tokens) and `source_of_document` are int [documents]. Returns (document numbers of each pack, source of each pack,
    int64 [packs]). Sources follow one another in the order of their numbers, each packed by `best_fit_decreasing`.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    sources = np.asarray(source_of_document, dtype=np.int64)
    packs: list[list[int]] = []
    source_of_pack: list[int] = []
    for source in np.unique(sources).tolist():
        documents = np.flatnonzero(sources == source)
        document_numbers = documents.tolist()
        # Positions are indices into `documents`.
        for positions in best_fit_decreasing(lengths[documents], capacity):
            packs.append([document_numbers[position] for position in positions])
            source_of_pack.append(source)
    return packs, np.array(source_of_pack, dtype=np.int64)


def source_weights(config: DataConfig, source_names: list[str]) -> list[float]:
    """The weight with which each source in `source_names` is drawn, in their order; empty if no source has a weight.

    Names that are no training source are held-out inputs, which are never drawn: they get 0.
    """
    weights = {name: source.weight for name, source in config.sources.items() if source.weight is not None}
    if not weights:
        return []
    return [weights.get(name, 0.0) for name in source_names]


class SamplingPlan(NamedTuple):
    """What the loader draws samples from."""

    units: list[list[int]] | None
    """Of each unit, the numbers of its sequences: a pack, or a pair of answers. None if each sequence is a unit."""
    order: Order
    """In which units are drawn."""


def build_order(config: DataConfig, train: TokenDataset, *, sequences_per_document: int, seed: int) -> SamplingPlan:
    """Decide what the loader draws from, and in which order.

    A unit is drawn as a whole: a sequence, or sequences that stay together, such as a pack or a pair of answers.
    `sequences_per_document`: 2 for pairs, else 1. With `data.sources.*.weight` the order mixes the sources in these shares.
    Raises ConfigError and DataError for weights of sources that cannot be used.
    """
    has_weights = bool(source_weights(config, train.source_names))
    source_of_unit = train.sources
    units: list[list[int]] | None = None
    if sequences_per_document > 1:  # the sequences of a document follow one another
        units = np.arange(len(train)).reshape(-1, sequences_per_document).tolist()
        source_of_unit = source_of_unit[::sequences_per_document]
    elif config.packing:
        # Without weights a pack may hold documents of several sources: all count as source 0.
        source_of_document = train.sources if has_weights else np.zeros_like(train.sources)
        units, source_of_unit = pack_by_source(train.lengths, source_of_document, config.max_length)
    if not has_weights:
        num_units = len(train) if units is None else len(units)
        return SamplingPlan(units, GlobalOrder(num_units, seed=seed, shuffle=config.shuffle))
    tokens_of_unit: np.ndarray = train.lengths
    documents_of_unit = np.ones(len(train), np.int64)
    if units is not None:
        tokens_of_unit = np.array([train.lengths[unit].sum() for unit in units])
        # A pair of answers is one document with two sequences.
        documents_of_unit = np.array([len(unit) // sequences_per_document for unit in units])
    mix = SourceMix.from_units(config, train.source_names, source_of_unit, tokens_of_unit, documents_of_unit)
    order = MixedOrder(source_of_unit, mix.quotas(config.mixing), seed=seed, shuffle=config.shuffle)
    return SamplingPlan(units, order)
