"""The learning-rate schedule: a pure function of the step, so there is nothing to checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ScheduleName(StrEnum):
    """The names users type as `schedule=<name>`."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    wsd = "wsd"


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """Warm-up, then the shape named by the group choice."""

    name: ScheduleName = ScheduleName.cosine
    """Shape after warm-up: `cosine`, `linear`, `constant` or `wsd` (warmup-stable-decay)."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly; 0 takes `warmup_share` instead."""
    warmup_share: float = 0.03
    """Share of all steps spent warming up, 0 to 1, when `warmup_steps` is 0."""
    decay_share: float = 0.2
    """wsd only: share of all steps, at the end, over which the rate falls linearly."""
    min_factor: float = 0.0
    """Factor of the peak rate at the end, 0 to 1."""
