"""Runs the tasks of `shardtune evaluate` on a model, and before it on its base, and says of each task that it is finished."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from strategies.base import Engine
from trainer.evaluation.job import EvaluationJob
from trainer.evaluation.report.record import BASE, TUNED, EvaluatedModel
from trainer.evaluation.report.unfinished import UNFINISHED_FILE as UNFINISHED
from trainer.evaluation.report.unfinished import UnfinishedReport
from trainer.evaluation.task_evaluator import FinishedTask, TaskEvaluator
from trainer.evaluation.tasks.base import TaskRow, answers_by_key
from trainer.reporting.console import Console
from trainer.step import BuiltModel


@dataclass(frozen=True, slots=True)
class FinishedTaskReporter:
    """Reports each finished task: to the console, and on rank 0 to the unfinished report."""

    console: Console
    unfinished: UnfinishedReport | None
    scored: bool
    """Whether metrics are shown. The prompts of a review have no right answer."""

    def finished(self, arm: str, done: FinishedTask) -> None:
        """Report a finished task of one arm (tuned or base). Errors: StorageError."""
        name = done.prepared.task.name
        shown = "  ".join(f"{metric} {value:.4g}" for metric, value in done.metrics.items())
        metrics = f" {shown} " if self.scored else ""
        self.console.print_line(f"{arm}: {name}:{metrics} ({len(done.rows)} rows, {done.seconds:.1f} s)")
        if done.throughput is not None:
            self.console.print_line(f"{arm}: {name}: {done.throughput}")
        if self.unfinished is not None:
            self.unfinished.add_finished_task(arm, done)


@contextmanager
def printing_finished_tasks_if_it_fails(unfinished: UnfinishedReport | None, console: Console) -> Iterator[None]:
    """If the evaluation ends early, say which tasks are already written, and where."""
    try:
        yield
    except BaseException:
        names = [] if unfinished is None else unfinished.finished_task_names()
        if unfinished is not None and names:
            console.print_line(f"finished before that: {', '.join(names)}; see {unfinished.directory / UNFINISHED}")
        raise


def set_opponent_answers(
    job: EvaluationJob, evaluator: TaskEvaluator, earlier_rows_by_task: dict[str, list[TaskRow]]
) -> None:
    """Give tasks that compare two models' answers those of the other model, if an earlier report has them."""
    for prepared in evaluator.tasks:
        # With the base, or another model, asked first: its answers come later, and it is the opponent while it is asked.
        prepared.task.is_opponent = job.asked_first or job.base
        if prepared.task.name in earlier_rows_by_task:
            earlier_rows = earlier_rows_by_task[prepared.task.name]
            prepared.task.opponent_answers = answers_by_key(earlier_rows)


def evaluate_models(
    job: EvaluationJob,
    built: tuple[Engine, BuiltModel] | None,
    evaluator: TaskEvaluator,
    listener: FinishedTaskReporter,
) -> dict[str, EvaluatedModel]:
    """Evaluate the model (`TUNED`), and before it the base (`BASE`) if the job asks for it. All ranks must call.

    `built` is None for the model of a server. Also loads the job's checkpoint into the engine.
    """
    models: dict[str, EvaluatedModel] = {}
    if built is not None:
        models = _evaluate_base(job, *built, evaluator, listener)
    for prepared in evaluator.tasks:
        prepared.task.is_opponent = job.asked_first
        if job.base:  # tasks that compare two answers now have the base's
            base_rows = models[BASE].rows[prepared.task.name]
            prepared.task.opponent_answers = answers_by_key(base_rows)
    models[TUNED] = _evaluate_model(evaluator, TUNED, listener)
    return models


def _evaluate_base(
    job: EvaluationJob, engine: Engine, built: BuiltModel, evaluator: TaskEvaluator, listener: FinishedTaskReporter
) -> dict[str, EvaluatedModel]:
    """Evaluate the base if the job asks for it, and load the job's checkpoint, before or after that. All ranks must call."""
    models: dict[str, EvaluatedModel] = {}
    for prepared in evaluator.tasks:
        prepared.task.is_opponent = True
    # Full tuning overwrites the base, as adapters do that rewrite it at their start (PiSSA): then it is evaluated before the
    # checkpoint is loaded. Other adapters can be switched off.
    is_overwritten = not built.tuning.keeps_base
    if job.base and is_overwritten:
        models[BASE] = _evaluate_model(evaluator, BASE, listener)
    if job.checkpoint is not None:
        engine.load(Path(job.checkpoint))
    if job.base and not is_overwritten:
        with built.tuning.reference(built.step_module.model):
            models[BASE] = _evaluate_model(evaluator, BASE, listener)
    return models


def _evaluate_model(evaluator: TaskEvaluator, arm: str, listener: FinishedTaskReporter) -> EvaluatedModel:
    """Run every task on one model. All ranks must call."""
    model = EvaluatedModel()
    for finished in evaluator.run_tasks():
        name = finished.prepared.task.name
        model.rows[name] = finished.rows
        model.metrics[name] = finished.metrics
        model.seconds[name] = finished.seconds
        if finished.throughput is not None:
            model.throughput[name] = finished.throughput
        listener.finished(arm, finished)
    return model
