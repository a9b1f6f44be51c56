"""Formats numbers for people."""

from __future__ import annotations

import math
from typing import Any


def short(value: Any) -> str:
    """A value as people write it: 2e-4 for 0.0002."""
    if value is None:
        return "none"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return str(value)
    if value == 0 or not math.isfinite(value) or 1e-2 <= abs(value) < 1e5:
        return f"{value:g}"
    digits, _, exponent = f"{value:.6e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def readable(value: float) -> str:
    """A metric with four decimals; from a million on with two digits and an exponent, as 1.0e+236."""
    return f"{value:.4f}" if abs(value) < 1e6 or not math.isfinite(value) else f"{value:.1e}"
