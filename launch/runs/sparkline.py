"""Lines of a terminal's width, and curves in a line of characters."""

from __future__ import annotations

import shutil
import textwrap

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float]) -> str:
    """A curve in a line of characters, low to high."""
    if not values:
        return ""
    low, high = min(values), max(values)
    return "".join(BARS[int((value - low) / ((high - low) or 1) * (len(BARS) - 1))] for value in values[:60])


def width() -> int:
    """Columns of the terminal, at least 80."""
    return max(80, shutil.get_terminal_size((80, 24)).columns)


def cut(said: str) -> str:
    """One line, no longer than that."""
    return said if len(said) <= width() else said[: width() - 3] + "..."


def folded(said: str, indent: int = 4) -> list[str]:
    """As many lines as it takes, all but the first indented."""
    return textwrap.wrap(said, width(), subsequent_indent=" " * indent, break_on_hyphens=False)
