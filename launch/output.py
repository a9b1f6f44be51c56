"""Prints for verbs: tables for people, JSON for scripts, and streams that survive a closed pipe.

A table is a list of columns and a list of rows; rich lays it out, and is imported when the first table is drawn. All text is
plain: no markup, no colours and no lines around cells, so that a table is the same in a terminal, a pipe and a log.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TextIO

from launch.streams import printable_text

JSON_FLAG = "--json"
COLUMN_GAP = 2
"""Blanks between two columns of a table."""
MIN_TEXT_COLUMN_WIDTH = 16
"""Characters that a column of words keeps, however many columns of numbers stand beside it."""
BREAK_AFTER_CHARACTERS = "/_-"
"""Characters after which a word that is longer than its column may be folded: such words are paths and names of runs.

The hyphen is the last one, because it would stand for a range of characters between two others in a regex.
"""
_BREAKABLE_PIECE_REGEX = re.compile(
    rf"[^{BREAK_AFTER_CHARACTERS}]*[{BREAK_AFTER_CHARACTERS}]|[^{BREAK_AFTER_CHARACTERS}]+"
)
"""A part of a word up to the next of these characters, or up to its end: `runs/`, `first-`."""


@dataclass(frozen=True)
class TableColumn:
    """A column of a table. Numbers stand at the right and keep their line. Words are folded if the table is too wide."""

    title: str = ""
    is_number: bool = False


@dataclass(frozen=True)
class TableRow:
    """Cells of a table, one a column, and lines that stand below them across all columns."""

    cells: Sequence[str]
    notes: Sequence[str] = ()


def format_table(columns: Sequence[TableColumn], rows: Sequence[TableRow], *, indent: int = 0) -> list[str]:
    """Lay out a table as lines of text for a terminal, at most as wide as it; titles are drawn if any column has one.

    No cell is cut: text is folded. The table gets wider than the terminal only if its numbers, and `MIN_TEXT_COLUMN_WIDTH`
    characters of each text column, do not fit.
    `indent`: blanks before each line.
    Notes of a row stand below it.
    """
    from rich.console import Console
    from rich.style import Style
    from rich.table import Table
    from rich.text import Text

    class FoldedText(Text):
        """Text whose long words are folded after `BREAK_AFTER_CHARACTERS` where possible. Rich alone folds them anywhere."""

        def wrap(self, console: Console, width: int, **options: Any) -> Any:
            words = [break_word(word, width) for word in self.plain.split(" ")]
            return Text(" ".join(words)).wrap(console, width, **options)

    has_titles = any(column.title for column in columns)
    grid = Table(box=None, pad_edge=False, padding=(0, COLUMN_GAP, 0, 0), show_header=has_titles)
    for column in columns:
        grid.add_column(
            Text(column.title),
            justify="right" if column.is_number else "left",
            overflow="fold",
            no_wrap=column.is_number,
        )
    for index, row in enumerate(rows):
        # Cells are `Text`: as plain strings, the brackets in `tuning.targets=[q_proj]` would be markup.
        cells = [FoldedText(displayable(cell)) for cell in row.cells]
        # Rich returns the style with each line that it draws. From it we know after which line the notes of a row belong.
        grid.add_row(*cells, style=Style(meta={"row": index}))
    table_width = max(terminal_width() - indent, _min_table_width(columns, rows))
    # With a height rich asks no terminal for its size.
    console = Console(file=io.StringIO(), width=table_width, height=25, color_system=None)

    # The lines that rich draws, grouped by row, with the notes of each row after them.
    lines = []
    for row_number, drawn_lines in groupby(console.render_lines(grid, pad=False), key=_row_number):
        for drawn_line in drawn_lines:
            text = "".join(segment.text for segment in drawn_line)
            lines.append((" " * indent + text).rstrip())
        if row_number is not None:  # None for the line of titles
            lines += rows[row_number].notes
    return lines


def _row_number(line: Sequence[Any]) -> int | None:
    """The number of the row that a drawn line of rich's segments belongs to; None for the line of titles."""
    return line[0].style.meta.get("row")


