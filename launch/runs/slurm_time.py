"""Reads and writes times in SLURM's format."""

from __future__ import annotations

import math
import re

CLOCK = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")


def seconds(text: str) -> float:
    """SLURM's `[days-]hours:minutes:seconds`, `minutes:seconds` or minutes, in seconds.

    `infinite`, and a text that is no time, are endless.
    """
    match = CLOCK.fullmatch(text.strip())
    if match is None:
        return math.inf
    parts = [int(part) for part in match["clock"].split(":")]
    if match["days"] is not None:  # days-hours[:minutes[:seconds]]
        hours, minutes, rest = (*parts, 0, 0)[:3]
        return int(match["days"]) * 86400 + hours * 3600 + minutes * 60 + rest
    if len(parts) == 1:  # minutes alone
        return parts[0] * 60
    return sum(part * 60**power for power, part in enumerate(reversed(parts)))


def clock(duration_s: float) -> str:
    """Hours, minutes and seconds, with days if there are any: `1-02:03:04`."""
    if math.isinf(duration_s):
        return "any time"
    total = round(duration_s)
    days = f"{total // 86400}-" if total >= 86400 else ""
    return f"{days}{total % 86400 // 3600}:{total % 3600 // 60:02d}:{total % 60:02d}"
