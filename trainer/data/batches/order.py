"""The order of training samples, a function of (seed, epoch, sample number) alone, never of ranks or workers.

The whole state of the order is one integer: the number of samples consumed since the start of the run. After a
rollback, the places that are skipped are kept beside it.
"""

from __future__ import annotations

import bisect
import heapq
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from strategies.settings import number

# What a draw is for. It enters the generator's key as a spawn key, which numpy keeps apart from the plain [seed, epoch]
# of `GlobalOrder`: no draw repeats the bits of another.
_PASS_STREAM = 1
_INTERLEAVE_STREAM = 2


def shuffle_numbers(size: int, entropy: np.random.SeedSequence) -> np.ndarray:
    """A permutation of 0..size-1 that depends on `entropy` alone, int64 [size]."""
    # Raw bits of a counter-based generator: unlike numpy's `permutation`, their stream is promised never to change.
    return np.argsort(np.random.Philox(entropy).random_raw(size), kind="stable").astype(np.int64)


class Order(ABC):
    """An endless sequence of epochs of `num_units` samples each, drawn from `population` documents (or packs)."""

    def __init__(self, num_units: int, population: int, seed: int, shuffle: bool) -> None:
        if num_units < 1:
            raise ValueError("an order needs at least one unit")
        self.num_units = num_units
        self.population = population
        self.seed = seed
        self.shuffle = shuffle
        self._cached: tuple[int, np.ndarray] | None = None
        self._skipped: list[tuple[int, int]] = []

    def set_skipped(self, places: Iterable[tuple[int, int]]) -> None:
        """Leave out exactly these ranges of the order, each as (first position, count). Replaces what was left out before.

        Call it between two uses of the order.
        """
        self._skipped = []
        covered_to = 0  # overlapping places count once
        for first, count in sorted(places):
            end = max(first + count, covered_to)
            first = max(first, covered_to)
            self._skipped.append((first, end - first))
            covered_to = end

    def places(self, start: int, count: int) -> list[tuple[int, int]]:
        """Where in the order the run's samples [start, start + count) stand, as runs of (first place, count).

        A place is a position in the endless order of all epochs; the run passes over those that `set_skipped` left out. With the
        places 3 and 4 left out, samples 2 to 4 are at [(2, 1), (5, 2)].
        """
        places = np.arange(start, start + count, dtype=np.int64)
        for first, skipped_count in self._skipped:
            places[places >= first] += skipped_count
        runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
        return [(int(run[0]), len(run)) for run in runs if len(run)]

    def epoch(self, epoch: int) -> np.ndarray:
        """Unit numbers of one epoch, int64 [num_units]. The last epoch is cached."""
        # The loader's thread and the trainer ask for epochs at the same time.
        cached = self._cached  # one read: another thread may replace it
        if cached is None or cached[0] != epoch:
            cached = self._cached = (epoch, self._draw(epoch))
        return cached[1]

    @abstractmethod
    def _draw(self, epoch: int) -> np.ndarray:
        """The units of `epoch` in order, int64 [num_units]."""

    @abstractmethod
    def tokens_before(self, epoch: int, unit_tokens: np.ndarray) -> int:
        """Tokens of all epochs before `epoch`; `unit_tokens` is int [population]."""

    def units(self, start: int, count: int) -> np.ndarray:
        """Numbers of the units (documents, packs) that a run draws as its samples [start, start + count), int64 [count].

        They may span epochs. Samples that a rollback left out for good are passed over.
        """
        parts = []
        for place, remaining in self.places(start, count):
            while remaining > 0:
                epoch, offset = divmod(place, self.num_units)
                part = self.epoch(epoch)[offset : offset + remaining]
                parts.append(part)
                place += len(part)
                remaining -= len(part)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


class GlobalOrder(Order):
    """Every one of `num_units` documents (or packs) once an epoch, in a new order each time."""

    def __init__(self, num_units: int, seed: int, shuffle: bool) -> None:
        super().__init__(num_units, num_units, seed, shuffle)

    def _draw(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_units, dtype=np.int64)
        return shuffle_numbers(self.num_units, np.random.SeedSequence([self.seed, epoch]))

    def tokens_before(self, epoch: int, unit_tokens: np.ndarray) -> int:
        return epoch * int(np.sum(unit_tokens, dtype=np.int64))


