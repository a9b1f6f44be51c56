"""What the training loop is given: what it goes by, where what it says goes, what it watches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from trainer.checkpoints.manager import Checkpoints
from trainer.evaluation.base import EvaluationConfig
from trainer.monitors.anomalies import Guards
from trainer.monitors.config import ChallengesConfig
from trainer.monitors.detectors import Challenges
from trainer.monitors.stragglers import Stragglers
from trainer.optim.schedule import ScheduleConfig
from trainer.reporting.console import Console
from trainer.reporting.metrics import Meter
from trainer.reporting.tracking import Trackers
from trainer.stopping.preempt import Agreement


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopSettings:
    """What the loop goes by."""

    total_steps: int
    """Optimizer steps of the whole run."""
    seed: int
    lr: float
    """Peak rate, as it is reported; the optimizer's groups have their own."""
    schedule: ScheduleConfig
    evaluation: EvaluationConfig
    """With `greater_is_better` as it is."""
    log_every: int
    """Steps between reads of the device's metric buffer."""
    save_final: bool
    """Whether a checkpoint is written after the last step."""


@dataclass(slots=True)
class Output:
    """Where what a run has to say goes."""

    meter: Meter
    trackers: Trackers
    console: Console
    checkpoints: Checkpoints
    at_step: Callable[[int], None] = lambda step: None
    """Told the step about to be taken, so that a failure can name it."""
    still_ours: Callable[[], None] = lambda: None
    """Asked by all ranks before a checkpoint is written; raises where another attempt owns the directory."""


@dataclass(slots=True)
class Watch:
    """What may end a run before its budget is spent, or leave an update out; all ranks come to the same answers."""

    agreement: Agreement
    """Whether any rank was told to stop."""
    guards: Guards
    """Which steps stand out."""
    stragglers: Stragglers
    """Which ranks hold the others up."""
    challenges: Challenges = field(default_factory=lambda: Challenges(ChallengesConfig(), 1, "loss"))
    """What each evaluation says of overfitting, forgetting and answers."""
