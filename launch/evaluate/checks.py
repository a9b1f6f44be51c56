"""Checks an evaluation before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from strategies.errors import ConfigError, key_of_problem

if TYPE_CHECKING:
    from trainer.config.run import RunConfig


def test_split_problems(against: str | None, settings: list[str]) -> Iterator[str]:
    """Problems with arguments that do not go with `split=test`: comparisons, tasks and a watched metric.

    Nothing may be chosen by the test documents, so only the loss of the run's objective is measured on them.
    """
    if against is not None:
        yield (
            f"against={against}: split=test measures one model, so that nothing is chosen by the test documents; compare "
            "on the evaluation documents, without split=test"
        )
    for setting in settings:
        if setting.startswith(("evaluation.tasks", "evaluation.watch")):
            yield f"{setting}: split=test measures the loss of the run's objective and runs no task; leave it out"


def has_held_out(config: RunConfig) -> bool:
    """Whether the configuration holds out evaluation documents: a file of its own, or a share of the training data."""
    return config.data.eval_path is not None or config.data.eval_share > 0


def check_evaluation(
    config: RunConfig, cli_settings: list[str], *, run: Path | None, has_training_data: bool, split: str
) -> None:
    """Check an evaluation before a model is loaded: that something is measured, its settings, the rows of its tasks.

    `cli_settings`: those on the command line. `run`: the evaluated run; None for a model without one. `has_training_data`:
    whether there is training data that tasks may read. `split`: "eval" runs tasks, "test" measures the run's test documents.

    Raises ConfigError for settings, DataError for rows.
    """
    from launch.config.compose import load_frozen_config, start_problems
    from trainer.evaluation.tasks.prepared import TaskContext, check_tasks

    context = TaskContext.from_settings(config.data, config.objective)
    _check_something_is_measured(config, run, split, is_language_model=context.is_language_model)
    # What the run's config.yaml holds already, such as a secret, is not refused again.
    run_config = None if run is None else load_frozen_config(run / "config.yaml")
    problems = []
    # All that a training with this configuration would be refused for, but for a run's training data: that is read only if a
    # task needs it, and as the run recorded it.
    for problem in start_problems(config, frozen_config=run_config):
        key = key_of_problem(problem)
        is_of_training = key == "evaluation.watch" or (run is not None and key.startswith("data."))
        if not is_of_training:
            problems.append(problem)
    problems += _quantised_model_problems(config, cli_settings)
    if problems:
        raise ConfigError(problems)
    check_tasks(config.evaluation.tasks, context, held_out=has_held_out(config), trained=has_training_data)


def _check_something_is_measured(config: RunConfig, run: Path | None, split: str, *, is_language_model: bool) -> None:
    """Refuse an evaluation that would measure nothing: split=test without test documents, any other without tasks.

    `is_language_model`: whether the run's loss is that of one. Then there would be default tasks if documents were held out.
    Raises ConfigError.
    """
    from trainer.evaluation.tasks.registry import TASK_KINDS

    if split == "test":
        if config.data.test_path is None and not config.data.test_share:
            raise ConfigError(
                f"split=test: {run} has no test documents; give a run data.test_path=FILE or data.test_share=0.05 when it begins"
            )
    elif not config.evaluation.tasks:
        reason = f"objective={config.objective.name} has no task by itself (what it measured is in metrics.jsonl)"
        if is_language_model:
            reason = "there are no evaluation documents to ask about"
        raise ConfigError(
            f"evaluation.tasks: not set, and {reason}; name a task with a file: evaluation.tasks.NAME.kind=KIND "
            f"evaluation.tasks.NAME.path=FILE; kinds are {', '.join(TASK_KINDS)}"
        )


def _quantised_model_problems(config: RunConfig, cli_settings: list[str]) -> Iterator[str]:
    """Problems with settings that a model stored in 4 or 8 bits does not allow. `cli_settings`: those on the command line.

    There are none for a model in full precision, or one that a server answers for.
    """
    from strategies.base import StrategyName
    from trainer.evaluation.tasks.prepared import TaskContext
    from trainer.model.quantised_checkpoints import missing_library, quantising_library

    path = config.model.path
    # "bitsandbytes" or another, from the model's config.json; None for a model in full precision.
    library = quantising_library(path)
    if library is None or config.evaluation.server.url is not None:
        return
    missing = missing_library(library)
    if missing:
        yield f"model.path={path}: {missing}"
    if config.strategy.name not in (StrategyName.single, StrategyName.ddp):
        yield (
            f"strategy={config.strategy.name}: model.path={path} lies in few bits ({library}), which every rank holds whole; "
            "set strategy=ddp, or launcher.processes=1"
        )
    # Only if typed: the configuration always has a precision.
    if any(argument.startswith("precision=") for argument in cli_settings):
        yield f"precision={config.precision}: model.path={path} computes in the types it is stored with; leave it out"
    if config.model.adapters:
        yield f"adapter={config.model.adapters[0]}: model.path={path} in few bits, nothing is merged into it; leave it out"
    if not TaskContext.from_settings(config.data, config.objective).is_language_model:
        yield f"model.path={path}: lies in few bits ({library}), of which only causal language models are evaluated"
