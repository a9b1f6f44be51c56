"""The screen and the log files: on rank 0 a progress bar or one line an interval, and a log file for every rank."""

from __future__ import annotations

import os
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from strategies.redaction import redacted

LEAST_BAR = 10
"""Columns below which a bar says nothing; what has less room is left out before it."""
CLEAR = "\r\x1b[2K"
"""To the beginning of the line, which is emptied."""


@dataclass(frozen=True, slots=True)
class Course:
    """What a step is a part of."""

    total: int
    """Steps of the run."""
    first: int
    """The step that this attempt began behind."""
    began: float
    """`time.perf_counter` at that moment."""
    evaluate_every: int = 0
    """Steps between evaluations; 0 where there are none before the end."""


class Console:
    """Prints on the main rank; writes every rank's lines, with the time, to its own file."""

    def __init__(self, *, enabled: bool, log: Path | None = None) -> None:
        self.enabled = enabled
        self._live = enabled and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._bar = ""
        self._log: TextIO | None = None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            self._log = log.open("a", encoding="utf-8", errors="backslashreplace")

    @property
    def width(self) -> int:
        """Columns a line may take now."""
        return shutil.get_terminal_size((100, 24)).columns

    def say(self, text: str) -> None:
        """A line that stays; a bar is below it."""
        self.note(text)
        if self.enabled:
            bar = self._bar
            print(f"{CLEAR if bar else ''}{text}", flush=not bar)
            self._draw(bar)

    def note(self, text: str) -> None:
        """A line for the log file alone."""
        if self._log is not None:
            with suppress(OSError):  # a full disk is told of, or gone on with, by what must be written
                self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {redacted(text)}\n")
                self._log.flush()

    def progress(self, row: dict[str, Any], course: Course) -> None:
        """Show the newest step."""
        self.note(line := " | ".join(_parts(row, course)))
        if not self._live:
            if self.enabled:
                print(line, flush=True)
            return
        self._draw(_bar(row, course, self.width - 1))
        if row["step"] >= course.total:
            self.leave()

    def leave(self) -> None:
        """End the bar where it is: what is printed next, by whomever, begins a line of its own."""
        if self._bar:
            print(flush=True)
            self._bar = ""

    def _draw(self, bar: str) -> None:
        self._bar = bar
        if bar:
            sys.stdout.write(CLEAR + bar)
            sys.stdout.flush()


def _parts(row: dict[str, Any], course: Course) -> list[str]:
    """What is said of a step, in the order of a log's line."""
    left = (time.perf_counter() - course.began) / max(1, row["step"] - course.first) * (course.total - row["step"])
    return [
        f"step {row['step']}/{course.total}",
        f"loss {row['loss']:.4f}",
        f"grad {row['grad_norm']:.3f}",
        f"lr {row['lr']:.2e}",
        f"{row['tokens_per_s']:,.0f} tok/s",
        *([f"mfu {row['mfu']:.1%}"] if "mfu" in row else []),
        f"mem {row['memory_gib']:.1f} GiB",
        f"wait {row['data_wait_s'] * 1e3:.0f} ms",
        f"left {_clock(left)}",
        *(["SKIPPED (not finite)"] if row.get("skipped") else []),
    ]


def _bar(row: dict[str, Any], course: Course, width: int) -> str:
    """The same as a bar with what most matters beside it, as far as `width` columns have room for it."""
    from rich.console import Console as Terminal
    from rich.progress_bar import ProgressBar

    said = {part.split()[0]: part for part in _parts(row, course)}
    rate = f"{row['tokens_per_s']:,.0f} tok/s"
    until = -row["step"] % course.evaluate_every if course.evaluate_every else 0
    ahead = f"eval in {min(until, course.total - row['step'])}" if until and row["step"] < course.total else ""
    wanted = [said["loss"], said["left"], said.get("SKIPPED", ""), rate, said["mem"], ahead]
    wanted += [said["lr"], said["grad"], said.get("mfu", "")]
    head, told, room = said["step"], "", width - LEAST_BAR - 2 - len(said["step"])
    for part in filter(None, wanted):
        if len(told) + 2 + len(part) > room:
            break
        told += f"  {part}"
    bar = ProgressBar(total=course.total, completed=row["step"], width=max(1, min(40, room - len(told) + LEAST_BAR)))
    terminal = Terminal(file=sys.stdout, width=width, legacy_windows=False)
    with terminal.capture() as drawn:
        terminal.print(bar, end="")
    return f"{head} {drawn.get().rstrip()}{told}" if told else head[:width]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
