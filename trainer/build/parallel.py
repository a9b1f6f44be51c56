"""Whether ranks can share rows and experts of a run's models, as `parallel` asks for it."""

from __future__ import annotations

from strategies.errors import ConfigError
from trainer.build.experts import expert_parallelism_problems
from trainer.build.sequence import sequence_parallel_problems
from trainer.config.run import RunConfig


def check_parallel(config: RunConfig, *, scores_answers: bool = True) -> None:
    """Raise ConfigError if ranks cannot share rows or experts of the run's model, or of a frozen one. Reads only configurations.

    `scores_answers`: whether the run needs its reward models, which are then checked too.
    """
    problems = [
        *sequence_parallel_problems(config),
        *expert_parallelism_problems(config, scores_answers=scores_answers),
    ]
    if problems:
        raise ConfigError(problems)
