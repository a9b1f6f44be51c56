"""Settles `optim.lr` where nobody has set it: the usual rate, or that with which the run began."""

from trainer.config.run import LEARNING_RATE_KEY, RunConfig
from trainer.optim.config import OptimName
from trainer.optim.rates import missing_rate_message, usual_learning_rate
from trainer.reporting.resolution import ResolvedSetting

EARLIER_DEFAULT_RATE_BY_OPTIMIZER = {OptimName.lion: 3e-6, OptimName.adafactor: 1e-3, OptimName.sgd: 1e-2}
EARLIER_DEFAULT_RATE = 2e-5
"""What an unset rate was in run directories of versions that had one rate for each optimizer, and for all other optimizers."""


def set_usual_learning_rate(config: RunConfig) -> None:
    """Set `optim.lr` to the usual rate for the optimizer, tuning method and objective, if the user has set none.

    Leaves it unset if no usual rate is known. Adds a note to `config.substitutions`, which tells a rate that was chosen here from
    one that the user has set.
    """
    if config.optim.lr is not None:
        return
    rate = usual_learning_rate(config.optim, config.tuning.method, str(config.objective.name))
    if rate is not None:
        config.optim.lr = rate.usual
        reason = f"usual for {config.tuning.method}, objective={config.objective.name} and optim={config.optim.name}"
        config.substitutions[LEARNING_RATE_KEY] = ResolvedSetting(
            setting=LEARNING_RATE_KEY, asked=None, chosen=rate.usual, reason=f"{reason}: {rate.source}"
        )


def learning_rate_problems(config: RunConfig) -> list[str]:
    """The message about a run whose learning rate is not set and in no table of usual rates; empty if it has a rate."""
    if config.optim.lr is not None:
        return []
    return [missing_rate_message(config.optim, config.tuning.method, str(config.objective.name))]


def keep_learning_rate_of_run(config: RunConfig, earlier_config: RunConfig) -> None:
    """Give a run that is resumed the learning rate that it began with, if neither the command nor the run has one set by a user.

    The table of usual rates may have changed since, and a run must not change its rate.
    `config`: that of the command, which is changed.
    `earlier_config`: that of the run.
    Nothing is changed if optimizer, tuning method or objective differ.

    `substitutions` of a configuration hold a note on each setting that shardtune chose itself, so a rate without a note was set
    by the user; or it is the one rate that an earlier version had for everything, without a note.
    """
    is_set_by_user = config.optim.lr is not None and LEARNING_RATE_KEY not in config.substitutions
    choices_of_command = (config.optim.name, config.tuning.method, config.objective.name)
    choices_of_run = (earlier_config.optim.name, earlier_config.tuning.method, earlier_config.objective.name)
    if is_set_by_user or choices_of_command != choices_of_run:
        return
    earlier_default = EARLIER_DEFAULT_RATE_BY_OPTIMIZER.get(earlier_config.optim.name, EARLIER_DEFAULT_RATE)
    was_set_by_user = (
        earlier_config.resolution(LEARNING_RATE_KEY) is None and earlier_config.optim.lr != earlier_default
    )
    if was_set_by_user:
        return  # a command without this rate is that of another run
    if earlier_config.optim.lr != config.optim.lr:
        config.substitutions[LEARNING_RATE_KEY] = ResolvedSetting(
            setting=LEARNING_RATE_KEY, asked=None, chosen=earlier_config.optim.lr, reason="as this run began"
        )
        config.optim.lr = earlier_config.optim.lr
