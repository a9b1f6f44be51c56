"""What the training loop takes: its settings, where what it produces goes, and what may end it early.

`trainer/run.py` builds them. Classes are imported for types alone, so that importing the loop loads neither a model, a
task nor a tracker.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.evaluation.base import EvaluationConfig
from trainer.optim.schedule import ScheduleConfig

if TYPE_CHECKING:
    from trainer.checkpoints.manager import Checkpoints
    from trainer.monitors.anomalies import Guards
    from trainer.monitors.detectors import ChallengeDetectors
    from trainer.monitors.stragglers import Stragglers
    from trainer.reporting.console import Console
    from trainer.reporting.metrics import Meter
    from trainer.reporting.tracking import Trackers
    from trainer.stopping.preempt import RankStopAgreement

Row = dict[str, Any]
"""The numbers of one step, by name, as a line of `metrics.jsonl` has them; `step` counts from 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopSettings:
    """The part of a run's configuration that the loop reads, with what is derived from it."""

    total_steps: int
    """Optimizer steps of the whole run, those before a resume included."""
    seed: int
    lr: float
    """Peak learning rate, as it is logged. The optimizer's parameter groups have their own."""
    schedule: ScheduleConfig
    evaluation: EvaluationConfig
    """`greater_is_better` is resolved: never None."""
    evaluate_every: int = 0
    """Steps between evaluations; 0 evaluates only at the end."""
    intermediate_loss_only: bool = False
    """Whether evaluations before the last step compute the held-out loss alone (`evaluation.every_steps=auto`)."""
    log_every: int
    """Steps between two reads of the device's metric buffer."""
    save_final: bool
    """Whether a checkpoint is written after the last step."""
    save_for_export: bool = False
    """Whether one is written without `save_final` too, because the export is read out of it. It does not stay."""


@dataclass(slots=True)
class Sinks:
    """Where what a run produces goes: metrics, lines for the user, checkpoints."""

    meter: Meter
    metrics: Trackers
    display: Console
    checkpoints: Checkpoints
    announce_step: Callable[[int], None] = lambda step: None
    """Called with the number of the step about to be taken, so that a failure can name it. Local."""
    require_run_dir_ownership: Callable[[], None] = lambda: None
    """Called before a checkpoint is written. All ranks must call. Raises LeaseLost if another attempt owns the directory."""


@dataclass(slots=True)
class Monitors:
    """What may end a run before its budget is spent, or leave an update out. All ranks come to the same answers."""

    stop_agreement: RankStopAgreement
    guards: Guards
    stragglers: Stragglers
    evaluations: ChallengeDetectors
