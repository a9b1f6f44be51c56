"""Settings of the anomaly guards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from strategies.settings import DESCRIBES, number, setting


class Action(StrEnum):
    """What is done about a step that stands out."""

    note = "note"
    skip = "skip"
    rollback = "rollback"


OUTCOME_TEXT_BY_ACTION = {
    Action.note: "noted",
    Action.skip: "its update was left out",
    Action.rollback: "the run goes back to a checkpoint from before it and passes over its samples",
}
"""How the screen describes each action."""


def outlier_text(values: Mapping[str, Any], scores: Mapping[str, float], level_began: int | None = None) -> str:
    """Say which numbers of a step stand out and how far: "loss 9.5 (12.1 standard deviations above the median)".

    `values`: loss, gradient norm or both. `scores`: how far each is above the median. `level_began`: the first step since which
    they have stayed high; they are then medians of the last steps. None: a single step stands out.
    """
    clauses = []
    for name, value in values.items():
        if not isinstance(value, int | float):  # None in `events.jsonl`: it was not finite
            continue
        clause = f"{name} {value:.4g}"
        if level_began is not None:
            clause = f"{name} stays at {value:.4g} since step {level_began}"
        if name in scores:
            clause += f" ({scores[name]:.1f} standard deviations above the median)"
        clauses.append(clause)
    return " and ".join(clauses)


@dataclass(kw_only=True, slots=True)
class GuardsConfig:
    """What is done about steps whose loss or gradient norm stands out from those before."""

    loss: Action = setting(Action.note, reach=DESCRIBES)
    """What happens if a step's loss is an outlier: `note` it; `skip` the update, which costs a small reduction in each step; or
    `rollback` to an earlier checkpoint and leave the step's samples out."""
    grad_norm: Action = setting(Action.note, reach=DESCRIBES)
    """What happens if a step's gradient norm before clipping is an outlier: `note`, `skip` or `rollback`, as for `loss`."""
    window: int = number(100, least=10, most=1000, advice="100 as a rule")
    """Number of recent steps with whose median a step is compared. Steps that were left out do not count. Steps are judged from
    the 6th on, with a wider tolerance until a quarter of the window is filled."""
    threshold: float = number(8.0, above=0, advice="6 to 10 as a rule; lower finds more, false alarms too")
    """Standard deviations above the median from which a step is an outlier. The standard deviation is estimated from the median
    absolute deviation."""
    replicas_every_steps: int = number(100, least=0, advice="100 as a rule; 0 never compares")
    """Steps between comparisons of the parameters that several ranks hold in copy (ddp, hsdp, zero1, zero2), made when metrics
    are logged and before each checkpoint. 0: never."""
    max_rollbacks: int = number(5, least=1, advice="5 as a rule; many mean that the samples are not the cause")
    """Largest number of rollbacks of a run, also over resumes. One more ends the run."""
