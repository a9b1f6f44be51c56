"""Progress of `shardtune plan` on stderr: what is simulated, and how many of how many options are done."""

from __future__ import annotations

import sys
import time

from launch.streams import write_control_sequence

MAX_LINE_CHARACTERS = 96
"""A longer line would wrap in most terminals, and then could not be written over."""
SECONDS_BETWEEN_LINES = 15.0
"""In a log file. A terminal shows each change."""


class PlanProgress:
    """Prints how far a plan is: in a terminal on one line that is written over, in a log file on a line every 15 seconds."""

    def __init__(self) -> None:
        """The time that is shown counts from here."""
        self._is_terminal = sys.stderr.isatty()
        self._started_at = time.monotonic()
        self._next_line_at = self._started_at + SECONDS_BETWEEN_LINES

    def show(self, num_done: int, num_options: int, running: str) -> None:
        """Show that `num_done` of `num_options` are simulated. Called each second at least while workers simulate.

        `running`: the overrides of the option that has been simulated longest, such as "strategy=zero3
        strategy.activation_checkpointing=full"; empty if all are done.
        """
        now = time.monotonic()
        if num_done == num_options:
            self.clear()
            print(f"simulated {num_options} option{'' if num_options == 1 else 's'}", file=sys.stderr, flush=True)
            return
        line = f"simulated {num_done} of {num_options} options in {now - self._started_at:.0f} s; now {running}"
        if self._is_terminal:
            self.show_phase(line)
        elif now >= self._next_line_at:
            print(line, file=sys.stderr, flush=True)
            self._next_line_at = now + SECONDS_BETWEEN_LINES

    def show_phase(self, text: str) -> None:
        """Show in a terminal what is done now; the next text replaces it. Nothing is printed elsewhere."""
        if self._is_terminal:
            self.clear()
            print(text[:MAX_LINE_CHARACTERS], end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Erase the line in a terminal, so that other output can follow."""
        if self._is_terminal:
            write_control_sequence(sys.stderr, "\r\033[K")  # back to the beginning of the line, and erase it
            sys.stderr.flush()
