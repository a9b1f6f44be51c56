"""Settles `optim.lr` where nobody has set it: the usual rate, or that with which the run began."""

from __future__ import annotations

from trainer.config.run import LR, RunConfig
from trainer.optim.config import OptimName
from trainer.optim.rates import missing_rate, usual_rate
from trainer.reporting.resolution import Resolution

EARLIER_DEFAULTS = {OptimName.lion: 3e-6, OptimName.adafactor: 1e-3, OptimName.sgd: 1e-2}
"""What an unset rate was in run directories of versions that had one rate for each optimizer; 2e-5 for all others."""


def settle_rate(config: RunConfig) -> None:
    """Set `optim.lr` to the usual rate, with a note in `config.substitutions`, if it is not set and a usual rate is known."""
    if config.optim.lr is not None:
        return
    rate = usual_rate(config.optim, config.tuning.method, str(config.objective.name))
    if rate is not None:
        config.optim.lr = rate.usual
        reason = f"usual for {config.tuning.method}, objective={config.objective.name} and optim={config.optim.name}"
        config.substitutions[LR] = Resolution(LR, None, rate.usual, f"{reason}: {rate.source}")


def rate_problems(config: RunConfig) -> list[str]:
    """The problem of a run whose rate is not set and in no table; empty if it has a rate."""
    if config.optim.lr is not None:
        return []
    return [missing_rate(config.optim, config.tuning.method, str(config.objective.name))]


def keep_rate(config: RunConfig, before: RunConfig) -> None:
    """Give `config` the rate with which the run of `before` began, if neither of them has a rate that was set by hand.

    The table of usual rates may have changed since, and a run must not change its rate when it is resumed. Nothing is changed if
    optimizer, tuning method or objective differ.
    """
    is_typed = config.optim.lr is not None and LR not in config.substitutions
    names = [(run.optim.name, run.tuning.method, run.objective.name) for run in (config, before)]
    if is_typed or names[0] != names[1]:
        return
    earlier_default = EARLIER_DEFAULTS.get(before.optim.name, 2e-5)
    if before.resolution(LR) is None and before.optim.lr != earlier_default:
        return  # somebody typed it, and a command without it is another run's
    if before.optim.lr != config.optim.lr:
        config.substitutions[LR] = Resolution(LR, None, before.optim.lr, "as this run began")
        config.optim.lr = before.optim.lr
