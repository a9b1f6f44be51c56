"""The covering choice proves every pair, is small, and is the same for a seed."""

import itertools

from tests.helpers import covering
from tests.helpers.covering import cover, left_out_of_changed_files, pairs, values

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


def test_covering_differs_by_seed_and_is_the_same_for_the_same_seed():
    assert cover(WHOLE, pairs, seed=1) == cover(WHOLE, pairs, seed=1)
    assert len({str(cover(WHOLE, pairs, seed=seed)) for seed in range(5)}) > 1


def dear(case):
    return 9.0 if case[0] == "a" or case[1] == 3 else 1.0


def test_covering_is_the_cheapest_and_given_cases_are_not_proven_again():
    """By hand: each value once, with the dear ones (a, 3) in one case where they may meet."""
    found = cover(WHOLE, values, cost=dear)
    assert set().union(*map(values, found)) == set().union(*map(values, WHOLE))
    assert [case[:2] for case in found if dear(case) > 1] == [("a", 3)]
    given = [("a", 3, True, "x")]
    rest = cover(WHOLE, values, cost=dear, given=given)
    assert not any(dear(case) > 1 for case in rest)
    assert set().union(*map(values, [*rest, *given])) == set().union(*map(values, WHOLE))
    assert cover(given, values, given=given) == []


def test_covering_counts_left_out_cases_by_the_file_that_chose(monkeypatch):
    monkeypatch.setattr(covering, "EVERYTHING", False)
    monkeypatch.setattr(covering, "LEFT_OUT", {})
    taken = covering.chosen(WHOLE, pairs)
    assert {__file__: len(WHOLE) - len(taken)} == covering.LEFT_OUT


def test_covering_reports_left_out_cases_of_changed_files_and_their_importers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in {"test_a": "from tests.parity.pairs import X\n", "test_b": "import os\n", "test_c": ""}.items():
        (tmp_path / f"{name}.py").write_text(text)
    left_out = {str(tmp_path / "test_a.py"): 3, str(tmp_path / "test_b.py"): 5, str(tmp_path / "test_c.py"): 0}
    expected = "test_a.py (changed): left out 3 cases of its matrices"
    assert left_out_of_changed_files(left_out, ["tests/parity/pairs.py", "trainer/test_b.py"]) == [expected]
    assert len(left_out_of_changed_files(left_out, ["tests/x/test_b.py", "tests/x/test_c.py"])) == 1
    assert left_out_of_changed_files(left_out, ["docs/test_a.md"]) == []
