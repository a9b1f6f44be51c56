"""Draws a curve as one line of characters."""

from __future__ import annotations

from launch.output import is_utf8

BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-~=+*#"
"""The same eight heights, for a stdout that is not UTF-8."""
MOST_POINTS = 60


def sparkline(points: list[float]) -> str:
    """A curve of at most `MOST_POINTS` points in a line of characters, low to high."""
    if not points:
        return ""
    bars = BARS if is_utf8() else ASCII_BARS
    low, high = min(points), max(points)
    span = (high - low) or 1
    return "".join(bars[int((point - low) / span * (len(bars) - 1))] for point in points[:MOST_POINTS])
