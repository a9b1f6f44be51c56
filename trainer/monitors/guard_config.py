"""The settings of the guards."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Action(StrEnum):
    """What is done about a step that stands out."""

    note = "note"
    skip = "skip"
    rollback = "rollback"


DONE = {
    Action.note: "noted",
    Action.skip: "its update was left out",
    Action.rollback: "the run goes back to its last checkpoint and passes over its samples",
}
"""What is said of it."""


@dataclass(kw_only=True, slots=True)
class GuardsConfig:
    """What is done about steps whose loss or gradient norm stands out from those before."""

    loss: Action = Action.note
    """A step's loss that stands out: `note` it, `skip` the update, which costs a small reduction each step, or `rollback` to the
    last checkpoint and pass over its samples."""
    grad_norm: Action = Action.note
    """A step's gradient norm before clipping that stands out: `note`, `skip` or `rollback`, likewise."""
    window: int = 100
    """Steps with whose median a step is compared: the newest ones that were not left out. None stands out before there is a
    quarter of them."""
    threshold: float = 8.0
    """Standard deviations above that median from which a step stands out, reckoned from the median absolute deviation."""
    replicas_every_steps: int = 100
    """Steps between comparisons of the parameters that ranks hold alike (ddp, hsdp, zero1, zero2), made when rows are logged, and
    before each checkpoint; 0: never."""
    max_rollbacks: int = 5
    """Times that a run goes back for such steps, resumed parts included; the next one ends it."""
