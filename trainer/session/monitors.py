"""Builds what watches a run beside its steps: the detectors, and the evaluators that feed them."""

from __future__ import annotations

from collections.abc import Callable

from trainer.config.run import RunConfig
from trainer.evaluation.base import Evaluator
from trainer.evaluation.generation import GenerationEvaluator
from trainer.evaluation.loss import LossEvaluator
from trainer.evaluation.task_evaluator import TaskEvaluator
from trainer.evaluation.tasks.model_interface import ModelInterface
from trainer.evaluation.tasks.prepared import PreparedTask
from trainer.monitors import divergence
from trainer.monitors.anomaly_log import EVENTS
from trainer.monitors.base_model_rows import BaseRows
from trainer.monitors.config import GENERAL, Reaction
from trainer.monitors.detectors import Challenges, WatchedTasks
from trainer.monitors.first_evaluation import KeptHeldOut
from trainer.monitors.first_rows import FirstRows
from trainer.optim.schedule import warmup_steps
from trainer.session.announcements import RunPlace, tell_of_challenges
from trainer.step import Built


def challenges_of(config: RunConfig, built: Built, total_steps: int, place: RunPlace) -> Challenges:
    """The detectors of a run of so many steps, told on rank 0."""
    every, main = config.evaluation.every_steps, place.runtime.is_main
    planned = -(-total_steps // every) if every else 1
    events = place.run_dir / EVENTS if main else None
    challenges = Challenges(config.challenges, planned, built.step_module.objective.compared, place.console.say, events)
    challenges.kept_before = KeptHeldOut(place.run_dir, place.runtime)
    challenges.window = divergence.window_of(total_steps)
    challenges.first_judged = divergence.first_judged(warmup_steps(config.schedule, total_steps))
    challenges.tell_status = tell_of_challenges(place)
    return challenges


def watched(
    config: RunConfig,
    challenges: Challenges,
    evaluators: list[Evaluator],
    tasks: list[PreparedTask],
    asking: Callable[[], ModelInterface],
    place: RunPlace,
) -> list[Evaluator]:
    """The evaluators of a run with its tasks, so that the detectors see what they see."""
    for each in evaluators:
        if isinstance(each, GenerationEvaluator):
            each.on_answers = challenges.wrote
        if isinstance(each, LossEvaluator):
            each.on_batch_sums = challenges.batches
    if not tasks:
        return evaluators
    inner, forgetting = TaskEvaluator(tasks, asking()), config.challenges.forgetting
    inner.check_rows()  # before a first forward pass, not at the first evaluation
    names = [*([GENERAL] if forgetting.data is not None else []), *forgetting.tasks]
    if names and forgetting.action is not Reaction.off:
        challenges.base = BaseRows(inner, names, place.run_dir, place.console.say)
    if config.logging.tables and place.runtime.is_main:
        challenges.first = FirstRows(place.run_dir)
    return [*evaluators, WatchedTasks(inner, challenges, shows=config.logging.tables)]
