"""From a frozen configuration to an evaluation, in one straight line: what `shardtune evaluate` runs on every rank."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from strategies import runtime as processes
from strategies.base import Engine
from strategies.build import resolve_precision
from strategies.errors import ConfigError, Interrupted, Preempted
from trainer.build.parts import build_engine, build_loader, prepare_data
from trainer.build.quantised_model import build_as_stored
from trainer.checkpoints.manifest import fingerprint
from trainer.config.evaluation import asked_tasks
from trainer.config.run import RunConfig, kept_date
from trainer.data.prepare import ChooseDate, Prepared
from trainer.data.report.progress import PrintLine, print_on_rank_0
from trainer.evaluation.report import comparison, page, record
from trainer.evaluation.report.intervals import Bootstrap, confidence_intervals, resample_metrics
from trainer.evaluation.report.record import BASE, TUNED, EarlierEvaluation, EvaluatedModel
from trainer.evaluation.report.tables import row_tables
from trainer.evaluation.report.unfinished import UNFINISHED_FILE as UNFINISHED
from trainer.evaluation.report.unfinished import UnfinishedReport
from trainer.evaluation.served import ServedModel, connect_served_model
from trainer.evaluation.task_evaluator import FinishedTask, TaskEvaluator
from trainer.evaluation.tasks.base import Task, TaskRow
from trainer.evaluation.tasks.prepared import TaskContext, tasks_on_run_documents
from trainer.model.loading import load_tokenizer
from trainer.model.quantised_checkpoints import quantising_library
from trainer.model.rules import read_config
from trainer.planner.oom_report import reporting_evaluation_out_of_memory
from trainer.reporting.console import Console
from trainer.reporting.results import EVALUATION, keep_report
from trainer.reporting.status import write_text_atomic
from trainer.reporting.trackers.base import Table
from trainer.run import asking_of, meet
from trainer.session.announcements import track_evaluation
from trainer.session.attempt import Attempt, rank_of_job
from trainer.session.run_data import DataRecord, RowsNeeded, data_of_run, data_record
from trainer.session.run_facts import versions
from trainer.step import Built
from trainer.stopping.preempt import Agreement
from trainer.stopping.signals import StopRequest

GIVE_FILE = "Give the task a file of its own (evaluation.tasks.NAME.path=FILE)"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationJob:
    """What one evaluation is asked for, beside its configuration."""

    to: str
    """Directory of the report."""
    run: str | None = None
    """Directory of the run whose checkpoint is evaluated; None: the model as it is."""
    checkpoint: str | None = None
    """That checkpoint."""
    base: bool = False
    """Whether the model before training is evaluated too, and compared with."""
    report: str | None = None
    """An earlier report that is compared with."""
    gate: bool = False
    """Whether what fell against that report is a failure."""
    against: str | None = None
    """What is compared with, in the user's words."""
    asked_first: bool = False
    """Whether another evaluation is compared with this one."""
    kept: bool = True
    """Whether the report of a run is one of its records, and not only its answers are wanted."""
    data_run: str | None = None
    """Directory of the run whose data is asked for; None: the data that the configuration names."""
    accept_data: bool = False
    """Whether tasks on the run's own documents may have those of today, where the documents of the training are gone."""
    accepted: list[str] = field(default_factory=list)
    """How the base differs from the one that the run was trained on, where the user accepts that.

    The report then is of weights that the run never had, and is no record of the run."""
    recorded: bool = True
    """Whether the run's directory may take the report among its records: not that of another user."""


def evaluate_worker(config: RunConfig, job: EvaluationJob, job_dir: Path) -> None:
    """Evaluate as one rank of the job that the environment describes; rank 0 writes the report into `job.to`.

    Raises what ended it. `job_dir` has the records of the processes, apart from those of a run.
    """
    with rank_of_job(job_dir, config.run.lease_s) as (request, attempt):
        _evaluate(config, job, job_dir, request, attempt)


