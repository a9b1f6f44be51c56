"""Builds the monitors of a run: the detectors of overfitting, forgetting and instability, and the evaluators that feed them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from strategies.base import Engine
from strategies.errors import ConfigError, Interrupted, Preempted
from strategies.runtime import Runtime
from trainer.config.evaluation import tasks_to_run
from trainer.config.run import RunConfig
from trainer.evaluation.base import Evaluator, TaskConfig
from trainer.evaluation.generation import GenerationEvaluator
from trainer.evaluation.loss import LossEvaluator
from trainer.evaluation.task_evaluator import TaskEvaluator
from trainer.evaluation.tasks.model_interface import ModelInterface
from trainer.evaluation.tasks.prepared import PreparedTask
from trainer.monitors import divergence
from trainer.monitors.anomaly_log import EVENTS_FILE
from trainer.monitors.base_model_rows import BaseModelResults
from trainer.monitors.config import CHAT_ANSWERS_TASK, CHAT_TASK, GENERAL_TEXT_TASK, Reaction
from trainer.monitors.detectors import ChallengeDetectors
from trainer.monitors.first_evaluation import HeldOutFile
from trainer.monitors.first_rows import FirstRows
from trainer.monitors.kept_answers import KeptAnswers
from trainer.monitors.watched_tasks import WatchedTasks
from trainer.objectives.base import ObjectiveConfig
from trainer.objectives.rollouts import RoundsConfig
from trainer.optim.schedule import warmup_steps
from trainer.reporting.results import LAST_HELD_OUT
from trainer.session.announcements import build_findings_reporter
from trainer.session.context import RunContext
from trainer.session.evaluation_interval import EvaluationInterval
from trainer.step import BuiltModel


def build_detectors(
    config: RunConfig, built: BuiltModel, total_steps: int, interval: EvaluationInterval, context: RunContext
) -> ChallengeDetectors:
    """Build the detectors of challenges, that is of overfitting, forgetting and instability, which look at every evaluation.

    `built`: the model with its objective.
    `total_steps`, `interval`: of the run; they tell how many evaluations there will be.
    `context`: what the run shares; the detectors print to its console and write into its directory.

    Only rank 0 writes their events. They are also registered with the attempt, so that they follow a renamed run directory.
    """
    planned_evaluations = 1  # without an interval, one at the end
    if interval.steps:
        planned_evaluations = -(-total_steps // interval.steps)  # rounded up
    events_file = context.run_dir / EVENTS_FILE if context.runtime.is_main else None
    detectors = ChallengeDetectors(
        config.challenges,
        planned_evaluations,
        # The part of the training loss that is computed as the held-out loss is, so that the two can be compared.
        built.step_module.objective.comparable_term,
        context.console.print_line,
        events_file,
    )
    if interval.intermediate_loss_only:
        detectors.planned_task_evaluations = 1  # tasks are asked at the end alone
    _keep_evaluations(detectors, context.run_dir, context.runtime)
    # Over how many steps, and from which one on, the training loss is judged for divergence.
    detectors.loss_window = divergence.num_steps_of_loss_median(total_steps)
    detectors.first_judged_step = divergence.first_judged_step(warmup_steps(config.schedule, total_steps))
    # Rewards that are measured and not learned: they tell whether the others are gamed.
    detectors.metrics_of_control_rewards = _metrics_of_control_rewards(config.objective)
    # Keeps `status.json` up to date.
    detectors.write_findings = build_findings_reporter(context)
    context.attempt.on_run_dir_renamed.append(detectors.follow_renamed_run_dir)
    return detectors


def _keep_evaluations(detectors: ChallengeDetectors, run_dir: Path, runtime: Runtime) -> None:
    """Let the detectors keep the evaluations before training and at the end in the run directory, and some written answers."""
    detectors.first_evaluation_file = HeldOutFile(run_dir, runtime)
    detectors.last_evaluation_file = HeldOutFile(run_dir, runtime, LAST_HELD_OUT)
    detectors.kept_answers = KeptAnswers(run_dir if runtime.is_main else None)


def _metrics_of_control_rewards(objective: ObjectiveConfig) -> list[str] | None:
    """Metrics of rewards without a weight, such as `rewards/length/mean`; None if the run does not learn from rewards.

    They do not train the model, so they tell whether the other rewards are gamed.
    """
    if not isinstance(objective, RoundsConfig):
        return None
    return [f"rewards/{name}/mean" for name, reward in objective.rewards.items() if reward.weight == 0]


def tasks_for_tokenizer(config: RunConfig, tokenizer: Any) -> dict[str, TaskConfig]:
    """Select the evaluation tasks that this tokenizer allows: without a chat template it can ask no chat questions.

    They measure forgetting. Raises ConfigError if the user has asked for them in that case (`challenges.forgetting.chat=true`).
    """
    tasks = tasks_to_run(config)
    if tokenizer.chat_template is not None or CHAT_TASK not in tasks:
        return tasks
    if config.challenges.forgetting.chat:
        raise ConfigError(
            "challenges.forgetting.chat=true: the tokenizer has no chat template to ask questions with; give one with "
            "model.chat_template=FILE, or leave it out"
        )
    # CHAT_ANSWERS_TASK asks the first two questions of CHAT_TASK.
    return {name: task for name, task in tasks.items() if name not in (CHAT_TASK, CHAT_ANSWERS_TASK)}


def final_chat_answers(detectors: ChallengeDetectors, engine: Engine, *, refresh: bool) -> list[dict[str, str]]:
    """Two chat questions for the end of a run's output, each with the answers of the base and of the tuned model.

    Empty if the run asks no chat questions. The answers are those of the last evaluation. If there are none, or with `refresh`
    (the engine has other weights since), the questions are asked now. All ranks must call. Raises Preempted, on all ranks or on
    none, if the run is asked to stop meanwhile.
    """
    if refresh or not detectors.chat_rows:
        try:
            detectors.refresh_chat_rows(engine)
        except Interrupted:  # the generation of answers was stopped
            raise Preempted(
                "stopped while two answers were written; start the same command again to continue"
            ) from None
    return detectors.chat_answer_pairs()


def _report_to_detectors(evaluators: list[Evaluator], detectors: ChallengeDetectors) -> None:
    """Let the detectors see what the evaluators of losses and of generated answers measure."""
    for evaluator in evaluators:
        if isinstance(evaluator, GenerationEvaluator):
            evaluator.on_answers = detectors.add_generated_answers
        if isinstance(evaluator, LossEvaluator):
            evaluator.on_batch_sums = detectors.add_batch_sums


def _names_of_forgetting_tasks(tasks: list[PreparedTask], named_by_user: list[str]) -> list[str]:
    """Names of the tasks on which forgetting is measured: those that the trainer adds for it, and those that the user names."""
    built_in_names = (GENERAL_TEXT_TASK, CHAT_TASK, CHAT_ANSWERS_TASK)
    task_names = [prepared.task.name for prepared in tasks]
    return [name for name in task_names if name in built_in_names] + named_by_user


def add_task_evaluator(
    config: RunConfig,
    detectors: ChallengeDetectors,
    evaluators: list[Evaluator],
    tasks: list[PreparedTask],
    make_model_interface: Callable[[], ModelInterface],
    context: RunContext,
) -> list[Evaluator]:
    """Add an evaluator of the run's tasks to its others, if there are tasks, and let all of them report to the detectors.

    `detectors`: of overfitting and forgetting; also told where rows of tasks are kept.
    `make_model_interface`: builds the model's interface for tasks; called only if there are tasks.

    Raises the errors of rows that cannot be encoded.
    """
    _report_to_detectors(evaluators, detectors)
    if not tasks:
        return evaluators
    task_evaluator = TaskEvaluator(tasks, make_model_interface())
    task_evaluator.check_rows()  # an error should come now, not at the first evaluation
    forgetting = config.challenges.forgetting
    forgetting_tasks = _names_of_forgetting_tasks(tasks, forgetting.tasks)
    if forgetting_tasks and forgetting.action is not Reaction.off:
        # The base model is asked the same tasks once, before the first step, to be compared with.
        detectors.base_results = BaseModelResults(
            task_evaluator, forgetting_tasks, context.run_dir, context.console.print_line
        )
    if config.logging.tables and context.runtime.is_main:
        detectors.first_rows = FirstRows(context.run_dir)
    return [*evaluators, WatchedTasks(task_evaluator, detectors, makes_tables=config.logging.tables)]
