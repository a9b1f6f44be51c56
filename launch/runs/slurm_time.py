"""Reads and writes times in SLURM's format."""

from __future__ import annotations

import math
import re

CLOCK_REGEX = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")


def parse_slurm_time(slurm_time: str) -> float:
    """Read a time limit in SLURM's format, in seconds:

    - `90`: minutes
    - `90:30`: minutes and seconds
    - `1:30:00`: hours, minutes and seconds
    - `2-12`, `2-12:30` or `2-12:30:00`: days and hours, with minutes and seconds
    - `infinite`, or a text that is no time: infinity
    """
    match = CLOCK_REGEX.fullmatch(slurm_time.strip())
    if match is None:
        return math.inf
    numbers = [int(number) for number in match["clock"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
        return int(match["days"]) * 86400 + hours * 3600 + minutes * 60 + seconds
    if len(numbers) == 1:
        return numbers[0] * 60
    # The last number is seconds; each one before it is worth 60 times as much.
    return sum(number * 60**power for power, number in enumerate(reversed(numbers)))


def format_slurm_time(duration_s: float) -> str:
    """Write a duration as SLURM does: `h:mm:ss`, with days if there are any (`1-2:03:04`); `any time` for infinity."""
    if math.isinf(duration_s):
        return "any time"
    total_s = round(duration_s)
    days = f"{total_s // 86400}-" if total_s >= 86400 else ""
    return f"{days}{total_s % 86400 // 3600}:{total_s % 3600 // 60:02d}:{total_s % 60:02d}"
