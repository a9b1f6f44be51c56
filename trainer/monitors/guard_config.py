"""Settings of the anomaly guards."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from strategies.settings import DESCRIBES, number, setting


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
"""How the screen describes each action."""


@dataclass(kw_only=True, slots=True)
class GuardsConfig:
    """What is done about steps whose loss or gradient norm stands out from those before."""

    loss: Action = setting(Action.note, reach=DESCRIBES)
    """A step's loss that stands out: `note` it, `skip` the update, which costs a small reduction each step, or `rollback` to the
    last checkpoint and pass over its samples."""
    grad_norm: Action = setting(Action.note, reach=DESCRIBES)
    """A step's gradient norm before clipping that stands out: `note`, `skip` or `rollback`, likewise."""
    window: int = number(100, least=10, most=1000, advice="100 as a rule")
    """Steps with whose median a step is compared: the newest ones that were not left out. Steps are judged from the 6th one on,
    with a wider spread until there is a quarter of them."""
    threshold: float = number(8.0, above=0, advice="6 to 10 as a rule; lower finds more, false alarms too")
    """Standard deviations above that median from which a step stands out, reckoned from the median absolute deviation."""
    replicas_every_steps: int = number(100, least=0, advice="100 as a rule; 0 never compares")
    """Steps between comparisons of the parameters that ranks hold alike (ddp, hsdp, zero1, zero2), made when rows are logged, and
    before each checkpoint; 0: never."""
    max_rollbacks: int = number(5, least=1, advice="5 as a rule; many mean that the samples are not the cause")
    """Times that a run goes back for such steps, resumed parts included; the next one ends it."""
