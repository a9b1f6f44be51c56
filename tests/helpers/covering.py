"""Which cases of a matrix `make test` runs: a pairwise covering choice. `make test-all` runs the whole matrix.

The choice is a function of the matrix and of a seed, 0 unless SHARDTUNE_TEST_SEED says otherwise: the same from run to run.
"""

import heapq
import inspect
import itertools
import os
import random
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

Case = TypeVar("Case")
EVERYTHING = bool(os.environ.get("SHARDTUNE_TEST_ALL"))
TRIES = 20
"""Orders in which cases are looked at."""
LEFT_OUT: dict[str, int] = {}
"""How many cases each test file, by its path, does not run in this session."""
SEED = int(os.environ.get("SHARDTUNE_TEST_SEED", "0"))


def whole(reason: str) -> pytest.MarkDecorator:
    """The mark of a test that `make test` leaves to `make test-all`; `reason`: what else shows it, or what it takes."""
    return pytest.mark.skipif(not EVERYTHING, reason=f"make test-all runs it: {reason}")


def pairs(case: Sequence[Hashable]) -> set[Hashable]:
    """Every pair of values of two axes (positions of `case`) that it holds, and so every value of every axis."""
    return set(itertools.combinations(enumerate(case), 2))


TAKES = {"single": 0.5, "ddp": 0.8, "zero1": 0.9, "zero2": 0.9, "hsdp": 1.1, "zero3": 2.6}
"""What a run of two ranks takes under a strategy, beside one under `fsdp2`."""


def takes(case: Sequence[Hashable]) -> float:
    """The cost of a case by the strategies among its values, or its words."""
    return max((TAKES[value] for value in case if value in TAKES), default=1.0)


def values(case: Sequence[Hashable]) -> set[Hashable]:
    """Every value of every axis, each at least once."""
    return set(enumerate(case))


def cover(
    cases: Iterable[Case],
    marks: Callable[[Case], set[Hashable]],
    *,
    seed: int = SEED,
    cost: Callable[[Case], float] = lambda case: 1.0,
    given: Iterable[Case] = (),
) -> list[Case]:
    """A cheap part of `cases` with every mark that a case of them has, in their order; always the same for a seed.

    Greedy: the case with the most marks that are still missing comes next, in half of the tries for what it costs; what the
    others prove as well is left out again, the dearest first. Of several orders the one that costs least is taken. `marks`: what
    a case proves. `cost`: what it takes, compared with others. `given`: what is run anyway, and need not be proven again.
    """
    cases = list(cases)
    there = set().union(*map(marks, given))
    proves, costs = [marks(case) - there for case in cases], [cost(case) for case in cases]
    assert min(costs, default=1.0) > 0, "what costs nothing cannot be compared"
    draw = random.Random(seed)
    tries = []
    for number in range(TRIES):
        order = draw.sample(range(len(cases)), len(cases))
        order.sort(key=costs.__getitem__)
        found = _greedy(order, proves, costs if number % 2 else [1.0] * len(costs))
        tries.append(_needed(sorted(found, key=costs.__getitem__, reverse=True), proves))
    best = min(tries, key=lambda found: (sum(costs[index] for index in found), len(found)))
    return [cases[index] for index in sorted(best)]


def _greedy(order: list[int], proves: list[set[Hashable]], costs: list[float]) -> list[int]:
    """Indices in `order` with all marks, the most telling for its cost first."""
    missing = set().union(*proves)
    heap = [(-len(proves[index]) / costs[index], place, index) for place, index in enumerate(order)]
    heapq.heapify(heap)
    found = []
    while missing:
        gain, place, index = heapq.heappop(heap)
        now = len(proves[index] & missing)
        if now == 0:
            continue
        if now / costs[index] < -gain:  # others were chosen since: look at it again in its turn
            heapq.heappush(heap, (-now / costs[index], place, index))
            continue
        found.append(index)
        missing -= proves[index]
    return found


def _needed(found: list[int], proves: list[set[Hashable]]) -> list[int]:
    """Of these the ones without which a mark would be missing."""
    times = Counter(itertools.chain.from_iterable(proves[index] for index in found))
    kept = []
    for index in found:
        if all(times[mark] > 1 for mark in proves[index]):
            times.subtract(proves[index])
        else:
            kept.append(index)
    return kept


def chosen(
    cases: Iterable[Case], marks: Callable[[Case], set[Hashable]], cost: Callable[[Case], float] = lambda case: 1.0
) -> list[Case]:
    """What this session of tests runs of a matrix: a covering choice, or with SHARDTUNE_TEST_ALL all of it."""
    cases = list(cases)
    if EVERYTHING:
        return cases
    covering = cover(cases, marks, cost=cost)
    caller = inspect.stack(context=0)[1].filename
    LEFT_OUT[caller] = LEFT_OUT.get(caller, 0) + len(cases) - len(covering)
    return covering


def left_out_of_changed_files(left_out: dict[str, int], changed: Iterable[str]) -> list[str]:
    """One line for each test file with cases that were left out, if it or a test module that it imports has changed.

    `left_out`: number of cases by the test file's path. `changed`: paths as git prints them, relative to the checkout.
    """
    modules = {Path(path).stem for path in changed if path.startswith("tests/") and path.endswith(".py")}
    lines = []
    for path, number in sorted(left_out.items()):
        imports = [
            line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.startswith("from tests")
        ]
        imported = {word.rpartition(".")[2] for line in imports for word in re.findall(r"[\w.]+", line)}
        if number and modules & {Path(path).stem, *imported}:
            lines.append(f"{os.path.relpath(path)} (changed): left out {number} cases of its matrices")
    return lines


def changed_files() -> list[str]:
    """Files that differ from the branch `main`, committed or not; none outside a git checkout."""
    listed = subprocess.run(["git", "diff", "--name-only", "main"], capture_output=True, text=True, check=False)
    new = subprocess.run(
        ["git", "ls-files", "--others", "--exclude-standard"], capture_output=True, text=True, check=False
    )
    return [*listed.stdout.split(), *new.stdout.split()]


def examples(number: int) -> int:
    """How many examples of a property this session of tests tries, of as many as should be: a third, or with EVERYTHING all."""
    return number if EVERYTHING else max(10, number // 3)
