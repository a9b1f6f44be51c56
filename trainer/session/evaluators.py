"""Builds the evaluators of a run: of its held-out data and tasks, and of its test documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from strategies import runtime as processes
from strategies.base import Engine
from trainer.build.inputs import RunInputs
from trainer.build.reward_evaluator import build_reward_evaluators
from trainer.config.evaluation import tasks_to_run
from trainer.config.run import RunConfig, settled_template_date
from trainer.data.batches.loader import StepLoader
from trainer.data.prepare import PreparedData
from trainer.evaluation.base import Evaluator
from trainer.evaluation.build import build_evaluators, build_model_interface
from trainer.evaluation.tasks.model_interface import ModelInterface
from trainer.evaluation.tasks.prepared import PreparedTask, TaskContext
from trainer.monitors.detectors import ChallengeDetectors
from trainer.rollout.loader import RolloutLoader
from trainer.rollout.types import RewardScorer
from trainer.session.context import RunContext
from trainer.session.monitors import add_task_evaluator
from trainer.step import BuiltModel


def build_run_evaluators(
    config: RunConfig,
    inputs: RunInputs,
    tasks: list[PreparedTask],
    built: BuiltModel,
    engine: Engine,
    loader: StepLoader | RolloutLoader,
    detectors: ChallengeDetectors,
    context: RunContext,
) -> list[Evaluator]:
    """Build the evaluators that run during training: of held-out data and of tasks; empty without either.

    A run that learns from rewards is evaluated by the rewards of its `loader`, any other by its held-out loss and metrics.

    `inputs`: data and tokenizer of the run.
    `tasks`: the evaluation tasks, with their rows.
    `built`: the model with its objective. `engine`: that model distributed over the ranks, which is evaluated.
    `detectors`: of overfitting and forgetting; they get what tasks measure.
    `context`: what the run shares, such as its ranks and their agreement on stopping.

    Errors: those of `build_evaluators`, and of rewards.
    """
    data = inputs.data
    tokenizer = inputs.tokenizer
    # Each evaluator asks in a loop of its own whether the run must stop, so that each needs a check of its own.
    new_stop_check = context.stop_agreement.new_stop_check

    def make_model_interface() -> ModelInterface:
        return model_interface_for_run(config, data, built, tokenizer, engine, context.runtime, new_stop_check())

    if isinstance(loader, RolloutLoader):
        scorer = loader.round_builder.scorer
        reward_evaluators = build_reward_evaluators(
            config, data, built, tokenizer, engine, context.runtime, scorer, new_stop_check()
        )
        return add_task_evaluator(config, detectors, reward_evaluators, tasks, make_model_interface, context)
    evaluators = build_evaluators(
        replace(config.evaluation, tasks=tasks_to_run(config)),
        config.model,
        held_out=data.evaluation,
        built=built,
        tokenizer=tokenizer,
        engine=engine,
        runtime=context.runtime,
        new_stop_check=new_stop_check,
    )
    return add_task_evaluator(config, detectors, evaluators, tasks, make_model_interface, context)


def model_interface_for_run(
    config: RunConfig,
    data: PreparedData,
    built: BuiltModel,
    tokenizer: Any,
    engine: Engine,
    runtime: processes.Runtime,
    stop_now: Callable[[], bool],
) -> ModelInterface:
    """Build the interface through which tasks use the run's model: it writes answers and measures likelihoods, labels and losses.

    `built`: the model with its objective. `engine`: that model distributed over the ranks, which answers.
    `stop_now`: asked on all ranks alike during long evaluations.
    """
    # How rows become conversations: the settings of data and objective, and the date that chat templates write.
    task_context = TaskContext.from_settings(config.data, config.objective, settled_template_date(config))
    is_classifier = bool(built.head_prefixes)  # only its head has an output for each label
    return build_model_interface(
        config.evaluation,
        config.model,
        built,
        labels=data.label_names if is_classifier else None,
        encoder=task_context.build_encoder(tokenizer),
        engine=engine,
        runtime=runtime,
        stop_now=stop_now,
    )


def build_test_evaluators(
    config: RunConfig,
    data: PreparedData,
    built: BuiltModel,
    tokenizer: Any,
    engine: Engine,
    runtime: processes.Runtime,
    scorer: RewardScorer | None,
    new_stop_check: Callable[[], Callable[[], bool]],
) -> list[Evaluator]:
    """Build the evaluators of the test documents, which use all of them; empty without test documents.

    `built`: the model with its objective. `engine`: that model distributed over the ranks, which is evaluated.
    `scorer`: computes the rewards, if the run learns from rewards; else None.
    `new_stop_check`: makes, for each evaluator, a function that says on all ranks alike whether to stop.

    Metrics have the names of those of evaluation documents (`eval/loss`).
    """
    # No metric of the test documents is monitored, and no document is left out.
    settings = replace(config.evaluation, tasks={}, watch=None, max_documents=None, loss_by_position=False)
    if scorer is not None:
        test_data = replace(data, evaluation=data.test)
        # Every prompt is answered (`samples=0`); during training, a sample of them is enough.
        generate = replace(settings.generate, samples=0)
        test_config = replace(config, evaluation=replace(settings, generate=generate))
        # One evaluator, so it is given a check; `build_evaluators` makes several, each with a check of its own.
        return build_reward_evaluators(
            test_config, test_data, built, tokenizer, engine, runtime, scorer, new_stop_check()
        )
    return build_evaluators(settings, config.model, data.test, built, tokenizer, engine, runtime, new_stop_check)
