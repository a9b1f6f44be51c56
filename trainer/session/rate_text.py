"""What a run says of its learning rate and its length before it trains, in `--dry-run` and on the start screen."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config.run import RunConfig
from trainer.optim.rates import usual_learning_rate
from trainer.optim.schedule import warmup_steps

FEW_STEPS = 20
"""A run of fewer steps is noted: a usual learning rate hardly moves a model in so few."""
HIGH_RATE = 20
"""A learning rate of more than this many times the usual one is noted, unless it is advised for small models."""


@dataclass(frozen=True, slots=True)
class LearningRate:
    """The learning rate of a run and the usual one for such runs, from which `rate_lines` writes the start screen's lines."""

    peak: float = 0.0
    """`optim.lr`."""
    usual: float | None = None
    """The usual rate of this optimizer, tuning method and objective; None if none is known."""
    highest_advised: float | None = None
    warmup_steps: int = 0
    schedule: str = ""

    @property
    def is_far_too_high(self) -> bool:
        """Whether the rate is far above the usual one, and above all that are advised."""
        if self.usual is None or self.highest_advised is None:
            return False
        return self.peak > max(HIGH_RATE * self.usual, self.highest_advised)


def learning_rate_of(config: RunConfig, total_steps: int) -> LearningRate:
    """Collect what a run says of its learning rate before it trains: its peak, and the usual one for such a run to compare with.

    Usual is by optimizer, tuning method and objective.
    """
    advised = usual_learning_rate(config.optim, config.tuning.method, str(config.objective.name))  # None: none is known
    return LearningRate(
        peak=config.optim.peak_lr,
        usual=None if advised is None else advised.usual,
        highest_advised=None if advised is None else advised.high,
        warmup_steps=warmup_steps(config.schedule, total_steps),
        schedule=str(config.schedule.name),
    )


def rate_lines(rate: LearningRate, total_steps: int) -> list[str]:
    """Write the line on rate, warm-up and schedule, and notes if steps are few or the rate is far above the usual one."""
    lines = [f"learning rate: {rate.peak:g} after {rate.warmup_steps} steps of warm-up, then {rate.schedule}"]
    if total_steps < FEW_STEPS:
        steps = "1 step" if total_steps == 1 else f"{total_steps} steps"
        lines.append(
            f"note: the run takes only {steps}, and few models learn a task in fewer than {FEW_STEPS}; for more, "
            "raise budget.epochs or budget.steps, or lower batch.global"
        )
    if rate.usual is not None and rate.is_far_too_high:
        lines.append(
            f"note: optim.lr={rate.peak:g} is {rate.peak / rate.usual:,.0f} times the usual rate of this optimizer, method and "
            f"objective ({rate.usual:g}), and may destroy what the model knows"
        )
    return lines
