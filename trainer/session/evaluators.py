"""Builds the evaluators of a run: of its held-out data and tasks, and of its test documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from strategies import runtime as processes
from strategies.base import Engine
from trainer.build.reward_evaluator import build_reward_evaluators
from trainer.config.evaluation import asked_tasks
from trainer.config.run import RunConfig, kept_date
from trainer.data.batches.loader import StepLoader
from trainer.data.prepare import PreparedData
from trainer.evaluation.base import Evaluator
from trainer.evaluation.build import build_evaluators, build_model_interface
from trainer.evaluation.tasks.model_interface import ModelInterface
from trainer.evaluation.tasks.prepared import PreparedTask, TaskContext
from trainer.monitors.detectors import Challenges
from trainer.planner.oom_probe import TrialInputs
from trainer.rollout.loader import RolloutLoader
from trainer.rollout.types import RewardScorer
from trainer.session.announcements import RunContext
from trainer.session.monitors import with_tasks
from trainer.step import Built


def evaluators_of(
    config: RunConfig,
    inputs: TrialInputs,
    tasks: list[PreparedTask],
    built: Built,
    engine: Engine,
    loader: StepLoader | RolloutLoader,
    challenges: Challenges,
    context: RunContext,
) -> list[Evaluator]:
    """The evaluators that the configuration asks for; empty without held-out data and tasks.

    Rounds are evaluated by the rewards of `loader`. Errors: those of `build_evaluators`, and of rewards.
    """
    data = inputs.data
    tokenizer = inputs.tokenizer

    def watch_for_stop() -> Callable[[], bool]:
        return context.agreement.for_loop().ask_and_wait

    def asking() -> ModelInterface:
        return asking_of(config, data, built, tokenizer, engine, context.runtime, watch_for_stop())

    if isinstance(loader, RolloutLoader):
        scorer = loader.maker.scorer
        of_rewards = build_reward_evaluators(
            config, data, built, tokenizer, engine, context.runtime, scorer, watch_for_stop()
        )
        return with_tasks(config, challenges, of_rewards, tasks, asking, context)
    evaluators = build_evaluators(
        replace(config.evaluation, tasks=asked_tasks(config)),
        config.model,
        data.evaluation,
        built,
        tokenizer,
        engine,
        context.runtime,
        watch_for_stop,
    )
    return with_tasks(config, challenges, evaluators, tasks, asking, context)


def asking_of(
    config: RunConfig,
    data: PreparedData,
    built: Built,
    tokenizer: Any,
    engine: Engine,
    runtime: processes.Runtime,
    stop_now: Callable[[], bool],
) -> ModelInterface:
    """The run's model behind the calls that tasks make: answers, likelihoods, labels, losses."""
    return build_model_interface(
        config.evaluation,
        config.model,
        built,
        data.label_names if built.head_prefixes else None,
        TaskContext.from_settings(config.data, config.objective, kept_date(config)).encoder(tokenizer),
        engine,
        runtime,
        stop_now,
    )


def build_test_evaluators(
    config: RunConfig,
    data: PreparedData,
    built: Built,
    tokenizer: Any,
    engine: Engine,
    runtime: processes.Runtime,
    scorer: RewardScorer | None,
    watch_for_stop: Callable[[], Callable[[], bool]],
) -> list[Evaluator]:
    """The evaluators of the test documents, all of them and in one piece; empty without any.

    `scorer`: that of the rewards, of an objective whose batches are rounds. `watch_for_stop`: as in `build_evaluators`. What they
    yield is named as on evaluation documents (`eval/loss`).
    """
    # No metric of the test documents is watched, and no part of them is left out.
    settings = replace(config.evaluation, tasks={}, watch=None, max_documents=None, loss_by_position=False)
    if scorer is not None:
        of_test = replace(data, evaluation=data.test)
        # Every prompt is answered: `samples` is how many are enough to watch the training.
        asked = replace(config, evaluation=replace(settings, generate=replace(settings.generate, samples=0)))
        return build_reward_evaluators(asked, of_test, built, tokenizer, engine, runtime, scorer, watch_for_stop())
    return build_evaluators(settings, config.model, data.test, built, tokenizer, engine, runtime, watch_for_stop)
