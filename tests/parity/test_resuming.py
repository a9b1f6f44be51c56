"""Any of eight strategies and sizes goes on from what any other saved, on the curve of the run that saved it."""

import itertools

import pytest

from tests.helpers.covering import EVERYTHING, chosen, cover
from tests.parity.optimizers import INSTALLED, OPTIMIZERS
from tests.parity.resuming import OTHERS, SIDES, STEPS, legal

TOLERANCE = 1e-5
BF16 = 1e-2
"""What rounding to 8 bits of mantissa may change of a loss, as in test_methods.py; of a norm five times that."""
PAIRS = [(source, target) for source in SIDES for target in SIDES]
TRAINED = [
    (what, source, target)
    for what, (source, target) in itertools.product(OTHERS, PAIRS)
    if source != target and legal(what, source) and legal(what, target)
]


def sizes(case):
    """Each way from one number of ranks to another."""
    source, target = (SIDES[side][1] for side in case[-2:])
    return {(source, target)} if source != target else set()


def sides(case):
    """What is trained is saved under each side, and loaded under each."""
    what, source, target = case
    return {(what, "from", source), (what, "to", target)}


def dear(case):
    """Four ranks and DeepSpeed take longest."""
    return sum(SIDES[side][1] + 4 * side.startswith("zero") for side in case[-2:])


OTHERWISE = cover(TRAINED, sides, seed=0)


def test_the_choice_is_a_choice():
    assert len(PAIRS) == 64 and len(OTHERWISE) <= 60 < len(TRAINED)
    assert set().union(*map(sides, OTHERWISE)) == set().union(*map(sides, TRAINED))


@pytest.fixture(scope="module", autouse=True)
def four_ranks_end(ranks):
    """As in test_matrix.py: they hold half a GiB each."""
    yield
    ranks[4].stop()


def both_ways(ranks, what, source, target):
    """(the curve of the run that saved, that of the one that went on)"""
    ask = {side: ranks[max(2, SIDES[side][1])].ask for side in (source, target)}
    seed = ranks[2].ask("resuming", "seed") if what.startswith("moe") else 0
    saved = ask[source]("resuming", "save", what, source, seed)
    return saved["curve"], ask[target]("resuming", "go_on", what, target, seed, saved["path"])


def assert_goes_on(ranks, what, source, target):
    expected, found = both_ways(ranks, what, source, target)
    rel = BF16 if what == "bf16" else TOLERANCE
    assert len(found) == len(expected) == STEPS
    for (loss, norm), (right_loss, right_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(right_loss, rel=rel)
        assert norm == pytest.approx(right_norm, rel=5 * rel if what == "bf16" else rel)


@pytest.mark.parametrize(("source", "target"), chosen(PAIRS, sizes, dear))
def test_resume_of_adamw_and_full_crosses_strategies(ranks, source, target):
    assert_goes_on(ranks, "adamw", source, target)


@pytest.mark.parametrize(("what", "source", "target"), OTHERWISE if EVERYTHING else [])
def test_resume_of_other_optimizers_and_methods_crosses_strategies(ranks, what, source, target):
    """In `make test` test_optimizers.py and test_features.py cross strategies."""
    if what in OPTIMIZERS and what not in INSTALLED:
        pytest.skip(f"{what} needs a package that is not installed")
    assert_goes_on(ranks, what, source, target)
