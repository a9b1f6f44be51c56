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

from launch.streams import printable

FLAG = "--json"
COLUMN_GAP = 2
"""Blanks between two columns of a table."""
LEAST_WORDS = 16
"""Characters that a column of words keeps, however many columns of numbers stand beside it."""
BREAKS = "/-_"
"""Characters after which a word may be folded that is longer than its column: a path or a name of a run."""


@dataclass(frozen=True)
class Column:
    """A column of a table. Numbers stand at the right and keep their line. Words are folded if the table is too wide."""

    title: str = ""
    is_number: bool = False


@dataclass(frozen=True)
class TableRow:
    """Cells of a table, one a column, and lines that stand below them across all columns."""

    cells: Sequence[str]
    notes: Sequence[str] = ()


def table(columns: Sequence[Column], rows: Sequence[TableRow], *, indent: int = 0) -> list[str]:
    """Lay out a table in lines of at most `width()` columns; no titles are drawn if no column has one.

    No cell is cut. A table is wider than the terminal only if its numbers and `LEAST_WORDS` of each column of words are.
    """
    from rich.console import Console
    from rich.style import Style
    from rich.table import Table
    from rich.text import Text

    class FoldedText(Text):
        """Text whose long words are folded after `BREAKS` where that is possible. Rich alone folds them anywhere."""

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
    for number, row in enumerate(rows):
        # Rich gives the style back with each line that it draws. So we know below which line the notes of a row stand.
        # Cells are `Text`: as plain strings, the brackets in `tuning.targets=[q_proj]` would be markup.
        grid.add_row(*(FoldedText(writable(cell)) for cell in row.cells), style=Style(meta={"row": number}))
    table_width = max(width() - indent, _least_width(columns, rows))
    # With a height rich asks no terminal for its size.
    console = Console(file=io.StringIO(), width=table_width, height=25, color_system=None)
    lines = []
    for row_number, drawn_lines in groupby(console.render_lines(grid, pad=False), key=_row_number):
        for drawn_line in drawn_lines:
            text = "".join(segment.text for segment in drawn_line)
            lines.append((" " * indent + text).rstrip())
        if row_number is not None:
            lines += rows[row_number].notes
    return lines


def _row_number(line: Sequence[Any]) -> int | None:
    """The row that a line of rich's segments belongs to; None for the titles."""
    return line[0].style.meta.get("row")


def break_word(word: str, columns: int) -> str:
    """A word with line breaks after some of its `BREAKS`, so that its pieces fit into `columns` as far as these allow."""
    from rich.cells import cell_len

    if cell_len(word) <= columns:
        return word
    lines = [""]
    for piece in re.findall(rf"[^{BREAKS}]*[{BREAKS}]|[^{BREAKS}]+", word):
        if lines[-1] and cell_len(lines[-1] + piece) > columns:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def _least_width(columns: Sequence[Column], rows: Sequence[TableRow]) -> int:
    """Columns of text in which numbers keep their line, and words `LEAST_WORDS` columns."""
    from rich.cells import cell_len

    least = COLUMN_GAP * (len(columns) - 1)
    for number, column in enumerate(columns):
        cells = [column.title, *(writable(row.cells[number]) for row in rows)]
        longest = max(map(cell_len, cells))
        least += longest if column.is_number else min(longest, LEAST_WORDS)
    return least


def width() -> int:
    """Columns of the terminal, at least 80; 80 if stdout is none. The environment variable COLUMNS goes before both."""
    return max(80, shutil.get_terminal_size((80, 24)).columns)


def fold(text: str, indent: int = 4) -> list[str]:
    """A sentence in lines of `width()` columns, all but the first indented. A path or a word is never broken."""
    return textwrap.wrap(
        writable(text), width(), subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


def fold_all(sentences: Sequence[str], *, indent: int = 2) -> list[str]:
    """Each sentence as an indented entry of a list."""
    lines = []
    for sentence in sentences:
        lines += fold(" " * indent + sentence)
    return lines


def cut(text: str) -> str:
    """A text on one line of at most `width()` columns: for messages that stand in full elsewhere."""
    from rich.cells import cell_len, set_cell_size

    line = writable(text)
    return line if cell_len(line) <= width() else set_cell_size(line, width() - 3) + "..."


def writable(text: str) -> str:
    """A text as stdout can show it: control characters, and those that its encoding lacks, are spelled out."""
    without_controls = printable(text)
    if is_utf8():
        return without_controls
    return without_controls.encode(_encoding(), "backslashreplace").decode(_encoding())


def is_utf8() -> bool:
    """Whether stdout can show every character."""
    return _encoding().lower().replace("-", "").replace("_", "") == "utf8"


def _encoding() -> str:
    return getattr(sys.stdout, "encoding", None) or "utf-8"


class said_to_stderr:
    """Within the block, everything that is printed goes to stderr, also by child processes and by C code; only if `quiet`.

    So stdout has the JSON answer alone.
    """

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.saved_descriptor = -1
        """A copy of descriptor 1 while stdout is redirected."""

    def __enter__(self) -> None:
        if self.quiet:
            sys.stdout.flush()
            self.saved_descriptor = os.dup(1)
            os.dup2(2, 1)
            self._stdout = sys.stdout
            sys.stdout = sys.stderr

    def __exit__(self, *_: object) -> None:
        if self.quiet:
            sys.stdout = self._stdout
            sys.stderr.flush()
            os.dup2(self.saved_descriptor, 1)
            os.close(self.saved_descriptor)


def print_json(answer: dict[str, Any], *, one_line: bool = False) -> None:
    """Print the answer for a script. A stream that is not UTF-8 gets JSON's own escapes."""
    print(json.dumps(answer, indent=None if one_line else 1, ensure_ascii=not is_utf8()), flush=True)


class Lasting:
    """A stream that nobody needs to read: if it cannot be written any more, text is dropped from then on without an error.

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
def lasting() -> Iterator[None]:
    """Within the block stdout and stderr are `Lasting`."""
    out = Lasting(sys.stdout)
    err = Lasting(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):  # type: ignore[type-var]
        yield