class MixedOrder(Order):
    """Epochs that hold `quotas[s]` units of each source s.

    Each source walks through its units pass after pass, each pass in a new order, and every epoch takes the next
    `quotas[s]` of that walk. A source that gives few units an epoch therefore shows others the next time, and at any
    moment of the run the uses of any two units of one source differ by at most 1. Which source has its turn when is
    drawn anew each epoch; with `shuffle` off the turns are spread evenly and each source keeps its own order.
    """

    def __init__(
        self, source_of_unit: np.ndarray, quotas: Sequence[int] | np.ndarray, seed: int, shuffle: bool
    ) -> None:
        sources = np.asarray(source_of_unit, dtype=np.int64)
        self.quotas = np.asarray(quotas, dtype=np.int64)
        # Stable, so that the units of a source keep the order of the input.
        by_source = np.argsort(sources, kind="stable")
        sizes = np.bincount(sources, minlength=len(self.quotas))
        self._members = np.split(by_source, np.cumsum(sizes)[:-1]) if len(sizes) else []
        # By source, as (number of the pass, its units in order): epochs ask for the same pass again and again.
        self._last_pass: dict[int, tuple[int, np.ndarray]] = {}
        super().__init__(int(self.quotas.sum()), len(sources), seed, shuffle)

    def _pass(self, source: int, number: int) -> np.ndarray:
        """Units of `source` in the order of its pass `number`; a pass uses each of them once, in an order of its own.

        The last pass is kept, because successive epochs take successive parts of it.
        """
        members = self._members[source]
        if not self.shuffle:
            return members
        last_pass = self._last_pass.get(source)
        if last_pass is None or last_pass[0] != number:
            entropy = np.random.SeedSequence(self.seed, spawn_key=(_PASS_STREAM, source, number))
            last_pass = self._last_pass[source] = (number, members[shuffle_numbers(len(members), entropy)])
        return last_pass[1]

    def _walk(self, source: int, begin: int, count: int) -> np.ndarray:
        """Draws [begin, begin + count) from a source, whose units come pass after pass without end.

        Of a source with 10 units, draws [8, 13) are the last two of pass 0 and the first three of pass 1.
        """
        size = len(self._members[source])
        parts = []
        while count > 0:
            number, offset = divmod(begin, size)
            part = self._pass(source, number)[offset : offset + count]
            parts.append(part)
            begin += len(part)
            count -= len(part)
        return np.concatenate(parts)

    def _draw(self, epoch: int) -> np.ndarray:
        """The units of an epoch in order, int64 [num_units]: `quotas[s]` of each source s.

        First the source of each sample is drawn. Then each source fills its places with its next units, where the epoch before
        left off.
        """
        # The source of each sample of the epoch, int64 [num_units].
        source_of_sample = np.repeat(np.arange(len(self.quotas)), self.quotas)
        if self.shuffle:
            entropy = np.random.SeedSequence(self.seed, spawn_key=(_INTERLEAVE_STREAM, epoch))
            source_of_sample = source_of_sample[shuffle_numbers(self.num_units, entropy)]
        else:
            # Spread evenly: the k-th of q samples of a source at (2k + 1) / 2q of the epoch.
            fractions = [(2 * np.arange(quota) + 1) / (2 * quota) for quota in self.quotas if quota]
            source_of_sample = source_of_sample[np.argsort(np.concatenate(fractions), kind="stable")]
        # Each source's units keep their own order, so that no prefix uses a unit twice before another once.
        units = np.empty(self.num_units, dtype=np.int64)
        # Positions in the epoch that go to each source, ascending.
        samples_of_source = np.split(np.argsort(source_of_sample, kind="stable"), np.cumsum(self.quotas)[:-1])
        for source, quota in enumerate(self.quotas.tolist()):
            if quota:
                units[samples_of_source[source]] = self._walk(source, epoch * quota, quota)
        return units

    def tokens_before(self, epoch: int, unit_tokens: np.ndarray) -> int:
        """Tokens of all epochs before `epoch`; `unit_tokens`: tokens of each unit.

        Counted for each source from its whole passes and the part of a pass that is used by then, without drawing every epoch.
        """
        total = 0
        for source, quota in enumerate(self.quotas.tolist()):
            if not quota or not epoch:
                continue
            members = self._members[source]
            whole_passes, remainder = divmod(epoch * quota, len(members))
            total += whole_passes * int(np.sum(unit_tokens[members], dtype=np.int64))
            if remainder:
                total += int(np.sum(unit_tokens[self._pass(source, whole_passes)[:remainder]], dtype=np.int64))
        return total


