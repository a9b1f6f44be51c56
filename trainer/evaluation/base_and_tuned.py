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
    unfinished_report: UnfinishedReport | None
    prints_metrics: bool
    """False for the prompts of a review, which have no right answer."""

    def report_finished_task(self, arm: str, finished: FinishedTask) -> None:
        """Print metrics and speed of a finished task, and add it to the unfinished report. Raises StorageError.

        `arm`: which model has answered, "tuned" or "base".
        """
        name = finished.prepared.task.name
        metrics = ""
        if self.prints_metrics:
            metrics = "  ".join(f"{metric} {value:.4g}" for metric, value in finished.metrics.items())
            metrics = f" {metrics} "
        self.console.print_line(f"{arm}: {name}:{metrics} ({len(finished.rows)} rows, {finished.seconds:.1f} s)")
        if finished.throughput is not None:
            self.console.print_line(f"{arm}: {name}: {finished.throughput}")
        if self.unfinished_report is not None:
            self.unfinished_report.add_finished_task(arm, finished)


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
    """Give tasks that compare the answers of two models those of the other one, if an earlier report has them.

    Else the other model, the opponent, is asked first: as the base in this evaluation (`job.base`), or in an evaluation of its
    own (`job.is_opponent`). Tasks are told that they ask it, so that they miss no answers when their rows are checked.
    """
    for prepared in evaluator.tasks:
        prepared.task.asks_opponent = job.is_opponent or job.base
        if prepared.task.name in earlier_rows_by_task:
            earlier_rows = earlier_rows_by_task[prepared.task.name]
            prepared.task.opponent_answers = answers_by_key(earlier_rows)


def evaluate_models(
    job: EvaluationJob,
    built: tuple[Engine, BuiltModel] | None,
    evaluator: TaskEvaluator,
    reporter: FinishedTaskReporter,
) -> dict[str, EvaluatedModel]:
    """Evaluate the model ("tuned"), and before it the base ("base") if the job asks for it. All ranks must call.

    `built`: the engine and what it was built from, into which the job's checkpoint is loaded; None for the model of a server.
    `job.is_opponent`: whether this model is itself the opponent of another one, which is evaluated later.
    """
    models: dict[str, EvaluatedModel] = {}
    if built is not None:
        models = _evaluate_base_and_load_checkpoint(job, *built, evaluator, reporter)
    for prepared in evaluator.tasks:
        prepared.task.asks_opponent = job.is_opponent
        if job.base:  # tasks that compare two answers now have the base's
            base_rows = models[BASE].rows[prepared.task.name]
            prepared.task.opponent_answers = answers_by_key(base_rows)
    models[TUNED] = _evaluate_model(evaluator, TUNED, reporter)
    return models


def _evaluate_base_and_load_checkpoint(
    job: EvaluationJob, engine: Engine, built: BuiltModel, evaluator: TaskEvaluator, reporter: FinishedTaskReporter
) -> dict[str, EvaluatedModel]:
    """Load the job's checkpoint, and evaluate the base if the job asks for it. All ranks must call.

    - Full tuning overwrites the base, as adapters do that rewrite it at their start (PiSSA): the base is evaluated before the
      checkpoint is loaded.
    - Other adapters can be switched off: the base is evaluated afterwards.
    """
    models: dict[str, EvaluatedModel] = {}
    for prepared in evaluator.tasks:
        prepared.task.asks_opponent = True  # the base is the tuned model's; `evaluate_models` sets it anew
    is_overwritten = not built.tuning.keeps_base
    if job.base and is_overwritten:
        models[BASE] = _evaluate_model(evaluator, BASE, reporter)
    if job.checkpoint is not None:
        engine.load(Path(job.checkpoint))
    if job.base and not is_overwritten:
        with built.tuning.reference(built.step_module.model):  # adapters are off
            models[BASE] = _evaluate_model(evaluator, BASE, reporter)
    return models


def _evaluate_model(evaluator: TaskEvaluator, arm: str, reporter: FinishedTaskReporter) -> EvaluatedModel:
    """Run every task on the model as it is now, and report each. `arm`: "tuned" or "base". All ranks must call."""
    model = EvaluatedModel()
    for finished in evaluator.run_tasks():
        name = finished.prepared.task.name
        model.rows[name] = finished.rows
        model.metrics[name] = finished.metrics
        model.seconds[name] = finished.seconds
        if finished.throughput is not None:
            model.throughput[name] = finished.throughput
        reporter.report_finished_task(arm, finished)
    return model
