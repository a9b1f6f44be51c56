"""The settings of the guards."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Action(StrEnum):
    """What is done about a step that stands out."""

    note = "note"
    skip = "skip"


@dataclass(kw_only=True, slots=True)
class GuardsConfig:
    """What is done about steps whose loss or gradient norm stands out from those before."""

    loss: Action = Action.note
    """A step's loss that stands out: `note` it, or `skip` the update, which costs a small reduction each step."""
    grad_norm: Action = Action.note
    """A step's gradient norm before clipping that stands out: `note` it, or `skip` the update, at the same cost."""
    window: int = 100
    """Steps with whose median a step is compared: the newest ones that were not left out. None stands out before there is a
    quarter of them."""
    threshold: float = 8.0
    """Standard deviations above that median from which a step stands out, reckoned from the median absolute deviation."""
