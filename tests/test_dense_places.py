"""The house rule against dense lines finds them, and leaves plain ones."""

import ast

import pytest

from tests.dense_places import dense_places, new_places


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("x = 1 if a else 2 if b else 3", "conditional"),
        ("self.a, self.b = a, b + 1", "tuple"),
        ("x = [[y for y in row] for row in rows]", "comprehension"),
        ("x = [y for row in rows for y in row]", "comprehension"),
        ("return_value = {a: 1 for a in x} | {b: 2 for b in y}", "comprehension"),
    ],
)
def test_a_dense_line_is_found(source, rule):
    assert dense_places(ast.parse(source)) == {rule: [1]}


@pytest.mark.parametrize(
    "source",
    [
        "x = 1 if a else 2",
        "a, b = b, a",
        "low, high = 0, 1",
        "x, y = point()",
        "x = [y for y in row]",
        "for row in rows:\n    x = [y for y in row]",
    ],
)
def test_a_plain_line_is_left(source):
    assert dense_places(ast.parse(source)) == {}


def test_a_place_beyond_the_listed_ones_is_refused():
    places = {"a.py": {"tuple": [3, 9]}, "b.py": {"conditional": [1]}}
    assert new_places(places, {"a.py": {"tuple": 2}, "b.py": {"conditional": 1}}) == []
    [problem] = new_places(places, {"a.py": {"tuple": 1}, "b.py": {"conditional": 1}})
    assert problem.startswith("a.py: an assignment of several unlike values") and "lines 3, 9" in problem
