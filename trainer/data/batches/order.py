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


def shuffle_numbers(size: int, seed_sequence: np.random.SeedSequence) -> np.ndarray:
    """Shuffle the numbers 0..size-1, int64 [size], by `seed_sequence` alone: the same in every run and version of numpy."""
    # Raw bits of a counter-based generator: unlike numpy's `permutation`, their stream is promised never to change.
    return np.argsort(np.random.Philox(seed_sequence).random_raw(size), kind="stable").astype(np.int64)


class Order(ABC):
    """The order in which training draws its samples: endless epochs of `num_units` samples each.

    A unit is what is drawn as a whole: a document, a pack, a pair of answers. Each is a number from 0 to `population` - 1. An
    epoch may use only a part of them, or some of them more than once, where sources are mixed by weight.
    """

    def __init__(self, num_units: int, population: int, seed: int, shuffle: bool) -> None:
        """Set up an endless order of epochs of `num_units` units (documents or packs) each, drawn from `population` of them.

        `shuffle` off: in the order of the input. Raises ValueError if there is no unit.
        """
        if num_units < 1:
            raise ValueError("an order needs at least one unit")
        self.num_units = num_units
        self.population = population
        self.seed = seed
        self.shuffle = shuffle
        # The epoch that was asked for last: (its number, its units in order).
        self._cached_epoch: tuple[int, np.ndarray] | None = None
        # Ranges of positions that are left out, as (first position, count): ascending, without overlap.
        self._skipped_ranges: list[tuple[int, int]] = []

    def set_skipped(self, position_ranges: Iterable[tuple[int, int]]) -> None:
        """Leave out exactly these ranges of the order, as after a rollback, each as (first position, count).

        Replaces what was left out before. Call it between two uses of the order. Ranges may overlap.
        """
        self._skipped_ranges = []
        covered_end = 0  # positions before this one are in an earlier range, so that overlapping ranges count once
        for first, count in sorted(position_ranges):
            end = max(first + count, covered_end)
            first = max(first, covered_end)
            self._skipped_ranges.append((first, end - first))
            covered_end = end

    def position_ranges(self, first_sample: int, num_samples: int) -> list[tuple[int, int]]:
        """Find where consecutive samples of the run are in the endless order of all epochs: ranges as (first position, count).

        `first_sample`: how many samples come before the first of `num_samples`. Positions that `set_skipped` left out belong to
        no sample, and are not counted by `first_sample`. With the positions 3 and 4 left out, the samples 2 to 4 are at [(2, 1),
        (5, 2)].
        """
        positions = np.arange(first_sample, first_sample + num_samples, dtype=np.int64)
        # The skipped ranges are ascending, and each one moves on all samples from its first position.
        for first_skipped, num_skipped in self._skipped_ranges:
            positions[positions >= first_skipped] += num_skipped
        range_begins = np.flatnonzero(np.diff(positions) != 1) + 1
        return [(int(block[0]), len(block)) for block in np.split(positions, range_begins) if len(block)]

    def units_of_epoch(self, epoch: int) -> np.ndarray:
        """The units of one epoch in order, int64 [num_units]: numbers of documents or packs. The epoch asked for is cached."""
        # The loader's thread and the trainer ask for epochs at the same time, so the cache is read once.
        cached = self._cached_epoch
        if cached is None or cached[0] != epoch:
            cached = self._cached_epoch = (epoch, self._draw_epoch(epoch))
        _, units = cached
        return units

    @abstractmethod
    def _draw_epoch(self, epoch: int) -> np.ndarray:
        """The units of `epoch` in order, int64 [num_units]."""

    @abstractmethod
    def tokens_before(self, epoch: int, unit_tokens: np.ndarray) -> int:
        """Tokens of all epochs before `epoch`; `unit_tokens` is int [population]."""

    def units(self, start: int, count: int) -> np.ndarray:
        """The units (documents, packs) that are the run's samples [start, start + count), int64 [count].

        They may span epochs. Positions that `set_skipped` left out are passed over.
        """
        unit_blocks = []
        for position, num_left in self.position_ranges(start, count):
            while num_left > 0:
                epoch, offset = divmod(position, self.num_units)
                next_units = self.units_of_epoch(epoch)[offset : offset + num_left]  # up to the end of the epoch
                unit_blocks.append(next_units)
                position += len(next_units)
                num_left -= len(next_units)
        return np.concatenate(unit_blocks) if unit_blocks else np.zeros(0, dtype=np.int64)


class GlobalOrder(Order):
    """The usual order: every one of `num_units` documents (or packs) once an epoch, in a new order each time."""

    def __init__(self, num_units: int, seed: int, shuffle: bool) -> None:
        super().__init__(num_units, num_units, seed, shuffle)

    def _draw_epoch(self, epoch: int) -> np.ndarray:
        """All units once: shuffled by (seed, epoch), or in the order of the input."""
        if not self.shuffle:
            return np.arange(self.num_units, dtype=np.int64)
        return shuffle_numbers(self.num_units, np.random.SeedSequence([self.seed, epoch]))

    def tokens_before(self, epoch: int, unit_tokens: np.ndarray) -> int:
        return epoch * int(np.sum(unit_tokens, dtype=np.int64))


