"""What stays is not looked at again: half a million objects of torch, transformers and DeepSpeed."""

import gc


def set_aside() -> None:
    """Let garbage go, and keep later collections away from what is left.

    DeepSpeed collects each time an engine is built, and simulations do: a third of a second with all that libraries leave.
    """
    gc.collect()
    gc.freeze()
