"""Reads and writes times in SLURM's format."""

from __future__ import annotations

import math
import re

CLOCK = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")


def seconds(text: str) -> float:
    """SLURM's `[days-]hours:minutes:seconds`, `minutes:seconds` or minutes; `infinite` and what is no time are endless."""
    found = CLOCK.fullmatch(text.strip())
    if found is None:
        return math.inf
    parts = [int(part) for part in found["clock"].split(":")]
    if found["days"] is not None:  # days-hours[:minutes[:seconds]]
        hours, minutes, rest = (*parts, 0, 0)[:3]
        return int(found["days"]) * 86400 + hours * 3600 + minutes * 60 + rest
    if len(parts) == 1:
        return parts[0] * 60
    return sum(part * 60**power for power, part in enumerate(reversed(parts)))


def clock(value: float) -> str:
    """Hours, minutes and seconds, with days where there are any."""
    if math.isinf(value):
        return "any time"
    whole = round(value)
    days = f"{whole // 86400}-" if whole >= 86400 else ""
    return f"{days}{whole % 86400 // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
