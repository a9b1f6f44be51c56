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

from strategies.redaction import redact
from trainer.pages.numbers import format_duration

MIN_BAR_WIDTH = 10
"""Columns that the bar keeps. Fields beside it are left out before it gets shorter."""
MAX_BAR_WIDTH = 40
"""Columns of the bar at most: a longer one tells no more."""
CLEAR_LINE_CODES = "\r\x1b[2K"
"""Control codes: go to the beginning of the line, and empty it."""


@dataclass(frozen=True, slots=True)
class RunSchedule:
    """Which steps a run takes, and when this attempt began: what the time to the end is estimated from."""

    total_steps: int
    """Steps of the run."""
    first_step: int
    """The step that this attempt began behind."""
    started_at: float
    """`time.perf_counter` when this attempt began."""
    evaluate_every: int = 0
    """Steps between evaluations; 0 where there are none before the end."""


class Console:
    """Prints lines and a progress bar on rank 0; writes the lines of every rank, with the time, to the rank's own log file."""

    def __init__(self, *, enabled: bool, log: Path | None = None) -> None:
        """`enabled`: whether lines are printed, on rank 0. `log`: the log file of this rank; None: none is written."""
        self.enabled = enabled
        self._shows_bar = enabled and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._shown_bar = ""
        self._log_file: TextIO | None = None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            self._log_file = log.open("a", encoding="utf-8", errors="backslashreplace")

    @property
    def width(self) -> int:
        """Columns a line may take now."""
        return shutil.get_terminal_size((100, 24)).columns

    def print_line(self, text: str) -> None:
        """Print a line above the progress bar, and write it to the log file."""
        self.write_to_log(text)
        if not self.enabled:
            return
        bar = self._shown_bar
        clear_bar = CLEAR_LINE_CODES if bar else ""
        print(f"{clear_bar}{text}", flush=not bar)
        self._draw_bar(bar)

    def write_to_log(self, text: str) -> None:
        """Write a line to the log file alone, with the time and without secrets."""
        if self._log_file is not None:
            with suppress(OSError):  # a full disk is reported by whoever writes what the run depends on
                self._log_file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {redact(text)}\n")
                self._log_file.flush()

    def show_step(self, row: dict[str, Any], schedule: RunSchedule) -> None:
        """Show the user the newest step of training: as a bar on a terminal, else as a line. The log file gets the line too.

        `row`: the step's metrics, as in `metrics.jsonl`.
        """
        line = " | ".join(_progress_fields(row, schedule))
        self.write_to_log(line)
        if not self._shows_bar:
            if self.enabled:
                print(line, flush=True)
            return
        self._draw_bar(_progress_bar(row, schedule, self.width - 1))
        if row["step"] >= schedule.total_steps:
            self.end_progress_bar()

    def end_progress_bar(self) -> None:
        """Leave the progress bar on its line and begin a new one, so that what is printed next stands on a line of its own."""
        if self._shown_bar:
            print(flush=True)
            self._shown_bar = ""

    def _draw_bar(self, bar: str) -> None:
        """Replace the bar by this text, on the same line of the terminal; an empty text leaves none."""
        self._shown_bar = bar
        if bar:
            sys.stdout.write(CLEAR_LINE_CODES + bar)
            sys.stdout.flush()


def _progress_fields(row: dict[str, Any], schedule: RunSchedule) -> list[str]:
    """What the screen and the log say of a step, field by field: ["step 10/100", "loss 2.3100", "grad 0.912", ...].

    `row`: the step's metrics, as in `metrics.jsonl`; what it lacks is left out.
    """
    steps_taken = max(1, row["step"] - schedule.first_step)
    steps_left = schedule.total_steps - row["step"]
    eta_s = (time.perf_counter() - schedule.started_at) / steps_taken * steps_left
    fields = [f"step {row['step']}/{schedule.total_steps}"]
    if "reward" in row:  # of answers that the model wrote: their loss is near 0 by construction and tells nothing
        fields.append(f"reward {row['reward']:.3f}")
    fields += [
        f"loss {row['loss']:.4f}",
        f"grad {row['grad_norm']:.3f}",
        f"lr {row['lr']:.2e}",
        f"{row['tokens_per_s']:,.0f} tok/s",
    ]
    if "mfu" in row:
        fields.append(f"mfu {row['mfu']:.1%}")
    fields += [
        f"mem {row['memory_gib']:.1f} GiB",
        f"wait {row['data_wait_s'] * 1e3:.0f} ms",
        f"eta {format_duration(round(eta_s))}",
    ]
    if row.get("skipped"):
        fields.append("skipped: not finite")
    return fields


def _progress_bar(row: dict[str, Any], schedule: RunSchedule, width: int) -> str:
    """Draw the progress bar of a terminal, with the most important fields of a step beside it: "step 10/100 ━━━━  loss 2.3100".

    As many fields as `width` columns have room for; only the step if there is no room for any.
    """
    from rich.console import Console as Terminal
    from rich.progress_bar import ProgressBar

    # A field begins with its name: "loss 2.3100".
    field_by_name = {field.split()[0]: field for field in _progress_fields(row, schedule)}
    step_field = field_by_name["step"]
    # Columns that are left beside the step and a short bar, which has a blank on either side.
    free_columns = width - MIN_BAR_WIDTH - 2 - len(step_field)
    other_fields = ""
    for field in _bar_fields_by_importance(row, schedule, field_by_name):
        field_after_blanks = f"  {field}"
        if len(other_fields) + len(field_after_blanks) > free_columns:
            break
        other_fields += field_after_blanks
    if not other_fields:
        return step_field[:width]
    # The bar gets the columns that the fields leave.
    bar_width = max(1, min(MAX_BAR_WIDTH, free_columns - len(other_fields) + MIN_BAR_WIDTH))
    bar = ProgressBar(total=schedule.total_steps, completed=row["step"], width=bar_width)
    terminal = Terminal(file=sys.stdout, width=width, legacy_windows=False)
    with terminal.capture() as drawn:
        terminal.print(bar, end="")
    return f"{step_field} {drawn.get().rstrip()}{other_fields}"


def _bar_fields_by_importance(row: dict[str, Any], schedule: RunSchedule, field_by_name: dict[str, str]) -> list[str]:
    """Which fields stand beside the progress bar, the most important first, since a narrow terminal has room for the first ones.

    A field that the step does not have is left out. `field_by_name`: the fields of the step's log line by their first word,
    such as {"loss": "loss 2.3100"}.
    """
    next_evaluation = ""
    steps_left = schedule.total_steps - row["step"]
    if schedule.evaluate_every and steps_left > 0:
        steps_to_evaluation = -row["step"] % schedule.evaluate_every
        if steps_to_evaluation:
            next_evaluation = f"eval in {min(steps_to_evaluation, steps_left)}"  # there is one at the end, too
    fields = [
        field_by_name.get("reward", ""),
        field_by_name["loss"],
        field_by_name["eta"],
        field_by_name.get("skipped:", ""),
        f"{row['tokens_per_s']:,.0f} tok/s",
        field_by_name["mem"],
        next_evaluation,
        field_by_name["lr"],
        field_by_name["grad"],
        field_by_name.get("mfu", ""),
    ]
    return [field for field in fields if field]
