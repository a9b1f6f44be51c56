"""`shardtune export average=last:3`: the mean of the weights that several checkpoints of a run would export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from strategies.errors import ConfigError

if TYPE_CHECKING:
    from trainer.checkpoints.config import CheckpointConfig
    from trainer.config.run import RunConfig


def checkpoints_to_average(run_dir: Path, average: str, config: RunConfig) -> list[Path]:
    """Find the checkpoints that `average=` names, whose mean is exported: oldest first, each checked to be complete.

    "last:3" -> the newest three; "[100,200]" -> those of steps 100 and 200. `config`: the run's. Raises ConfigError for any
    other form, a checkpoint that is missing or damaged, and for the schedule-free optimizer.
    """
    from trainer.optim.config import OptimName

    if config.optim.name is OptimName.schedule_free:
        raise ConfigError(f"average={average}: optim=schedule_free exports an average already; leave it out")
    checkpoint_by_step = _checkpoint_by_step(run_dir, config.checkpoint)
    known_steps = (
        f"{run_dir} has {', '.join(map(str, checkpoint_by_step)) or 'none'}; more are kept with checkpoint.keep and "
        "checkpoint.every_steps"
    )
    steps = _steps_to_average(average, list(checkpoint_by_step), known_steps)
    return [_intact_checkpoint(checkpoint_by_step[step], average) for step in steps]


def _steps_to_average(average: str, steps_of_run: list[int], known_steps: str) -> list[int]:
    """Read the steps that `average=` names, in their order: "last:3" -> the newest three; "[100,200]" -> those two.

    `steps_of_run`: those with a checkpoint. `known_steps`: says which there are, for errors. Raises ConfigError for any other
    form, or a step without a checkpoint.
    """
    keyword, _, count_text = average.partition(":")
    # A mean of one checkpoint would be that checkpoint.
    names_newest = keyword == "last" and count_text.isdigit() and int(count_text) > 1
    if names_newest:
        count = int(count_text)
        steps = sorted(steps_of_run)[-count:]
        if len(steps) < count:
            raise ConfigError(f"average={average}: there are not so many checkpoints; {known_steps}")
        return steps
    step_texts = [text.strip() for text in average.removeprefix("[").removesuffix("]").split(",")]
    has_only_numbers = all(text.isdigit() for text in step_texts)
    if len(set(step_texts)) < 2 or not has_only_numbers or not average.startswith("["):
        raise ConfigError(f"average={average}: must be last:<n> of two or more, or a list of steps; {known_steps}")
    steps = sorted({int(text) for text in step_texts})
    missing_steps = [step for step in steps if step not in steps_of_run]
    if missing_steps:
        raise ConfigError(f"average={average}: there is no checkpoint of step {missing_steps[0]}; {known_steps}")
    return steps


def _checkpoint_by_step(run_dir: Path, config: CheckpointConfig) -> dict[int, Path]:
    """The directory of each checkpoint of a run, by its step."""
    from trainer.checkpoints.layout import checkpoint_dirs_of, checkpoints_in

    return dict(checkpoints_in(checkpoint_dirs_of(run_dir, config.fallback_dir)))


def _intact_checkpoint(path: Path, average: str) -> Path:
    """The path of a checkpoint whose files fit their checksums. Errors: ConfigError if it is damaged."""
    from trainer.checkpoints.manifest import checkpoint_problem

    problem = checkpoint_problem(path)
    if problem:
        raise ConfigError(f"average={average}: {path} {problem}; leave it out with a list of steps")
    return path
