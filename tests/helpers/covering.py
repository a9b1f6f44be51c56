"""Which cases of a matrix `make test` runs: a pairwise covering choice. `make test-all` runs the whole matrix.

The choice is a function of the matrix and of a seed, 0 unless SHARDTUNE_TEST_SEED says otherwise: the same from run to run.
"""

import heapq
import itertools
import os
import random
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import pytest

Case = TypeVar("Case")
EVERYTHING = bool(os.environ.get("SHARDTUNE_TEST_ALL"))
SEED = int(os.environ.get("SHARDTUNE_TEST_SEED", "0"))


def whole(reason: str) -> pytest.MarkDecorator:
    """The mark of a test that `make test` leaves to `make test-all`; `reason`: what else shows it, or what it takes."""
    return pytest.mark.skipif(not EVERYTHING, reason=f"make test-all runs it: {reason}")


def pairs(case: Sequence[Hashable]) -> set[Hashable]:
    """Every pair of values of two axes (positions of `case`) that it holds, and so every value of every axis."""
    return set(itertools.combinations(enumerate(case), 2))


def values(case: Sequence[Hashable]) -> set[Hashable]:
    """Every value of every axis, each at least once."""
    return set(enumerate(case))


def cover(
    cases: Iterable[Case],
    marks: Callable[[Case], set[Hashable]],
    *,
    seed: int = SEED,
    cost: Callable[[Case], float] = lambda case: 0,
) -> list[Case]:
    """A small part of `cases` with every mark that a case of them has, in their order; always the same for a seed.

    Greedy: the case with the most marks that are still missing comes next, of several the cheapest. `marks` says what a case
    proves.
    """
    cases = list(cases)
    order = random.Random(seed).sample(range(len(cases)), len(cases))
    order.sort(key=lambda index: cost(cases[index]))
    proves = {index: marks(cases[index]) for index in order}
    missing = set().union(*proves.values())
    heap = [(-len(proves[index]), place, index) for place, index in enumerate(order)]
    heapq.heapify(heap)
    chosen = []
    while missing:
        gain, place, index = heapq.heappop(heap)
        now = len(proves[index] & missing)
        if now == 0:
            continue
        if now < -gain:  # others were chosen since: look at it again in its turn
            heapq.heappush(heap, (-now, place, index))
            continue
        chosen.append(index)
        missing -= proves[index]
    return [cases[index] for index in sorted(chosen)]


def chosen(
    cases: Iterable[Case], marks: Callable[[Case], set[Hashable]], cost: Callable[[Case], float] = lambda case: 0
) -> list[Case]:
    """What this session of tests runs of a matrix: a covering choice, or with SHARDTUNE_TEST_ALL all of it."""
    return list(cases) if EVERYTHING else cover(cases, marks, cost=cost)


def examples(number: int) -> int:
    """How many examples of a property this session of tests tries, of as many as should be: a third, or with EVERYTHING all."""
    return number if EVERYTHING else max(10, number // 3)
