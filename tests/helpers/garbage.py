"""What stays is not looked at again: half a million objects of torch, transformers and DeepSpeed."""

import gc


def look_seldom() -> None:
    """Look for garbage every 50,000 objects instead of every 700: that took a tenth of all time, mostly to look at what stays.

    Each file of tests, and each case of ranks that stay up, begins with a look at everything (`set_aside`).
    """
    gc.set_threshold(50_000, 20, 20)


def set_aside() -> None:
    """Let garbage go, and keep later collections away from what is left.

    DeepSpeed collects each time an engine is built, and simulations do: a third of a second with all that libraries leave.
    """
    gc.collect()
    gc.freeze()