def _evaluate(config: RunConfig, job: EvaluationJob, job_dir: Path, request: StopRequest, attempt: Attempt) -> None:
    attempt.set_run_dir(job_dir, int(os.environ.get("RANK", 0)))
    tokenizer = load_tokenizer(config.model)
    opened = _RunData(job)
    data, tasks, staged, runtime = meet(config, tokenizer, request, attempt, opened.open)
    if opened.accepted:
        job = replace(job, accepted=[*job.accepted, *opened.accepted])
    console = Console(enabled=runtime.is_main, log=job_dir / "logs" / f"rank-{runtime.rank}.log")
    precision = resolve_precision(config.precision, runtime)
    asked = Agreement(request, runtime).for_loop().ask_and_wait
    attempt.phase = "building the model"
    built: tuple[Engine, Built] | None = None
    if config.evaluation.server.url is not None:
        evaluator = TaskEvaluator(tasks, _served(config, tokenizer, runtime, asked))
    else:
        with reporting_evaluation_out_of_memory(lambda: attempt.phase, config, runtime):
            if quantising_library(config.model.path) is not None:
                engine, step, precision = build_as_stored(config, tokenizer, data, runtime)
            else:
                engine, step, _ = build_engine(staged.with_local_model(config), tokenizer, data, precision, runtime)
        built = engine, step
        if step.step_module.plan.optimizer_hooks is not None:
            _tell_length(config, data, step, engine, runtime, opened)
        evaluator = TaskEvaluator(tasks, asking_of(config, data, step, tokenizer, engine, runtime, asked))
    evaluator.report_progress(console.say)
    _refuse_deleted(job, runtime)
    attempt.phase = "evaluating"
    about = _about(config, job, str(precision), runtime)
    unfinished = UnfinishedReport(Path(job.to), about["model"]) if runtime.is_main else None
    earlier = None if job.report is None else record.read_report(Path(job.report), "against")
    _name_opponents(job, evaluator, {} if earlier is None else earlier.rows)
    evaluator.check_rows()
    try:
        with (
            reporting_evaluation_out_of_memory(lambda: f"evaluation.tasks.{evaluator.current_task}", config, runtime),
            _telling_of_finished(unfinished, console),
        ):
            found = _both(job, built, evaluator, _Listener(console, unfinished, scored=job.kept))
    except Interrupted:
        raise Preempted("asked to stop; the same command begins the evaluation again, with its first task") from None
    attempt.phase = "writing the report"
    request.must_save()
    attempt.require_ownership(runtime)
    if unfinished is not None:
        report, shown = _report(config, job, about, [ready.task for ready in tasks], found)
        unfinished.discard()
        if config.logging.tables and not job.asked_first:
            track_evaluation(config, job_dir, report, shown, console.say)
    processes.barrier(runtime)
    staged.remove()


def _refuse_deleted(job: EvaluationJob, runtime: processes.Runtime) -> None:
    """Raise ConfigError on every rank if the run, which goes on, deleted the checkpoint while the model was built. All call."""
    if job.checkpoint is None:
        return
    checkpoint = Path(job.checkpoint)
    if not processes.call_on_main(checkpoint.is_dir, runtime):
        raise ConfigError(
            f"checkpoint: {checkpoint} was deleted meanwhile, since the run is still training; start the same command again"
        )


class _RunData:
    """The data of an evaluation: of a run what its tasks ask for, which mostly is nothing; else what the words name."""

    def __init__(self, job: EvaluationJob) -> None:
        self.job = job
        self.record: DataRecord | None = None
        self.accepted: list[str] = []
        """How the rows differ from those of the training, where the user accepts that."""

    def open(
        self,
        config: RunConfig,
        tokenizer: Any,
        *,
        stop: Callable[[], bool],
        choose_date: ChooseDate | None = None,
        say: PrintLine = print_on_rank_0,
    ) -> Prepared:
        """Open it or make it. Errors: those of preparing, DataError where the run's own rows are gone."""
        if self.job.data_run is None:
            return prepare_data(config, tokenizer, stop=stop, choose_date=choose_date, say=say)
        self.record = data_record(Path(self.job.data_run))
        keys = tasks_on_run_documents(asked_tasks(config))
        # An objective is changed in place: the model is built from the same configuration.
        config.objective, data, self.accepted = data_of_run(
            config,
            self.record,
            tokenizer,
            needed=RowsNeeded(f"{', '.join(keys)}: asks the run's own documents", GIVE_FILE) if keys else None,
            accept=self.job.accept_data,
            stop=stop,
            say=say,
        )
        return data