class MixedOrder(Order):
    """The order of training where sources are mixed by weight: an epoch holds `quotas[s]` units (documents or packs) of source s.

    Each source goes through its units pass after pass, each pass in a new order, and every epoch takes the next `quotas[s]`
    units. A source that gives few units an epoch therefore shows others the next time, and at any moment of the run the uses of
    any two units of one source differ by at most 1. Which source has its turn when is drawn anew each epoch; with `shuffle` off
    the turns are spread evenly and each source keeps its own order.
    """

    def __init__(
        self, source_of_unit: np.ndarray, quotas: Sequence[int] | np.ndarray, seed: int, shuffle: bool
    ) -> None:
        """Set up an order whose epochs mix sources: `quotas[s]` units (documents or packs) of each source s.

        `source_of_unit`: int [population], the number of each unit's source.
        """
        sources = np.asarray(source_of_unit, dtype=np.int64)
        self.quotas = np.asarray(quotas, dtype=np.int64)
        # Stable, so that the units of a source keep the order of the input.
        units_by_source = np.argsort(sources, kind="stable")
        num_units_of_source = np.bincount(sources, minlength=len(self.quotas))
        self._units_of_source: list[np.ndarray] = []
        if len(num_units_of_source):
            self._units_of_source = np.split(units_by_source, np.cumsum(num_units_of_source)[:-1])
        self._last_pass: dict[int, tuple[int, np.ndarray]] = {}
        """By source, the pass that was asked for last: (its number, its units in order)."""
        super().__init__(int(self.quotas.sum()), len(sources), seed, shuffle)

    def _shuffled_units(self, source: int, pass_number: int) -> np.ndarray:
        """All units of `source`, each once, in the order of its pass `pass_number`; without `shuffle`, in that of the input.

        A pass goes once through the units of one source; it may span epochs. The last pass is remembered, because successive
        epochs take successive parts of it. Drawn from (seed, source, pass).
        """
        units = self._units_of_source[source]
        if not self.shuffle:
            return units
        cached_pass = self._last_pass.get(source)
        if cached_pass is None or cached_pass[0] != pass_number:
            seed_sequence = np.random.SeedSequence(self.seed, spawn_key=(_PASS_STREAM, source, pass_number))
            cached_pass = self._last_pass[source] = (pass_number, units[shuffle_numbers(len(units), seed_sequence)])
        _, units_in_order = cached_pass
        return units_in_order

    def _units_in_passes(self, source: int, begin: int, count: int) -> np.ndarray:
        """The units [begin, begin + count) of a source, whose passes (each unit once) follow one another without end.

        Of a source with 10 units, [8, 13) are the last two of pass 0 and the first three of pass 1.
        """
        num_units = len(self._units_of_source[source])
        unit_blocks = []
        while count > 0:
            pass_number, offset = divmod(begin, num_units)
            units_of_pass = self._shuffled_units(source, pass_number)[offset : offset + count]
            unit_blocks.append(units_of_pass)
            begin += len(units_of_pass)
            count -= len(units_of_pass)
        return np.concatenate(unit_blocks)

    def _draw_epoch(self, epoch: int) -> np.ndarray:
        """Draw an epoch in which sources are mixed: its units in order, int64 [num_units], `quotas[s]` of each source s.

        Each source fills its positions with its next units, from where the epoch before left off. So the units of a source keep
        the order of its passes, and no prefix of the epoch uses one of them twice before another once.
        """
        source_of_position = self._source_of_position(epoch)
        # By source, the positions of the epoch that it fills, ascending.
        positions_of_source = np.split(np.argsort(source_of_position, kind="stable"), np.cumsum(self.quotas)[:-1])
        units = np.empty(self.num_units, dtype=np.int64)
        for source, quota in enumerate(self.quotas.tolist()):
            if quota:
                units[positions_of_source[source]] = self._units_in_passes(source, epoch * quota, quota)
        return units

    def _source_of_position(self, epoch: int) -> np.ndarray:
        """Decide which source has its turn at each position of an epoch, int64 [num_units]: source s at `quotas[s]` of them.

        The quotas sum to `num_units`. Drawn from (seed, epoch); without `shuffle`, each source is spread evenly.
        """
        sources = np.repeat(np.arange(len(self.quotas)), self.quotas)
        if self.shuffle:
            seed_sequence = np.random.SeedSequence(self.seed, spawn_key=(_INTERLEAVE_STREAM, epoch))
            return sources[shuffle_numbers(self.num_units, seed_sequence)]
        # The k-th of the q units of a source goes to (2k + 1) / 2q of the epoch.
        fractions = [(2 * np.arange(quota) + 1) / (2 * quota) for quota in self.quotas if quota]
        return sources[np.argsort(np.concatenate(fractions), kind="stable")]

    def tokens_before(self, epoch: int, unit_tokens: np.ndarray) -> int:
        """Count the tokens of all epochs before `epoch`. `unit_tokens`: tokens of each unit (document or pack), int [population].

        By then each source has given `quotas[source]` units an epoch: some whole passes over its units and a part of the next
        one, so that no epoch has to be drawn.
        """
        if not epoch:
            return 0
        num_tokens = 0
        for source, quota in enumerate(self.quotas.tolist()):
            if not quota:
                continue
            units = self._units_of_source[source]
            whole_passes, remainder = divmod(epoch * quota, len(units))
            num_tokens += whole_passes * int(np.sum(unit_tokens[units], dtype=np.int64))
            if remainder:
                units_of_last_pass = self._shuffled_units(source, whole_passes)[:remainder]
                num_tokens += int(np.sum(unit_tokens[units_of_last_pass], dtype=np.int64))
        return num_tokens


