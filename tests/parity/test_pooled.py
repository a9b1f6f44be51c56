"""Classifiers and reward models whose rows ranks share take the steps of one process on padded rows."""

import itertools

import pytest

from tests.helpers.covering import chosen, takes
from tests.parity.pooled import OBJECTIVES, SHARDING

STRATEGIES = [name for name in SHARDING if name != "single"]
CASES = list(itertools.product(OBJECTIVES, ("full", "lora"), STRATEGIES, (2, 4)))


def marks(case):
    """Each objective with each tuning, each degree, and engines that keep weights whole or gather them."""
    objective, tuning, strategy, degree = case
    return {(objective, tuning), degree, (strategy.startswith("zero"), strategy in ("fsdp2", "hsdp", "zero3"))}


@pytest.mark.parametrize(("objective", "tuning", "strategy", "degree"), chosen(CASES, marks, takes))
def test_ranks_that_share_rows_score_as_one_process_on_padded_rows(ranks, objective, tuning, strategy, degree):
    """Four ranks; documents are uneven, and some of the classified ones end with the token that pads."""
    assert_alike(ranks[4].ask("pooled", "compare", objective, tuning, strategy, degree))


MIXTURES = [
    (objective, tuning, strategy, degree, experts)
    for objective, tuning, strategy, degree, experts in itertools.product(
        OBJECTIVES, ("full", "lora"), ("fsdp2", "hsdp"), (1, 2), (2, 4)
    )
    if not (strategy == "hsdp" and experts == 4)
]
"""Under hsdp two ranks form a replica, over which the experts of four cannot be distributed."""


def met(case):
    """Labels and pairs, each strategy, rows that are shared and that are not, and each number of ranks."""
    objective, _, strategy, degree, experts = case
    return {objective == "reward", strategy, ("rows", degree), ("experts", experts)}


@pytest.mark.parametrize(("objective", "tuning", "strategy", "degree", "experts"), chosen(MIXTURES, met, takes))
def test_mixtures_score_with_expert_parallelism_as_one_process(ranks, objective, tuning, strategy, degree, experts):
    """A classifier's base is a mixture whose experts are distributed over ranks, which may share rows too."""
    assert_alike(ranks[4].ask("pooled", "compare", objective, tuning, strategy, degree, experts))


def assert_alike(curves):
    """Loss, gradient norm and metrics of each step are those of one process."""
    assert len(curves["found"]) == len(curves["expected"]) == 3
    for found, expected in zip(curves["found"], curves["expected"], strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
