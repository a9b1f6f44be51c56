"""What a person sees: on rank 0 a live line on a terminal, or one line an interval elsewhere; for every rank a log file."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any, TextIO


class Console:
    """Prints on the main rank; writes every rank's lines, with the time, to its own file."""

    def __init__(self, *, enabled: bool, log: Path | None = None) -> None:
        self.enabled = enabled
        self._live = enabled and sys.stdout.isatty()
        self._open_line = False
        self.width = shutil.get_terminal_size((100, 24)).columns
        """Columns a line may take."""
        self._log: TextIO | None = None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            self._log = log.open("a", encoding="utf-8")

    def say(self, text: str) -> None:
        """A line that stays."""
        self.note(text)
        if not self.enabled:
            return
        if self._open_line:
            sys.stdout.write("\n")
            self._open_line = False
        print(text, flush=True)

    def note(self, text: str) -> None:
        """A line for the log file alone."""
        if self._log is not None:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self._log.flush()

    def progress(self, row: dict[str, Any], *, total: int, began: float, first_step: int) -> None:
        """Show the newest step; `began` is the `time.perf_counter` at which step `first_step` started."""
        line = _line(row, total=total, began=began, first_step=first_step)
        self.note(line)
        if not self.enabled:
            return
        if self._live:
            sys.stdout.write("\r\x1b[2K" + line[: self.width - 1])
            sys.stdout.flush()
            self._open_line = True
        else:
            print(line, flush=True)


def _line(row: dict[str, Any], *, total: int, began: float, first_step: int) -> str:
    done = row["step"] - first_step
    left = (time.perf_counter() - began) / max(1, done) * (total - row["step"])
    parts = [
        f"step {row['step']}/{total}",
        f"loss {row['loss']:.4f}",
        f"grad {row['grad_norm']:.3f}",
        f"lr {row['lr']:.2e}",
        f"{row['tokens_per_s']:,.0f} tok/s",
        f"mem {row['memory_gib']:.1f} GiB",
        f"wait {row['data_wait_s'] * 1e3:.0f} ms",
        f"left {_clock(left)}",
    ]
    if "mfu" in row:
        parts.insert(5, f"mfu {row['mfu']:.1%}")
    if row.get("skipped"):
        parts.append("SKIPPED (not finite)")
    return " | ".join(parts)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
