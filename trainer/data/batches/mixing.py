"""Mixing of sources: how many documents or packs of each source make an epoch, and what shares come of it.

A weight is the share that a source is to have, relative to the other weights. The plan is a function of sizes and
weights alone; the order in which the units are then drawn is `trainer.data.batches.order.MixedOrder`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TypedDict

import numpy as np

from strategies.errors import ConfigError, DataError
from trainer.data.batches.pack import best_fit_decreasing
from trainer.data.config import EpochEnd, MixOver

Weights = Sequence[float | None]
"""One weight a source, at least 0; or None for every source, which leaves the data unmixed."""

LONGEST_EPOCH = 1 << 28
"""Most units of one epoch: its order is held in memory, at 8 bytes a unit and three times that while it is drawn."""


class SourceShare(TypedDict):
    """What one source gives to an epoch. Numbers of documents and tokens are means over epochs."""

    weight: float | None
    """The weight as set; None without mixing."""
    requested: float
    """Share of the epoch asked for by the weights, over documents or tokens as `data.mixing.over` says."""
    units: int
    """Documents (packs) an epoch."""
    documents: float
    tokens: float
    share_documents: float
    share_tokens: float
    passes: float
    """How often a document of the source is seen in one epoch; 0.1 is once in ten epochs."""


def quotas(
    units: Sequence[int] | np.ndarray,
    tokens: Sequence[int] | np.ndarray,
    weights: Weights,
    over: MixOver = MixOver.documents,
    epoch: EpochEnd = EpochEnd.first,
    *,
    documents: Sequence[int] | np.ndarray | None = None,
    names: Sequence[str] | None = None,
) -> np.ndarray:
    """Units of each source in one epoch, int64 [S].

    `units` are the documents or packs of each source, `tokens` what they hold, `documents` how many documents the packs
    hold (by default a unit is a document). The shares over documents or tokens come as near to the weights as whole
    units allow, by the largest remainder; a source with a weight above 0 gives at least one unit, so that none
    vanishes by rounding. Raises ConfigError for weights that cannot be used, DataError for a weighted source without
    documents or without tokens.
    """
    sizes = [int(size) for size in units]
    called = _names(names, len(sizes))
    if _is_natural(weights, called):
        return np.array(sizes, dtype=np.int64)
    shares = [Fraction(repr(float(weight or 0.0))) for weight in weights]  # the decimal number the user wrote
    held = tokens if over is MixOver.tokens else sizes if documents is None else documents
    for name, share, size, amount in zip(called, shares, sizes, held, strict=True):
        if share and (size < 1 or amount < 1):
            lacking = "documents" if size < 1 else str(over)
            raise DataError(
                f"data.sources.{name}.weight={float(share):g}: the source has no {lacking} to mix in; "
                "set its weight to 0 or look at what cleaning dropped"
            )
    # Units of each source per unit of epoch length: its share, divided by what one of its units holds on average.
    rates = [
        share * size / int(amount) if share else share for share, size, amount in zip(shares, sizes, held, strict=True)
    ]
    lengths = [size / rate for size, rate in zip(sizes, rates, strict=True) if rate]  # where each has been seen once
    weighted = [name for name, rate in zip(called, rates, strict=True) if rate]
    length = min(lengths) if epoch is EpochEnd.first else max(lengths)
    quota = _whole([length * rate for rate in rates])
    if sum(quota) > LONGEST_EPOCH:
        small = min((length, name) for length, name in zip(lengths, weighted, strict=True))[1]
        raise ConfigError(
            f"data.mixing.epoch={epoch}: an epoch would hold {sum(quota):,} units, more than {LONGEST_EPOCH:,}, for {small} is "
            "repeated until every source has been seen; set data.mixing.epoch=first or weights nearer to the sizes"
        )
    return np.array(quota, dtype=np.int64)


def _whole(wanted: list[Fraction]) -> list[int]:
    """Whole numbers of nearly the same sum as `wanted`, by the largest remainder, but at least 1 where it is not 0."""
    floors = [math.floor(number) for number in wanted]
    missing = math.floor(sum(wanted, Fraction(0)) + Fraction(1, 2)) - sum(floors)
    by_remainder = sorted(range(len(wanted)), key=lambda source: (floors[source] - wanted[source], source))
    for source in by_remainder[:missing]:
        floors[source] += 1
    return [max(floor, 1) if number else 0 for floor, number in zip(floors, wanted, strict=True)]


def _names(names: Sequence[str] | None, number: int) -> list[str]:
    return [str(source) for source in range(number)] if names is None else list(names)


def _is_natural(weights: Weights, names: list[str]) -> bool:
    """Whether no source has a weight; raises ConfigError, with a line for each problem, for unusable weights."""
    if len(weights) != len(names):
        raise ValueError(f"{len(weights)} weights for {len(names)} sources")
    if all(weight is None for weight in weights):
        return True
    problems = []
    for name, weight in zip(names, weights, strict=True):
        if weight is None:
            problems.append(f"data.sources.{name}.weight is not set, but other sources have one; give every source one")
        elif not (math.isfinite(weight) and weight >= 0):
            problems.append(
                f"data.sources.{name}.weight={weight:g}: must be a finite number of at least 0; 0 leaves the source out"
            )
    if not problems and not any(weights):
        problems.append("data.sources: every weight is 0, so nothing is left to train on; give one source more than 0")
    if problems:
        raise ConfigError(problems)
    return False


def realised(
    units: Sequence[int] | np.ndarray,
    tokens: Sequence[int] | np.ndarray,
    weights: Weights,
    quota: Sequence[int] | np.ndarray,
    over: MixOver = MixOver.documents,
    *,
    documents: Sequence[int] | np.ndarray | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, SourceShare]:
    """Requested against realised shares of each source, by name. Arguments as in `quotas`; `quota` is its answer."""
    called = _names(names, len(units))
    natural = _is_natural(weights, called)
    held = units if documents is None else documents
    passes = [int(number) / int(size) if size else 0.0 for number, size in zip(quota, units, strict=True)]
    epoch_documents = [rate * int(number) for rate, number in zip(passes, held, strict=True)]
    epoch_tokens = [rate * int(number) for rate, number in zip(passes, tokens, strict=True)]
    of_documents, of_tokens = _shares(epoch_documents), _shares(epoch_tokens)
    if natural:
        requested = of_tokens if over is MixOver.tokens else of_documents
    else:
        requested = _shares([weight or 0.0 for weight in weights])
    return {
        name: SourceShare(
            weight=weights[source],
            requested=requested[source],
            units=int(quota[source]),
            documents=epoch_documents[source],
            tokens=epoch_tokens[source],
            share_documents=of_documents[source],
            share_tokens=of_tokens[source],
            passes=passes[source],
        )
        for source, name in enumerate(called)
    }


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
    if len(lengths) != len(sources):
        raise ValueError(f"{len(lengths)} lengths, but sources of {len(sources)} documents")
    packs: list[list[int]] = []
    source_of_pack = []
    for source in np.unique(sources):
        members = np.flatnonzero(sources == source)
        number = members.tolist()
        plan = best_fit_decreasing(lengths[members], capacity)
        packs.extend([number[position] for position in pack] for pack in plan)
        source_of_pack.append(np.full(len(plan), source, dtype=np.int64))
    return packs, np.concatenate(source_of_pack) if source_of_pack else np.zeros(0, dtype=np.int64)
