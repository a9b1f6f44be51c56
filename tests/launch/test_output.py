"""Tables that verbs print: what a cell holds is shown, in the width and the encoding of the stream."""

import io
import subprocess
import sys
from contextlib import redirect_stdout

import pytest

from launch.output import (
    MIN_TEXT_COLUMN_WIDTH,
    TableColumn,
    TableRow,
    break_word,
    format_table,
    truncate_to_width,
    wrap_text,
)
from launch.runs.sparkline import ASCII_BARS, BARS, sparkline
from tests.helpers.launching import ROOT, clean_environment

WORDS, NUMBER = TableColumn("words"), TableColumn("number", is_number=True)


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("sys.__stdout__", io.StringIO())


def cells_of_words(lines: list[str], width: int) -> str:
    """The first column of a table's lines below its titles, put together again."""
    return "".join(line[:width].rstrip() for line in lines[1:])


def test_brackets_are_no_markup():
    lines = format_table(
        [WORDS, TableColumn("[red]title[/]")], [TableRow(("tuning.targets=[q_proj]", "[bold]:smile:"))]
    )
    assert lines == ["words                    [red]title[/]", "tuning.targets=[q_proj]  [bold]:smile:"]


def test_words_are_folded_and_numbers_keep_their_line():
    path = "/scratch/" + "x" * 100 + "/runs"
    lines = format_table([WORDS, NUMBER, NUMBER], [TableRow((path, "12345678901234567890", "1.5"))])
    assert max(map(len, lines)) == 80, "the table takes the width that it has"
    [numbers] = [line for line in lines[1:] if "12345678901234567890     1.5" in line]
    width = numbers.index("  12345678901234567890")
    assert cells_of_words(lines, width) == path


@pytest.mark.parametrize(
    ("word", "lines"),
    [
        ("runs/first/export", ["runs/", "first/", "export"]),
        ("first-export-model", ["first-", "export-", "model"]),
        ("optim.lr_scheduler", ["optim.lr_", "scheduler"]),
        ("step-000040", ["step-", "000040"]),
        ("1234567890ABC", ["1234567890ABC"]),  # digits and capitals stay together
    ],
)
def test_long_words_are_folded_after_slashes_underscores_and_hyphens(word, lines):
    assert break_word(word, 9).split("\n") == lines


def test_a_table_that_cannot_be_80_columns_wide_is_wider_and_nothing_is_cut():
    row = TableRow(("some words that are folded", *["1234567890"] * 8))
    lines = format_table([WORDS, *[NUMBER] * 8], [row])
    assert lines[1].split()[-8:] == ["1234567890"] * 8
    assert cells_of_words(lines, MIN_TEXT_COLUMN_WIDTH).replace(" ", "") == "somewordsthatarefolded"
    assert len(lines[1]) == MIN_TEXT_COLUMN_WIDTH + 8 * 12


def test_wide_characters_take_two_columns():
    lines = format_table(
        [WORDS, NUMBER], [TableRow(("中文", "1")), TableRow(("abcd", "2")), TableRow(("文" * 60, "3"))]
    )
    assert lines[1].endswith("1") and lines[2].endswith("2")
    assert len(lines[2]) - len(lines[1]) == 2, "two characters that are two columns wide each"
    assert sum(line.count("文") for line in lines[3:]) == 60
    assert max(len(line) + line.count("文") for line in lines) <= 80


def test_the_terminal_gives_the_width(monkeypatch):
    row = TableRow(("x" * 150, "1"))
    monkeypatch.setenv("COLUMNS", "120")
    assert max(map(len, format_table([WORDS, NUMBER], [row]))) == 120
    monkeypatch.setenv("COLUMNS", "40")
    assert max(map(len, format_table([WORDS, NUMBER], [row]))) == 80


def test_notes_stand_below_their_row_across_all_columns():
    rows = [
        TableRow(("x" * 100, "1"), ["  first note", "  second note"]),
        TableRow(("b", "2")),
        TableRow(("", "-"), ["  third"]),
    ]
    lines = format_table([WORDS, NUMBER], rows)
    assert [line for line in lines if "note" in line or "third" in line] == [
        "  first note",
        "  second note",
        "  third",
    ]
    assert lines.index("  first note") == 3 and lines[-1] == "  third"
    assert format_table([WORDS, NUMBER], []) == ["words  number"] and format_table([TableColumn()], []) == []


def test_lists_without_titles_are_indented():
    rows = [TableRow(("a", "one " * 30)), TableRow(("long", "two"))]
    lines = format_table([TableColumn(), TableColumn()], rows, indent=2)
    assert lines[0].startswith("  a     one one") and lines[1].startswith("        one")
    assert lines[-1] == "  long  two"
    assert max(map(len, lines)) <= 80


def test_table_on_an_ascii_stream_is_ascii():
    with redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="ascii")):
        lines = format_table([WORDS, NUMBER], [TableRow(("中文", "1")), TableRow(("b", "2"))])
        sentence, curve = wrap_text("Zürich"), sparkline([1.0, 2.0, 3.0])
    assert lines == ["words         number", r"\u4e2d\u6587       1", "b                  2"]
    assert sentence == [r"Z\xfcrich"]
    assert curve == ASCII_BARS[0] + ASCII_BARS[3] + ASCII_BARS[7]


def test_curves_are_bars_in_utf8():
    assert sparkline([1.0, 2.0, 3.0]) == BARS[0] + BARS[3] + BARS[7]
    assert sparkline([]) == "" and sparkline([2.0, 2.0]) == BARS[0] * 2


def test_characters_that_a_terminal_obeys_are_spelled_out_and_counted():
    lines = format_table([WORDS, NUMBER], [TableRow(("a\x1b[2Jb\r", "1")), TableRow(("\x1b[31mred\x1b[0m", "2"))])
    assert lines[1:] == ["a\\u001b[2Jb\\u000d       1", "red                     2"]


def test_sentences_are_folded_and_paths_in_them_stay_whole():
    path = "/" + "x" * 90
    assert wrap_text(f"look at {path} again") == ["look at", f"    {path}", "    again"]
    assert truncate_to_width("a" * 81) == "a" * 77 + "..." and truncate_to_width("a" * 80) == "a" * 80
    assert truncate_to_width("文" * 41) == "文" * 38 + " ..."


def test_rich_is_imported_only_for_a_table():
    script = (
        "import sys; import launch.output as a; a.print_json({}); a.wrap_text('x'); assert 'rich' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=clean_environment(), check=False)
    assert done.returncode == 0