def break_word(word: str, max_columns: int) -> str:
    r"""Put line breaks into a word that is longer than its column, such as a path, where it can be broken well.

    It is broken after `BREAK_AFTER_CHARACTERS` only, so a line may still be too long. In 9 columns: "runs/first/export" ->
    "runs/\nfirst/\nexport".
    """
    from rich.cells import cell_len

    if cell_len(word) <= max_columns:
        return word
    lines = [""]
    for piece in _BREAKABLE_PIECE_REGEX.findall(word):
        if lines[-1] and cell_len(lines[-1] + piece) > max_columns:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def _min_table_width(columns: Sequence[TableColumn], rows: Sequence[TableRow]) -> int:
    """The least width of a table in characters: its numbers in full, some of each text, and the gaps between columns."""
    from rich.cells import cell_len

    least = COLUMN_GAP * (len(columns) - 1)
    for index, column in enumerate(columns):
        cells = [column.title, *(displayable(row.cells[index]) for row in rows)]
        longest = max(map(cell_len, cells))
        least += longest if column.is_number else min(longest, MIN_TEXT_COLUMN_WIDTH)
    return least


def terminal_width() -> int:
    """The width of the terminal in columns, at least 80. Without a terminal it is 80; the variable COLUMNS wins over both."""
    return max(80, shutil.get_terminal_size((80, 24)).columns)


def wrap_text(text: str, indent: int = 4) -> list[str]:
    """A text in lines at most as wide as the terminal, all but the first indented. A path or a word is never broken."""
    return textwrap.wrap(
        displayable(text),
        terminal_width(),
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def wrap_sentences(sentences: Sequence[str], *, indent: int = 2) -> list[str]:
    """The lines of a list of sentences, each folded, with this indent."""
    lines = []
    for sentence in sentences:
        lines += wrap_text(" " * indent + sentence)
    return lines


def truncate_to_width(text: str) -> str:
    """A message on one line, cut with `...` at the width of the terminal; for messages that stand in full elsewhere."""
    from rich.cells import cell_len, set_cell_size

    line = displayable(text)
    return line if cell_len(line) <= terminal_width() else set_cell_size(line, terminal_width() - 3) + "..."


def displayable(text: str) -> str:
    """A text that stdout can show: control characters, and characters that its encoding lacks, are spelled out."""
    without_controls = printable_text(text)
    if stdout_shows_unicode():
        return without_controls
    return without_controls.encode(_stdout_encoding(), "backslashreplace").decode(_stdout_encoding())


def stdout_shows_unicode() -> bool:
    """Whether stdout can show every character."""
    return _stdout_encoding().lower().replace("-", "").replace("_", "") == "utf8"


def _stdout_encoding() -> str:
    """The encoding of stdout; UTF-8 for a stream that names none."""
    return getattr(sys.stdout, "encoding", None) or "utf-8"


class stdout_to_stderr:
    """Within the block, everything that is printed goes to stderr, so that stdout has the JSON answer alone.

    That includes what child processes and C code print. `is_active`: False leaves stdout as it is.
    """

    def __init__(self, is_active: bool) -> None:
        self.is_active = is_active
        self.saved_descriptor = -1
        """A copy of descriptor 1 while stdout is redirected."""

    def __enter__(self) -> None:
        if self.is_active:
            sys.stdout.flush()
            self.saved_descriptor = os.dup(1)
            os.dup2(2, 1)
            self._stdout = sys.stdout
            sys.stdout = sys.stderr

    def __exit__(self, *_: object) -> None:
        if self.is_active:
            sys.stdout = self._stdout
            sys.stderr.flush()
            os.dup2(self.saved_descriptor, 1)
            os.close(self.saved_descriptor)


def print_json(answer: dict[str, Any], *, one_line: bool = False) -> None:
    """Print the answer for a script. A stream that is not UTF-8 gets JSON's own escapes."""
    print(json.dumps(answer, indent=None if one_line else 1, ensure_ascii=not stdout_shows_unicode()), flush=True)


class ClosableStream:
    """Wraps an output stream whose reader may go away: if it cannot be written any more, text is dropped without an error.

    A terminal may be closed, and Ctrl-C ends the `tee` behind a command before the command has saved.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text, or drop it."""
        try:
            return self._stream.write(text)
        except OSError:
            self._drop_output()
            return len(text)

    def flush(self) -> None:
        """Flush the stream, or drop what is buffered."""
        try:
            self._stream.flush()
        except OSError:
            self._drop_output()

    def close(self) -> None:
        """Only flushes. A library that holds the stream (absl's logging, which rouge-score brings) must not close it."""
        self.flush()

    def _drop_output(self) -> None:
        # What is buffered, too: Python would try to write it at exit, and that would change the exit code.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def tolerate_closed_streams() -> Iterator[None]:
    """Within the block stdout and stderr are `ClosableStream`."""
    out = ClosableStream(sys.stdout)
    err = ClosableStream(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):  # type: ignore[type-var]
        yield
