"""Formats numbers for people."""

from __future__ import annotations

import math
from typing import Any


def format_setting(value: Any) -> str:
    """Write the value of a setting as people type it, for names of runs and tables: 2e-4 for 0.0002, `none` for None."""
    if value is None:
        return "none"
    if not isinstance(value, float):
        return str(value)
    if value == 0 or not math.isfinite(value) or 1e-2 <= abs(value) < 1e5:
        return f"{value:g}"
    digits, _, exponent = f"{value:.6e}".partition("e")
    digits = digits.rstrip("0").rstrip(".")
    return f"{digits}e{int(exponent)}"  # int takes off the sign of a plus, and leading zeros


def format_metric(value: float) -> str:
    """A metric with four decimals; from a million on with two digits and an exponent, as 1.0e+236."""
    if math.isfinite(value) and abs(value) >= 1e6:
        return f"{value:.1e}"
    return f"{value:.4f}"


def format_times(count: int) -> str:
    """How often something happened: `once`, `twice`, `3 times`."""
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def format_dp_ranks(dp_size: int, sequence_size: int) -> str:
    """The data-parallel ranks in words: `4 ranks`, or `2 groups of 4 ranks` if 4 ranks share each packed sequence."""
    plural = "s" if dp_size > 1 else ""
    if sequence_size == 1:
        return f"{dp_size} rank{plural}"
    return f"{dp_size} group{plural} of {sequence_size} ranks"
