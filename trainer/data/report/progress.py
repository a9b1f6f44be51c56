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
from trainer.data.read.json_rows import Line
from trainer.data.read.paths import is_hub
from trainer.data.sources import Input, RowRange

LINE_EVERY_S = 15.0
"""Seconds between two lines."""
MAX_FILES_FOR_ESTIMATE = 1000
"""Files whose heads are looked at for an estimate."""
PrintLine = Callable[[str], None]
"""Prints a line."""


def print_on_rank_0(line: str) -> None:
    """Print to stderr, on the rank whose lines a user sees."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


class PreparationProgress:
    """Counts what preparation has done, and prints it from a thread of its own.

    Native code may keep that thread waiting as long as it keeps the interpreter's lock.
    """

    def __init__(self, print_line: PrintLine = print_on_rank_0, clock: Callable[[], float] = time.monotonic) -> None:
        self.phase = "looking at the files"
        self._print_line = print_line
        self._clock = clock
        self._started_at = clock()
        self._rows_done = 0
        self._rows_started_at = self._started_at
        self._text_rows = 0
        self._text_bytes = 0
        self._total_bytes = 0.0
        self._total_table_rows: int | None = None

    @contextmanager
    def printing(self) -> Iterator[None]:
        """Say a line every `LINE_EVERY_S` seconds as long as this is entered."""
        over = threading.Event()
        # A daemon, so that it never keeps a process alive that ends by an error.
        thread = threading.Thread(target=self._print_lines, args=(over,), name="preparation-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def expect(self, inputs: list[Input], share: float) -> None:
        """Estimate how many rows there are, for `share` of the `inputs`; unknown for hub data sets and for very many files."""
        paths: list[object] = []
        for source_input in inputs:
            paths += source_input.origin.paths
        if len(paths) > MAX_FILES_FOR_ESTIMATE:
            return
        if any(not isinstance(path, Path) or is_hub(path) for path in paths):
            return
        try:
            extents = [source_input.origin.extent() for source_input in inputs]
        except (DataError, OSError):  # whoever reads the file says what is wrong with it
            return
        self._total_bytes = share * sum(size for size, _ in extents)
        self._total_table_rows = round(share * sum(rows for _, rows in extents))

    def begin_rows(self) -> None:
        """Start counting rows."""
        self.phase = "rows"
        self._rows_done = 0
        self._rows_started_at = self._clock()

    def count_text_rows(self, jobs: Iterable[RowRange]) -> Iterator[RowRange]:
        """The jobs, as they are; lines of text files among them tell how long such a line is."""
        for job in jobs:
            line_bytes = [len(row.raw) + 1 for row in job.rows if isinstance(row, Line)]
            self._text_rows += len(line_bytes)
            self._text_bytes += sum(line_bytes)
            yield job

    def count_done(self, rows: int) -> None:
        """Count rows that are done."""
        self._rows_done += rows

    def line(self) -> str:
        """One line on how far the preparation is."""
        now = self._clock()
        if self.phase != "rows":
            return f"preparing data: {self.phase}, {now - self._started_at:.0f} s"
        rate = self._rows_done / max(now - self._rows_started_at, 1e-9)
        total = self._total_rows()
        of_total = f" of about {total:,}" if total is not None and total >= self._rows_done else ""
        return f"preparing data: {self._rows_done:,}{of_total} rows, {rate:,.0f} rows/s, {now - self._started_at:.0f} s"

    def _total_rows(self) -> int | None:
        """The estimate; None while nothing is known of the length of a line."""
        if self._total_table_rows is None:
            return None
        if self._total_bytes == 0:
            return self._total_table_rows
        if self._text_rows == 0:
            return None
        return self._total_table_rows + round(self._total_bytes * self._text_rows / self._text_bytes)

    def _print_lines(self, over: threading.Event) -> None:
        while not over.wait(LINE_EVERY_S):
            with suppress(OSError, ValueError):  # nobody reads what is printed
                self._print_line(self.line())
