"""Draws a curve as one line of characters."""

from __future__ import annotations

from launch.output import is_utf8

BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-~=+*#"
"""The same eight heights, for a stdout that is not UTF-8."""
MOST_POINTS = 60


def sparkline(points: list[float]) -> str:
    """A curve as one line of block characters, lowest to highest; only the first `MOST_POINTS` points are drawn."""
    if not points:
        return ""
    bars = BARS if is_utf8() else ASCII_BARS
    low = min(points)
    span = (max(points) - low) or 1  # a flat curve
    characters = []
    for point in points[:MOST_POINTS]:
        height = int((point - low) / span * (len(bars) - 1))
        characters.append(bars[height])
    return "".join(characters)