def assign_to_slots(costs: np.ndarray, num_slots: int, units_per_slot: int) -> list[list[int]]:
    """Spread the units of a global batch over micro-batches (slots), `units_per_slot` each, so that all cost about the same.

    `costs`: of each unit, whole numbers, such as tokens; num_slots * units_per_slot of them. Returns the units' positions in
    `costs` by slot: the costliest slot first, positions ascending. Costs [9, 1, 5, 4] in 2 slots of 2 -> [[0, 1], [2, 3]].

    The costliest unit goes first, into the cheapest slot so far that has room. Deterministic, since every rank computes it for
    all ranks.
    """
    slots: list[list[int]] = [[] for _ in range(num_slots)]
    costs = np.asarray(costs, dtype=np.int64)
    cost_list = costs.tolist()
    slot_costs = [0] * num_slots
    # Slots with room. One number, cost * num_slots + slot, stands for a slot, in the order of (cost, slot): numbers compare
    # faster than tuples, and each rank assigns the units of all.
    heap = list(range(num_slots))
    for position in np.argsort(-costs, kind="stable").tolist():
        slot = heap[0] % num_slots
        slots[slot].append(position)
        slot_costs[slot] += cost_list[position]
        if len(slots[slot]) < units_per_slot:
            heapq.heapreplace(heap, slot_costs[slot] * num_slots + slot)
        else:  # a full slot leaves the heap
            heapq.heappop(heap)
    costliest_first = sorted(range(num_slots), key=lambda slot: (-slot_costs[slot], slot))
    return [sorted(slots[slot]) for slot in costliest_first]


def steps_for_tokens(order: Order, unit_tokens: np.ndarray, global_batch: int, tokens: int) -> int:
    """Count the steps of `global_batch` units until `tokens` tokens are consumed; the step that reaches the number counts.

    `unit_tokens`: tokens of each unit (document or pack), int64 [order.population], at least 1 each. Exact also if epochs differ
    in their tokens, as with sources that are mixed.
    """

    def tokens_before(epoch: int) -> int:
        return order.tokens_before(epoch, unit_tokens)

    # By doubling: a number of epochs that has enough tokens.
    num_epochs = 1
    while tokens_before(num_epochs) < tokens:
        num_epochs *= 2
    # By bisection: the last epoch that begins before `tokens` are consumed.
    last_epoch = bisect.bisect_left(range(num_epochs + 1), tokens, key=tokens_before) - 1
    cumulative_tokens = np.cumsum(unit_tokens[order.units_of_epoch(last_epoch)])
    tokens_left = tokens - tokens_before(last_epoch)
    num_units_of_last_epoch = int(np.searchsorted(cumulative_tokens, tokens_left, side="left")) + 1
    num_units = last_epoch * order.num_units + num_units_of_last_epoch
    return _round_up_division(num_units, global_batch)


def _round_up_division(dividend: int, divisor: int) -> int:
    """Divide and round up, in exact integer arithmetic: 7 / 3 -> 3."""
    return -(-dividend // divisor)


@dataclass(kw_only=True, slots=True)
class BudgetConfig:
    """How long the run trains. Exactly one of the fields is set."""

    steps: int | None = number(None, least=1, advice="the number of optimizer steps")
    """Length of the run in optimizer steps."""
    epochs: float | None = number(None, above=0, advice="1 is one pass over the data")
    """Length of the run in passes over the training data. The last step may include documents of the next pass."""
    tokens: int | None = number(None, least=1, advice="training tokens, all ranks together")
    """Length of the run in training tokens, over all ranks. The step that reaches this number is the last."""


def steps_from_budget(budget: BudgetConfig, order: Order, unit_tokens: np.ndarray, global_batch: int) -> int:
    """Decide how many optimizer steps the run takes: as many as are set, or as the epochs or tokens of the budget need.

    `unit_tokens`: tokens of each unit (document or pack) that is drawn from, int [order.population].
    """
    if budget.steps is not None:
        return budget.steps
    if budget.tokens is not None:
        return steps_for_tokens(order, unit_tokens, global_batch, budget.tokens)
    epochs = budget.epochs if budget.epochs is not None else 1.0  # for a budget that no configuration has checked
    # A budget below one step still takes one.
    return max(1, _round_up_division(round(epochs * order.num_units), global_batch))
