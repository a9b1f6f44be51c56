"""The order of training: a function of (seed, epoch, number of the sample) alone, never of ranks or workers.

The whole state of the order is one integer, the number of samples consumed since the start of the run.
"""

from __future__ import annotations

import heapq

import numpy as np


class GlobalOrder:
    """The endless sequence of epochs over `num_units` documents (or packs)."""

    def __init__(self, num_units: int, seed: int, shuffle: bool) -> None:
        if num_units < 1:
            raise ValueError("an order needs at least one unit")
        self.num_units = num_units
        self.seed = seed
        self.shuffle = shuffle
        self._cached: tuple[int, np.ndarray] | None = None

    def epoch(self, epoch: int) -> np.ndarray:
        """Unit numbers of one epoch, int64 [num_units]; the last one asked for is kept."""
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, self._permutation(epoch))
        return self._cached[1]

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_units, dtype=np.int64)
        # Raw bits of a counter-based generator: unlike numpy's `permutation`, their stream is promised never to change.
        bits = np.random.Philox(np.random.SeedSequence([self.seed, epoch])).random_raw(self.num_units)
        return np.argsort(bits, kind="stable").astype(np.int64)

    def units(self, start: int, count: int) -> np.ndarray:
        """Units of the consumed-sample numbers [start, start + count), int64 [count]; may span epochs."""
        parts = []
        while count > 0:
            epoch, offset = divmod(start, self.num_units)
            part = self.epoch(epoch)[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def deal(lengths: np.ndarray, num_slots: int, capacity: int) -> list[list[int]]:
    """Deal positions 0..len(lengths)-1 into `num_slots` slots of exactly `capacity`, balanced by tokens.

    Longest first, into the lightest slot with room. Deterministic. Slots come back heaviest first, positions ascending.
    """
    if len(lengths) != num_slots * capacity:
        raise ValueError(f"{len(lengths)} positions do not fill {num_slots} slots of {capacity}")
    slots: list[list[int]] = [[] for _ in range(num_slots)]
    heap = [(0, slot) for slot in range(num_slots)]
    for position in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        load, slot = heapq.heappop(heap)
        slots[slot].append(position)
        if len(slots[slot]) < capacity:  # a full slot leaves the heap
            heapq.heappush(heap, (load + int(lengths[position]), slot))
    loads = [sum(int(lengths[p]) for p in slot) for slot in slots]
    by_load = sorted(range(num_slots), key=lambda slot: (-loads[slot], slot))
    return [sorted(slots[slot]) for slot in by_load]


def steps_for_tokens(order: GlobalOrder, unit_tokens: np.ndarray, global_batch: int, tokens: int) -> int:
    """Steps of `global_batch` units until `tokens` tokens are consumed; the step that reaches the number counts."""
    if tokens <= 0:
        return 0
    per_epoch = int(np.sum(unit_tokens, dtype=np.int64))
    if per_epoch <= 0:
        raise ValueError("the units hold no tokens")
    epoch, rest = divmod(tokens - 1, per_epoch)
    running = np.cumsum(np.asarray(unit_tokens, dtype=np.int64)[order.epoch(epoch)])
    units = epoch * order.num_units + int(np.searchsorted(running, rest + 1, side="left")) + 1
    return -(-units // global_batch)
