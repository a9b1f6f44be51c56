"""Numbers as people write them: on pages, on the screen, in tables."""

from __future__ import annotations

import math

UNKNOWN = "\N{EN DASH}"
"""What stands for a number that is not known."""
BYTES_OF_UNIT = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


def format_number(value: float | None, digits: int = 4) -> str:
    """Write a number for people, on pages and in tables: 27,051 for 27051.2, 2.336, 3.4e-05, 1.0e+236; a dash for None.

    From a thousand million on, and below a thousandth, it has two digits and an exponent. Else integers, and floats from ten
    thousand on, have no decimals. `digits`: significant digits of the others.
    """
    if value is None:
        return UNKNOWN
    if isinstance(value, float) and not math.isfinite(value):
        return "not a number" if math.isnan(value) else f"{value}".replace("inf", "infinite")
    size = abs(value)
    if size >= 1e9:
        return f"{value:.1e}"
    if isinstance(value, int) or size >= 10_000 or value == 0:
        return f"{value:,.0f}"
    if size < 1e-3:
        return f"{value:.1e}"
    decimals = max(digits - 1 - math.floor(math.log10(size)), 0)
    return f"{value:,.{decimals}f}"


def format_signed(value: float | None, digits: int = 4) -> str:
    """A difference: `format_number` with its sign, +0.125 or -0.125."""
    if value is None or math.isnan(value):
        return format_number(value, digits)
    return f"+{format_number(value, digits)}" if value > 0 else format_number(value, digits)


def format_percent(share: float | None) -> str:
    """A share as a percentage that never rounds something to nothing, nor a part to the whole: 41.3%, <0.1%."""
    if share is None or not math.isfinite(share):
        return UNKNOWN
    if 0 < share < 0.0005:
        return "<0.1%"
    if 0.9995 <= share < 1:
        return ">99.9%"
    return f"{share:.0%}" if share in (0, 1) else f"{share:.1%}"


def format_duration(seconds: float | None) -> str:
    """Write a time for people, in its two largest units: 85 ms, 0.35 s, 42 s, 3 min 20 s, 2 h 5 min; a dash for None."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    if 0 < seconds < 1:
        return f"{1000 * seconds:.0f} ms" if seconds < 0.1 else f"{seconds:.2f} s"
    if seconds < 59.5:  # more is rounded to a minute
        return f"{seconds:.1f} s" if 0 < seconds < 9.95 else f"{seconds:.0f} s"
    # (larger unit, smaller unit, seconds of each, seconds from which on the next larger unit is taken)
    units = (("min", "s", 60, 1, 3600), ("h", "min", 3600, 60, 86400), ("d", "h", 86400, 3600, math.inf))
    for large, small, large_s, small_s, end_s in units:
        # In whole small units: 200 s are 3 min and 20 s.
        count, rest = divmod(round(seconds / small_s), large_s // small_s)
        if count * large_s < end_s:
            return f"{count} {large} {rest} {small}" if rest else f"{count} {large}"
    raise AssertionError("days have no upper end")


def format_bytes(num_bytes: float | None) -> str:
    """An amount of memory or storage: 812 B, 1.4 MiB, 12.6 GiB."""
    if num_bytes is None or not math.isfinite(num_bytes):
        return UNKNOWN
    for unit, size in BYTES_OF_UNIT.items():
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes:,.0f} B"
