"""Whether ranks can share rows and experts of a run's models, as `parallel` asks for it."""

from __future__ import annotations

from strategies.errors import ConfigError
from trainer.build.experts import expert_problems
from trainer.build.sequence import sequence_problems
from trainer.config.run import RunConfig


def check_parallel(config: RunConfig, *, scores_answers: bool = True) -> None:
    """Raise ConfigError if the run's model, or a frozen one beside it, cannot be shared so. Reads configurations alone.

    `scores_answers`: whether its reward models are needed, too.
    """
    problems = [*sequence_problems(config), *expert_problems(config, scores_answers=scores_answers)]
    if problems:
        raise ConfigError(problems)
