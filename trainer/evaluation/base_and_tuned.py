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
    """Reports each finished task of an evaluation: to the console, and on rank 0 to a report that survives a crash."""

    console: Console
    unfinished_report: UnfinishedReport | None
    prints_metrics: bool
    """False for the prompts of a review, which have no right answer."""

    def report_finished_task(self, arm: str, finished: FinishedTask) -> None:
        """Print metrics and speed of a task as soon as all its rows are answered, and save them in the unfinished report.

        The unfinished report lets users see what was measured if the evaluation fails in a later task. `arm`: which model has
        answered, "tuned" or "base". Raises StorageError.
        """
        name = finished.prepared.task.name
        metrics = ""
        if self.prints_metrics:
            metrics = "  ".join(f"{metric} {value:.4g}" for metric, value in finished.metrics.items())
            metrics = f" {metrics} "
        self.console.print_line(f"{arm}: {name}:{metrics} ({len(finished.rows)} rows, {finished.seconds:.1f} s)")
        if finished.throughput is not None:
            self.console.print_line(f"{arm}: {name}: {finished.throughput}")
        # None on all ranks but 0.
        if self.unfinished_report is not None:
            self.unfinished_report.add_finished_task(arm, finished)


@contextmanager
def printing_finished_tasks_if_it_fails(unfinished: UnfinishedReport | None, console: Console) -> Iterator[None]:
    """Around the tasks of an evaluation: if it ends early, a line says which tasks are written already.

    `unfinished`: the report of the tasks that are finished; None on ranks that write none.
    """
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
    """Prepare tasks that compare the answers of two models, such as `preference`, before their rows are checked.

    The other model is called the opponent. If an earlier report has its answers, its tasks get them here. Else it is asked
    first, as the base in this evaluation (`job.base`) or in an evaluation of its own (`job.is_opponent`): `asks_opponent` tells
    the tasks so, and they miss no answers yet.

    `earlier_rows_by_task`: the report rows of the earlier evaluation by task; empty if there is none.
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
    """Run all tasks on the model ("tuned"), and on the model before training ("base") if the job compares the two.

    All ranks must call. Between the two, tasks that compare answers get those of the base. `built`: the engine and the model,
    into which the job's checkpoint is loaded here; None for a model behind a server, which has no weights on this machine.
    `job.is_opponent`: whether this model is itself the one that another model, evaluated later, is compared with.

    Returns {"base": ..., "tuned": ...}, without "base" if it was not asked.
    """
    models: dict[str, EvaluatedModel] = {}
    if built is not None:
        models = _evaluate_base_and_load_checkpoint(job, *built, evaluator, reporter)
    for prepared in evaluator.tasks:
        # Set anew: while the base was asked, it was True.
        prepared.task.asks_opponent = job.is_opponent
        if job.base:  # tasks that compare two answers now have the base's
            base_rows = models[BASE].rows[prepared.task.name]
            prepared.task.opponent_answers = answers_by_key(base_rows)
    models[TUNED] = _evaluate_model(evaluator, TUNED, reporter)
    return models


def _evaluate_base_and_load_checkpoint(
    job: EvaluationJob, engine: Engine, built: BuiltModel, evaluator: TaskEvaluator, reporter: FinishedTaskReporter
) -> dict[str, EvaluatedModel]:
    """Load the checkpoint that is evaluated, and evaluate the base while its weights are there. All ranks must call.

    Full tuning overwrites the base, as do adapters that change it at their start (PiSSA): the base is evaluated before the
    checkpoint is loaded. Other adapters can be switched off: the base is evaluated afterwards.

    Returns {"base": ...}, or {} if the job does not compare with the base.
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
    """Run every task on the model whose weights are loaded now, and report each as soon as it is finished. All ranks must call.

    `arm`: the name of that model in reports, "tuned" or "base".
    """
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