def _tell_length(
    config: RunConfig, data: Prepared, built: Built, engine: Engine, runtime: processes.Runtime, opened: _RunData
) -> None:
    """Tell a method that changes with the step how many steps the run had."""
    if opened.record is not None and opened.record.total_steps is not None:
        built.step_module.plan.optimizer_hooks.begin(opened.record.total_steps)  # type: ignore[union-attr]
    else:
        build_loader(config, data, built, engine, runtime)


def _served(config: RunConfig, tokenizer: Any, runtime: processes.Runtime, asked: Callable[[], bool]) -> ServedModel:
    """The model of `evaluation.server`, told what this one would be told; nothing is loaded. Errors: ConfigError."""
    about = read_config(config.model.path) or {}
    names = ("max_position_embeddings", "n_positions")
    positions = next(
        (n for each in (about, about.get("text_config") or {}) for at in names if (n := each.get(at))), None
    )
    encoder = TaskContext.from_settings(config.data, config.objective, kept_date(config)).encoder(tokenizer)
    return connect_served_model(config.evaluation, config.model.path or "", encoder, positions, runtime, asked)


@dataclass(frozen=True, slots=True)
class _Listener:
    """Who hears of each task that a model has answered: the console, and on rank 0 the unfinished report."""

    console: Console
    unfinished: UnfinishedReport | None
    scored: bool
    """Whether metrics mean something (prompts of a review have no right answer)."""

    def finished(self, arm: str, done: FinishedTask) -> None:
        """Tell of a task. Errors: StorageError."""
        name = done.prepared.task.name
        shown = "  ".join(f"{metric} {value:.4g}" for metric, value in done.metrics.items())
        metrics = f" {shown} " if self.scored else ""
        self.console.say(f"{arm}: {name}:{metrics} ({len(done.rows)} rows, {done.seconds:.1f} s)")
        if done.throughput is not None:
            self.console.say(f"{arm}: {name}: {done.throughput}")
        if self.unfinished is not None:
            self.unfinished.add(arm, done)


@contextmanager
def _telling_of_finished(unfinished: UnfinishedReport | None, console: Console) -> Iterator[None]:
    """However the evaluation is broken off, say which tasks are written down, and where."""
    try:
        yield
    except BaseException:
        if unfinished is not None and (names := unfinished.names()):
            console.say(f"finished before that: {', '.join(names)}; see {unfinished.directory / UNFINISHED}")
        raise


def _name_opponents(job: EvaluationJob, evaluator: TaskEvaluator, rows: dict[str, list[TaskRow]]) -> None:
    """Give tasks that judge two answers the other model's, as far as they are known; `rows` are its, by task."""
    for ready in evaluator.tasks:
        # The base has not answered yet: it meets the other model's answers once it has.
        ready.task.is_opponent = job.asked_first or job.base
        if ready.task.name in rows:
            ready.task.opponent_answers = {row.where: row.answer for row in rows[ready.task.name]}


def _both(
    job: EvaluationJob, built: tuple[Engine, Built] | None, evaluator: TaskEvaluator, listener: _Listener
) -> dict[str, EvaluatedModel]:
    """Every task of the model, and where asked for of what it was before training; None: of a server's. All ranks must call."""
    found: dict[str, EvaluatedModel] = {}
    if built is not None:
        found = _before(job, *built, evaluator, listener)
    for ready in evaluator.tasks:
        ready.task.is_opponent = job.asked_first
        if job.base:  # what is judged beside the other's answers
            ready.task.opponent_answers = {row.where: row.answer for row in found[BASE].rows[ready.task.name]}
    found[TUNED] = _ask(evaluator, TUNED, listener)
    return found


