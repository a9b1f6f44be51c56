"""Numbers as people write them, the best cells of a table, the order of call-outs, and text that stays text."""

import math

import pytest
from jinja2 import UndefinedError

from trainer.pages.numbers import UNKNOWN, format_bytes, format_duration, format_number, format_percent, format_signed
from trainer.pages.pieces import Callout, IntervalBar, PageCell, PageColumn, PageTable, worst_first
from trainer.pages.render import render, script_json


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((27051.2, "27,051"), (1.016e236, "1.0e+236"), (3.4e-5, "3.4e-05"), (2.336, "2.336"), (10.83, "10.83")),
        *(
            (0.0, "0"),
            (1_234_567, "1,234,567"),
            (1234.56, "1,235"),
            (0.5, "0.5000"),
            (None, UNKNOWN),
            (-3.25, "-3.250"),
        ),
        *((math.nan, "not a number"), (-math.inf, "-infinite"), (12, "12"), (9999.9, "10,000")),
    ],
)
def test_numbers(value, shown):
    assert format_number(value) == shown


def test_differences_shares_times_and_sizes():
    assert [format_signed(0.125), format_signed(-0.125), format_signed(0.0)] == ["+0.1250", "-0.1250", "0"]
    assert [format_percent(x) for x in (0, 0.0001, 0.413, 0.9999, 1)] == ["0%", "<0.1%", "41.3%", ">99.9%", "100%"]
    times = (0, 0.012, 0.35, 4.25, 42, 59.7, 200, 3599.9, 7500, 86399, 90000)
    assert [format_duration(x) for x in times] == [
        *("0 s", "12 ms", "0.35 s", "4.2 s", "42 s", "1 min", "3 min 20 s", "1 h", "2 h 5 min", "1 d", "1 d 1 h"),
    ]
    assert [format_bytes(x) for x in (812, 1.5 * 2**20, 12.6 * 2**30, None)] == [
        "812 B",
        "1.5 MiB",
        "12.6 GiB",
        UNKNOWN,
    ]


def table_of(numbers, best):
    cells = [[PageCell(f"row {i}", f"row {i}"), PageCell(format_number(n), n)] for i, n in enumerate(numbers)]
    return PageTable([PageColumn("run"), PageColumn("loss", group="quality", best=best)], cells)


def test_best_cells_of_a_table():
    assert table_of([3.0, 1.0, None, math.nan, 1.0], "smallest").best_rows == [frozenset(), frozenset({1, 4})]
    assert table_of([3.0, 1.0, math.inf], "largest").best_rows[1] == {0}
    for numbers in ([2.0, 2.0], [2.0], [2.0, None]):  # nothing is better than another
        assert not table_of(numbers, "smallest").marks_best
    assert not table_of([1.0, 2.0], "").marks_best
    assert table_of([1.0, 2.0], "").numeric == [False, True]
    assert table_of([1.0, 2.0], "").groups == [("", 1), ("quality", 1)]


def test_call_outs_come_worst_first_and_keep_their_order():
    callouts = [Callout(tone, str(place), "") for place, tone in enumerate(["note", "bad", "warning", "bad", "good"])]
    assert [callout.heading for callout in worst_first(callouts)] == ["1", "3", "2", "0", "4"]


def test_places_on_an_interval_bar():
    bar = IntervalBar(-1, 0, 9, minimum=-2, maximum=2)
    assert [bar.position(x) for x in (-1, 0, 9, math.nan)] == [25, 50, 100, 50]
    assert IntervalBar(1, 1, 1, minimum=1, maximum=1).position(1) == 50


def test_a_page_escapes_texts_and_refuses_names_without_a_value():
    values = {
        "cards": [],
        "callouts": [],
        "table": table_of([1.0], ""),
        "picture": "data:,",
        "spec": {"a": "</script>"},
    }
    page = render("tests.pages", "every_piece.html.j2", name="<script>alert(1)</script>", vega_script="0", **values)
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert '{"a": "\\u003c/script>"}' in page
    without_plots = render("tests.pages", "every_piece.html.j2", name="n", **values)
    assert 'class="plot"' not in without_plots and "unsafe-eval" not in without_plots
    assert render("tests.pages", "every_piece.html.j2", name="n", finalize=lambda _: "other", **values).count("other")
    with pytest.raises(UndefinedError, match="name"):
        render("tests.pages", "every_piece.html.j2", **values)
    assert script_json('{"b": "<!--"}') == '{"b": "\\u003c!--"}'
