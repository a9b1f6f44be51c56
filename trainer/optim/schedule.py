"""The learning-rate schedule: a pure function of the step, so there is nothing to checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from strategies.settings import DESCRIBES, number, setting


class ScheduleName(StrEnum):
    """The names users type as `schedule=<name>`."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    wsd = "wsd"


SCHEDULES_BY_SETTING = {
    "decay_share": (ScheduleName.wsd,),
    "min_factor": (ScheduleName.cosine, ScheduleName.linear, ScheduleName.wsd),
}
"""Settings that have a meaning only under these schedules. A value that is typed under another schedule is refused."""


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """Warm-up, then the shape named by the group choice."""

    name: ScheduleName = setting(ScheduleName.cosine, reach=DESCRIBES)
    """Shape after warm-up: `cosine`, `linear`, `constant` or `wsd` (warmup-stable-decay)."""
    warmup_steps: int = number(0, least=0, advice="0 takes schedule.warmup_share")
    """Number of steps over which the learning rate rises linearly. 0: `warmup_share` decides."""
    warmup_share: float = number(0.03, least=0, most=1, advice="0.03 as a rule")
    """Share of all steps that warm up, 0 to 1, if `warmup_steps` is 0."""
    decay_share: float = number(0.2, least=0, most=1, advice="0.2 as a rule")
    """Only for wsd: share of all steps, at the end, over which the learning rate falls linearly."""
    min_factor: float = number(0.0, least=0, most=1, advice="0 ends at a rate of zero")
    """Learning rate at the end, as a share of the peak, 0 to 1."""


def warmup_steps(config: ScheduleConfig, total_steps: int) -> int:
    """Steps of linear warm-up in a run of `total_steps`."""
    warmup = config.warmup_steps or round(config.warmup_share * total_steps)
    return min(warmup, total_steps)


def lr_factor_at(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """The learning rate of the optimizer step with index `step` (0-based) of `total_steps`, as a share of the peak rate.

    Warm-up rises from 1/warmup at the first step to 1. Every shape but `constant` would reach `min_factor` one step after the
    last, so that no step is wasted at a rate of zero.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.name is ScheduleName.constant:
        return 1.0
    if config.name is ScheduleName.wsd:
        decay_steps = max(1, round(config.decay_share * total_steps))
        first_decay_step = total_steps - decay_steps
        # Negative while the rate is stable.
        decayed_share = (step - first_decay_step) / decay_steps
        height = 1.0 - min(1.0, max(0.0, decayed_share))
    else:
        decayed_share = (step - warmup) / max(1, total_steps - warmup)
        if config.name is ScheduleName.linear:
            height = 1.0 - decayed_share
        else:
            height = 0.5 * (1.0 + math.cos(math.pi * decayed_share))
    # `height` goes from 1 to 0. The factor goes from 1 to `min_factor`.
    return config.min_factor + (1.0 - config.min_factor) * height
