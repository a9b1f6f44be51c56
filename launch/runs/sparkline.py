"""Draws a curve as one line of characters."""

from __future__ import annotations

from launch.output import stdout_shows_unicode

BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-~=+*#"
"""The same eight heights, for a stdout that is not UTF-8."""
MAX_POINTS = 60
"""Values that are drawn: a longer line would be folded on a terminal."""


def sparkline(values: list[float]) -> str:
    """Draw a curve as one line of block characters, the lowest value as the lowest block: `▁▃▅█`.

    Only the first `MAX_POINTS` values are drawn. Empty without values.
    """
    if not values:
        return ""
    bars = BARS if stdout_shows_unicode() else ASCII_BARS
    lowest = min(values)
    span = (max(values) - lowest) or 1  # a flat curve would be divided by 0
    characters = []
    for value in values[:MAX_POINTS]:
        bar_index = int((value - lowest) / span * (len(bars) - 1))
        characters.append(bars[bar_index])
    return "".join(characters)