def _before(
    job: EvaluationJob, engine: Engine, built: Built, evaluator: TaskEvaluator, listener: _Listener
) -> dict[str, EvaluatedModel]:
    """What the model was before training, where asked for; then it is as its checkpoint says. All ranks must call."""
    found: dict[str, EvaluatedModel] = {}
    before = job.base and not built.tuning.keeps_base
    for ready in evaluator.tasks:
        ready.task.is_opponent = True
    if before:  # as it is before a checkpoint is loaded
        found[BASE] = _ask(evaluator, BASE, listener)
    if job.checkpoint is not None:
        engine.load(Path(job.checkpoint))
    if job.base and not before:
        with built.tuning.reference(built.step_module.model):
            found[BASE] = _ask(evaluator, BASE, listener)
    return found


def _ask(evaluator: TaskEvaluator, arm: str, listener: _Listener) -> EvaluatedModel:
    """Every task of one model. All ranks must call."""
    found = EvaluatedModel()
    for done in evaluator.run_tasks():
        name = done.prepared.task.name
        found.rows[name], found.metrics[name], found.seconds[name] = done.rows, done.metrics, done.seconds
        if done.throughput is not None:
            found.throughput[name] = done.throughput
        listener.finished(arm, done)
    return found


def _about(config: RunConfig, job: EvaluationJob, precision: str, runtime: processes.Runtime) -> dict[str, Any]:
    of_the_run = job.checkpoint is not None and not job.accepted
    return {
        "version": record.VERSION,
        "model": {
            "path": config.model.path,
            "adapters": config.model.adapters,
            "run": job.run,
            "checkpoint": None if job.checkpoint is None else Path(job.checkpoint).name,
            "tuning": str(config.tuning.name),
            "artefact": fingerprint(Path(str(job.checkpoint))) if of_the_run else None,
            "accepted": job.accepted,
        },
        "time": time.time(),
        "strategy": str(config.strategy.name),
        "processes": runtime.world_size,
        "server": config.evaluation.server.url,
        "device": processes.device_kind(runtime.device),
        "precision": precision,
        "versions": versions(),
    }


def _report(
    config: RunConfig, job: EvaluationJob, about: dict[str, Any], tasks: list[Task], found: dict[str, EvaluatedModel]
) -> tuple[dict[str, Any], dict[str, Table]]:
    """Intervals, comparison and files; rank 0 alone. The report, and tables of rows.

    Errors: ConfigError for a report that cannot be read, StorageError.
    """
    how = Bootstrap(config.evaluation.resamples, config.evaluation.resample_seed)
    mine = found[TUNED]
    earlier = None if job.report is None else record.read_report(Path(job.report), "against")
    said, apart, fell, shown = {}, {}, [], dict[str, Table]()
    for task in tasks:
        drawn = resample_metrics(task, mine.rows[task.name], how)
        said[task.name] = record.task_record(task, mine, confidence_intervals(task, mine.rows[task.name], drawn))
        other = _other(task, found.get(BASE), earlier)
        shown |= row_tables(task, mine.rows[task.name], None if other is None else other[0])
        if other is not None:
            apart[task.name] = comparison.compare_task(task, mine, drawn, *other, how)
            if job.gate:
                fell += comparison.regressions(task, apart[task.name]["metrics"])
    report = {**about, "method": how.description(paired=bool(apart)), "tasks": said}
    if job.against is not None:
        missing = [task.name for task in tasks if task.name not in apart]
        report["against"] = {"what": job.against, "tasks": apart, "not_there": missing}
    report |= {"regressions": fell} if job.gate else {}
    to = Path(job.to)
    record.write_report(to, report, found)
    if job.run is not None and job.kept and job.recorded and not job.accepted:
        keep_report(Path(job.run), EVALUATION, report)
    write_text_atomic(to / record.PAGE, page.render_page(report, tasks, found))
    return report, shown


def _other(
    task: Task, base: EvaluatedModel | None, earlier: EarlierEvaluation | None
) -> tuple[Any, dict[str, float]] | None:
    """(rows, metrics) of what a task is compared with; None where that has no such task."""
    if base is not None:
        return base.rows[task.name], base.metrics[task.name]
    if earlier is None or task.name not in earlier.report["tasks"]:
        return None
    metrics = earlier.report["tasks"][task.name]["metrics"]
    values = {name: each["value"] for name, each in metrics.items() if each["value"] is not None}
    return earlier.rows.get(task.name), values
