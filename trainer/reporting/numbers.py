"""Formats numbers for people."""

from __future__ import annotations

import math
from typing import Any


def format_setting(value: Any) -> str:
    """A value of a setting as people write it: 2e-4 for 0.0002, `none` for None."""
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


def name_of_readers(readers: int, degree: int) -> str:
    """Who reads documents of their own: `4 ranks`, or `2 groups of 4 ranks` if `degree` ranks share each row."""
    plural = "s" if readers > 1 else ""
    return f"{readers} rank{plural}" if degree == 1 else f"{readers} group{plural} of {degree} ranks"
