"""The packing plan: which documents share a row. A pure function of lengths; no tokens are touched."""

from __future__ import annotations

import numpy as np


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
