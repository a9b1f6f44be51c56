"""Whether a run has learned something: by comparison with one at a rate of zero, which holds on any processor.

How far a loss falls in a few steps is decided by rounding on tiny models; that it moved at all is not.
"""

LEAST_LEARNED = 1e-4
"""Ten times the tolerance of 1e-5: what a curve must differ by from one that stands still, or comparing it proves nothing."""


def learned(curve: list, still: list) -> float:
    """The largest relative difference of a loss or gradient norm (which moves more) from those at a rate of zero."""
    return max(abs(a / b - 1) for e, s in zip(curve, still, strict=True) for a, b in zip(e, s, strict=True))