def assign_to_slots(costs: np.ndarray, num_slots: int, capacity: int) -> list[list[int]]:
    """Spread a global batch over micro-batches (slots), `capacity` documents each, so that all cost about the same.

    `costs`: of each document, whole numbers, such as tokens; num_slots * capacity of them. Returns the documents' positions in
    `costs` by slot, the costliest slot first, positions ascending. The costliest document goes first, into the slot with the
    least cost so far that has room. Deterministic, since every rank does it for all.
    """
    slots: list[list[int]] = [[] for _ in range(num_slots)]
    costs = np.asarray(costs, dtype=np.int64)
    cost_list = costs.tolist()
    loads = [0] * num_slots
    # The heap holds one number for a slot and its load, in the order of (load, slot): numbers compare faster than tuples,
    # and each rank deals the documents of all.
    heap = list(range(num_slots))
    for position in np.argsort(-costs, kind="stable").tolist():
        slot = heap[0] % num_slots
        slots[slot].append(position)
        loads[slot] += cost_list[position]
        if len(slots[slot]) < capacity:
            heapq.heapreplace(heap, loads[slot] * num_slots + slot)
        else:  # a full slot leaves the heap
            heapq.heappop(heap)
    by_load = sorted(range(num_slots), key=lambda slot: (-loads[slot], slot))
    return [sorted(slots[slot]) for slot in by_load]


def steps_for_tokens(order: Order, unit_tokens: np.ndarray, global_batch: int, tokens: int) -> int:
    """Steps of `global_batch` units until `tokens` tokens are consumed; the step that reaches the number counts.

    `unit_tokens`: tokens of each unit (document or pack) that is drawn from, int64 [order.population], at least 1 each. Exact
    also if epochs differ in their tokens, as with sources that are mixed.
    """

    def tokens_before(epoch: int) -> int:
        return order.tokens_before(epoch, unit_tokens)

    # A number of epochs that is enough, by doubling.
    max_epoch = 1
    while tokens_before(max_epoch) < tokens:
        max_epoch *= 2
    # The last epoch that begins before `tokens` are consumed.
    last_epoch = bisect.bisect_left(range(max_epoch + 1), tokens, key=tokens_before) - 1
    # How many of its units it takes.
    cumulative = np.cumsum(unit_tokens[order.epoch(last_epoch)])
    tokens_left = tokens - tokens_before(last_epoch)
    units_of_last_epoch = int(np.searchsorted(cumulative, tokens_left, side="left")) + 1
    units = last_epoch * order.num_units + units_of_last_epoch
    return -(-units // global_batch)


@dataclass(kw_only=True, slots=True)
class BudgetConfig:
    """How long the run trains. Exactly one of the fields is set."""

    steps: int | None = number(None, least=1, advice="the number of optimizer steps")
    """Optimizer steps."""
    epochs: float | None = number(None, above=0, advice="1 is one pass over the data")
    """Passes over the training data; the last step may reach into the next pass."""
    tokens: int | None = number(None, least=1, advice="training tokens, all ranks together")
    """Training tokens, all ranks together; the step that reaches the number is the last."""


def steps_from_budget(budget: BudgetConfig, order: Order, unit_tokens: np.ndarray, global_batch: int) -> int:
    """Optimizer steps of the run: set directly, or as many as the epochs or tokens of the budget need.

    `unit_tokens`: tokens of each unit (document or pack) that is drawn from, int [order.population].
    """
    if budget.steps is not None:
        return budget.steps
    if budget.tokens is not None:
        return steps_for_tokens(order, unit_tokens, global_batch, budget.tokens)
    epochs = budget.epochs if budget.epochs is not None else 1.0
    return max(1, -(-round(epochs * order.num_units) // global_batch))
