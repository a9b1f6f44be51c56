"""Units of sampling (a document, a pack, the sequences of one document), and how many of each source make an epoch.

A weight is the share of a source relative to the other weights. The plan is a function of sizes and weights alone,
that of packs one of lengths: no tokens are read. The units are drawn in the order of `trainer.data.batches.order`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from strategies.errors import ConfigError, DataError
from trainer.data.batches.order import GlobalOrder, MixedOrder, Order
from trainer.data.config import DataConfig, EpochEnd, MixingConfig, MixOver
from trainer.data.store.sequences import TokenDataset


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Packs of document numbers, each at most `capacity` tokens: longest first, into the fullest pack with room.

    Deterministic: equal lengths keep their order, and of equally full packs the latest is taken. A bitset of the free
    rooms in use finds the best fit, so that 50,000 documents take a fraction of a second.
    """
    if len(lengths) and (int(lengths.max()) > capacity or int(lengths.min()) < 1):
        raise ValueError(f"lengths must lie in 1..{capacity}, found {int(lengths.min())}..{int(lengths.max())}")
    packs: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # free room -> packs that have exactly that
    rooms = 0  # bit r is set while with_room[r] is not empty
    for document in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        length = int(lengths[document])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(document)
        left = room - length
        if left:
            with_room[left].append(pack)
            rooms |= 1 << left
    return packs


MAX_EPOCH_UNITS = 1 << 28
"""Most units of one epoch: its order is held in memory, at 8 bytes a unit and three times that while it is drawn."""


@dataclass(slots=True)
class Mix:
    """What the sources of a data set hold, and the weights with which they are mixed; each by the number of the source."""

    names: list[str]
    weights: Sequence[float]
    units: Sequence[int] | np.ndarray
    """Documents, or packs."""
    documents: Sequence[int] | np.ndarray
    """Documents, also those in packs."""
    tokens: Sequence[int] | np.ndarray

    @classmethod
    def of(
        cls,
        config: DataConfig,
        names: list[str],
        sources: np.ndarray,
        tokens: np.ndarray,
        documents: np.ndarray | None = None,
    ) -> Mix:
        """The mix of units with these sources, tokens, and documents in each (None: one), int [units]."""
        units, held, each = (
            np.bincount(sources, amounts, minlength=len(names)).astype(np.int64)
            for amounts in (None, tokens, documents)
        )
        return cls(names, source_weights(config, names), units, each, held)

    def quotas(self, mixing: MixingConfig) -> np.ndarray:
        """Units of each source in one epoch, int64 [S].

        The shares over documents or tokens come as near to the weights as whole units allow, by the largest remainder; a
        source with a weight above 0 gives at least one unit, so that none vanishes by rounding. Raises DataError for a
        weighted source without documents or without tokens, ConfigError for an epoch that is too long.
        """
        sizes = [int(size) for size in self.units]
        shares = [Fraction(repr(float(weight))) for weight in self.weights]  # the decimal number the user wrote
        held = self.tokens if mixing.over is MixOver.tokens else self.documents
        for name, share, size, amount in zip(self.names, shares, sizes, held, strict=True):
            if share and (size < 1 or amount < 1):
                lacking = "documents" if size < 1 else str(mixing.over)
                raise DataError(
                    f"data.sources.{name}.weight={float(share):g}: the source has no {lacking} to mix in; "
                    "set its weight to 0 or look at what cleaning dropped"
                )
        # Units of each source per unit of epoch length: its share, divided by what one of its units holds on average.
        rates = [
            share * size / int(amount) if share else share
            for share, size, amount in zip(shares, sizes, held, strict=True)
        ]
        # The lengths of an epoch in which each has been seen once.
        lengths = {name: size / rate for name, size, rate in zip(self.names, sizes, rates, strict=True) if rate}
        length = min(lengths.values()) if mixing.epoch is EpochEnd.first else max(lengths.values())
        quota = _round_to_whole([length * rate for rate in rates])
        if sum(quota) > MAX_EPOCH_UNITS:
            small = min(lengths, key=lambda name: (lengths[name], name))
            raise ConfigError(
                f"data.mixing.epoch={mixing.epoch}: an epoch would hold {sum(quota):,} units, more than {MAX_EPOCH_UNITS:,}, for "
                f"{small} is repeated until every source has been seen; set data.mixing.epoch=first or weights nearer to the "
                "sizes"
            )
        return np.array(quota, dtype=np.int64)

    def realised(self, quota: np.ndarray) -> dict[str, dict[str, float]]:
        """Requested against realised shares of each source, by name; `quota` is the answer of `quotas`.

        Of a source: its `weight` as set, the share `requested` of an epoch, `units` (documents or packs) of one, means over
        epochs of `documents` and `tokens`, `share_documents` and `share_tokens`, and `passes`: how often a document is seen
        in an epoch.
        """
        passes = [int(number) / int(size) if size else 0.0 for number, size in zip(quota, self.units, strict=True)]
        documents = [rate * int(number) for rate, number in zip(passes, self.documents, strict=True)]
        tokens = [rate * int(number) for rate, number in zip(passes, self.tokens, strict=True)]
        columns = {
            "weight": self.weights,
            "requested": _shares(self.weights),
            "units": quota.tolist(),
            "documents": documents,
            "tokens": tokens,
            "share_documents": _shares(documents),
            "share_tokens": _shares(tokens),
            "passes": passes,
        }
        return {
            name: {key: column[source] for key, column in columns.items()} for source, name in enumerate(self.names)
        }


