"""The covering choice proves every pair, is small, and is the same for a seed."""

import itertools

from tests.helpers.covering import cover, pairs, values

AXES = [("a", "b", "c"), (1, 2, 3, 4), (True, False), ("x", "y")]
WHOLE = [case for case in itertools.product(*AXES) if case[:2] != ("a", 4)]


def test_every_pair_of_a_legal_case_is_met_by_few_cases():
    found = cover(WHOLE, pairs)
    met = {pair for case in found for pair in pairs(case)}
    assert met == {pair for case in WHOLE for pair in pairs(case)}
    assert 11 <= len(found) <= 14 < len(WHOLE)
    assert found == [case for case in WHOLE if case in found], "in the order of the matrix"


def test_every_value_of_every_axis_is_met():
    found = cover(WHOLE, values)
    for axis, names in enumerate(AXES):
        assert {case[axis] for case in found} == set(names)
    assert len(found) == 4


def test_another_seed_is_another_choice_and_the_same_seed_the_same():
    assert cover(WHOLE, pairs, seed=1) == cover(WHOLE, pairs, seed=1)
    assert len({str(cover(WHOLE, pairs, seed=seed)) for seed in range(5)}) > 1
