"""Progress of data preparation: a line every 15 s on rank 0, and none if preparation takes less."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from strategies.errors import DataError
from trainer.data.read.json_rows import UnparsedRow
from trainer.data.read.paths import is_hub_path
from trainer.data.sources import RowRange, SourceInput

LINE_EVERY_S = 15.0
"""Seconds between two lines."""
MAX_FILES_FOR_ESTIMATE = 1000
"""Files whose heads are looked at for an estimate."""
_ROWS_PHASE = "rows"
"""The phase in which rows are counted. Other phases are a few words that are printed as they are."""
PrintLine = Callable[[str], None]
"""Shows one line of text to the user."""


def print_on_rank_0(line: str) -> None:
    """Print to stderr, on the rank whose lines a user sees."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


class PreparationProgress:
    """Counts what data preparation has done, and prints it from a thread of its own.

    Native code may keep that thread waiting as long as it keeps the interpreter's lock.
    """

    def __init__(self, print_line: PrintLine = print_on_rank_0, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin to count what preparation does. `print_line`: shows one line to the user. `clock`: tells seconds."""
        self.phase = "looking at the files"
        self._print_line = print_line
        self._clock = clock
        self._started_at = clock()
        self._rows_done = 0
        self._rows_started_at = self._started_at
        # Of what was read so far: how long a line of text is.
        self._text_rows = 0
        self._text_bytes = 0
        # Of all inputs; None while that is not known.
        self._total_text_bytes = 0.0
        self._total_table_rows: int | None = None

    @contextmanager
    def printing(self) -> Iterator[None]:
        """Print a line on the progress every `LINE_EVERY_S` seconds, from a thread, while the body runs."""
        is_over = threading.Event()
        # A daemon, so that it never keeps a process alive that ends by an error.
        thread = threading.Thread(target=self._print_lines, args=(is_over,), name="preparation-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def estimate_rows(self, inputs: list[SourceInput], share: float) -> None:
        """Set how many rows are expected, for `share` (0 to 1) of the `inputs`, so that lines can say "of about N".

        A text file is estimated by its bytes, a table has a number of rows. No estimate is made for hub data sets, and for very
        many files.
        """
        paths: list[object] = []
        for source_input in inputs:
            paths += source_input.origin.paths
        if len(paths) > MAX_FILES_FOR_ESTIMATE:
            return
        if any(not isinstance(path, Path) or is_hub_path(path) for path in paths):
            return
        try:
            sizes = [source_input.origin.estimate_size() for source_input in inputs]
        except (DataError, OSError):  # whoever reads the file says what is wrong with it
            return
        self._total_text_bytes = share * sum(size.text_bytes for size in sizes)
        self._total_table_rows = round(share * sum(size.table_rows for size in sizes))

    def begin_rows(self) -> None:
        """Start counting rows."""
        self.phase = _ROWS_PHASE
        self._rows_done = 0
        self._rows_started_at = self._clock()

    def count_text_rows(self, row_ranges: Iterable[RowRange]) -> Iterator[RowRange]:
        """Hand on the ranges as they are. The lines of text files in them tell how long such a line is."""
        for row_range in row_ranges:
            line_bytes = [len(row.raw) + 1 for row in row_range.rows if isinstance(row, UnparsedRow)]
            self._text_rows += len(line_bytes)
            self._text_bytes += sum(line_bytes)
            yield row_range

    def add_done_rows(self, num_rows: int) -> None:
        """Count rows that are done."""
        self._rows_done += num_rows

    def progress_line(self) -> str:
        """Write one line on how far the preparation is: "preparing data: 1,200 of about 9,000 rows, 400 rows/s, 3 s".

        In phases that count no rows, such as "writing the reports", the line names the phase.
        """
        now = self._clock()
        elapsed_s = now - self._started_at
        if self.phase != _ROWS_PHASE:
            return f"preparing data: {self.phase}, {elapsed_s:.0f} s"
        rows_per_s = self._rows_done / max(now - self._rows_started_at, 1e-9)
        total = self._estimated_rows()
        of_total = ""
        if total is not None and total >= self._rows_done:  # an estimate that was passed is worth nothing
            of_total = f" of about {total:,}"
        return f"preparing data: {self._rows_done:,}{of_total} rows, {rows_per_s:,.0f} rows/s, {elapsed_s:.0f} s"

    def _estimated_rows(self) -> int | None:
        """About how many rows there are; None before the inputs are estimated, and before the first text row.

        Rows of text files are estimated from their bytes and the mean length of those read so far.
        """
        if self._total_table_rows is None:
            return None
        if self._total_text_bytes == 0:
            return self._total_table_rows
        if self._text_rows == 0:
            return None
        return self._total_table_rows + round(self._total_text_bytes * self._text_rows / self._text_bytes)

    def _print_lines(self, is_over: threading.Event) -> None:
        """The body of the thread that prints."""
        while not is_over.wait(LINE_EVERY_S):
            with suppress(OSError, ValueError):  # nobody reads what is printed
                self._print_line(self.progress_line())