def _round_to_whole(wanted: list[Fraction]) -> list[int]:
    """Whole numbers of nearly the same sum as `wanted`, by the largest remainder, but at least 1 where it is not 0."""
    floors = [math.floor(number) for number in wanted]
    missing = math.floor(sum(wanted, Fraction(0)) + Fraction(1, 2)) - sum(floors)
    by_remainder = sorted(range(len(wanted)), key=lambda source: (floors[source] - wanted[source], source))
    for source in by_remainder[:missing]:
        floors[source] += 1
    return [max(floor, 1) if number else 0 for floor, number in zip(floors, wanted, strict=True)]


def _shares(amounts: Sequence[float]) -> list[float]:
    total = math.fsum(amounts)
    return [amount / total if total else 0.0 for amount in amounts]


def pack_by_source(
    lengths: np.ndarray, source_of_document: np.ndarray, capacity: int
) -> tuple[list[list[int]], np.ndarray]:
    """Packs of document numbers in which every pack has documents of one source only, and the source of each pack.

    `lengths` and `source_of_document` are int [documents]; the sources come back as int64 [packs]. Sources follow one
    another in the order of their numbers, each packed as `best_fit_decreasing` packs it alone.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    sources = np.asarray(source_of_document, dtype=np.int64)
    packs: list[list[int]] = []
    source_of_pack = []
    for source in np.unique(sources):
        members = np.flatnonzero(sources == source)
        number = members.tolist()
        plan = best_fit_decreasing(lengths[members], capacity)
        packs.extend([number[position] for position in pack] for pack in plan)
        source_of_pack.append(np.full(len(plan), source, dtype=np.int64))
    return packs, np.concatenate(source_of_pack) if source_of_pack else np.zeros(0, dtype=np.int64)


def source_weights(config: DataConfig, names: list[str]) -> list[float]:
    """The weight of each source by name, all of which have one; empty without weights. Held-out inputs, never drawn, have 0."""
    weights = {name: source.weight for name, source in config.sources.items() if source.weight is not None}
    return [weights.get(name, 0.0) for name in names] if weights else []


def build_order(
    config: DataConfig, train: TokenDataset, *, sequences_per_document: int, seed: int
) -> tuple[list[list[int]] | None, Order]:
    """The sequences that stay together (packs, pairs of answers; None: each alone), and the order in which units are drawn.

    Raises ConfigError and DataError for weights of sources that cannot be used.
    """
    sources, per, shuffle = train.sources, sequences_per_document, config.shuffle
    weights = source_weights(config, train.source_names)
    packs: list[list[int]] | None = None
    if per > 1:
        packs, sources = np.arange(len(train)).reshape(-1, per).tolist(), sources[::per]
    elif config.packing:
        packs, sources = pack_by_source(train.lengths, sources if weights else sources * 0, config.max_length)
    if not weights:
        return packs, GlobalOrder(len(train) if packs is None else len(packs), seed=seed, shuffle=shuffle)
    unit_tokens = train.lengths if packs is None else np.array([train.lengths[pack].sum() for pack in packs])
    unit_documents = np.ones(len(train), np.int64) if packs is None else np.array([len(pack) // per for pack in packs])
    mix = Mix.of(config, train.source_names, sources, unit_tokens, unit_documents)
    return packs, MixedOrder(sources, mix.quotas(config.mixing), seed=seed, shuffle=shuffle)
