"""Whether a run has learned something: by comparison with one at a rate of zero, which holds on any processor.

How far a loss falls in a few steps is decided by rounding on tiny models; that it moved at all is not.
"""

LEAST_LEARNED = 1e-4
"""Ten times the tolerance of 1e-5: what a curve must differ by from one that stands still, or comparing it proves nothing."""


def learned(curve: list, still: list) -> float:
    """How far a curve is from that at a rate of zero: `moved` of the steps that differ most."""
    return max(moved(row, other) for row, other in zip(curve, still, strict=True))


def moved(row: list[float], other: list[float]) -> float:
    """The largest relative difference of a loss or gradient norm (which moves more) of the same batch, before and after."""
    return max(abs(a / b - 1) for a, b in zip(row, other, strict=True))
