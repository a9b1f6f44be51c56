"""From a frozen configuration to an evaluation: what `shardtune evaluate` starts on every rank, the assembly drawing of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strategies import runtime as processes
from strategies.build import resolve_precision
from strategies.errors import Preempted
from trainer.build import build_engine, build_loader
from trainer.config.run import RunConfig
from trainer.evaluation.loss import Interrupted
from trainer.evaluation.report import against, page, record
from trainer.evaluation.report.intervals import Bootstrap, interval, resampled
from trainer.evaluation.report.record import BASE, TUNED, Earlier, Found
from trainer.evaluation.task_evaluator import TaskEvaluator
from trainer.evaluation.tasks.base import Task
from trainer.facts import versions
from trainer.lifecycle.attempt import Where, attempt
from trainer.model.loading import load_tokenizer
from trainer.records.console import Console
from trainer.records.status import write_text_atomic
from trainer.run import asking_of, meet
from trainer.stopping.preempt import Agreement
from trainer.stopping.signals import StopRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
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


def evaluate_worker(config: RunConfig, job: Job, job_dir: Path) -> None:
    """Evaluate as one rank of the job that the environment describes; rank 0 writes the report into `job.to`.

    Raises what ended it. `job_dir` has the records of the processes, apart from those of a run.
    """
    failed = False
    with StopRequest(interrupts=int(os.environ.get("WORLD_SIZE", 1)) == 1) as request:
        try:
            with attempt(job_dir, config.run.lease_s, request) as where:
                _evaluate(config, job, job_dir, request, where)
        except Preempted as stop:
            stop.signal_name = request.signal_name
            raise
        except BaseException:
            failed = True
            raise
        finally:
            processes.stop(failed=failed)


def _evaluate(config: RunConfig, job: Job, job_dir: Path, request: StopRequest, where: Where) -> None:
    where.settle(job_dir, int(os.environ.get("RANK", 0)))
    tokenizer = load_tokenizer(config.model)
    data, tasks, runtime = meet(config, tokenizer, request, where)
    console = Console(enabled=runtime.is_main, log=job_dir / "logs" / f"rank-{runtime.rank}.log")
    precision = resolve_precision(config.precision, runtime)
    where.phase = "building the model"
    engine, built, _ = build_engine(config, tokenizer, data, precision, runtime)
    if built.step_module.around_update is not None:
        build_loader(config, data, built, engine, runtime)  # tells it the length of the run
    asked = Agreement(request, runtime).another().asked
    asking = asking_of(config, data, built, tokenizer, engine, runtime, asked)
    evaluator = TaskEvaluator(tasks, asking)
    found: dict[str, Found] = {}
    where.phase = "evaluating"
    try:
        before = job.base and not built.tuning.keeps_base
        if before:  # as it is before a checkpoint is loaded
            found[BASE] = _ask(evaluator, console, BASE)
        if job.checkpoint is not None:
            engine.load(Path(job.checkpoint))
        if job.base and not before:
            with built.tuning.reference(built.step_module.model):
                found[BASE] = _ask(evaluator, console, BASE)
        found[TUNED] = _ask(evaluator, console, TUNED)
    except Interrupted:
        raise Preempted("asked to stop; an evaluation keeps nothing: the same command begins it again") from None
    where.phase = "writing the report"
    where.still_ours(runtime)
    if runtime.is_main:
        about = _about(config, job, str(precision), runtime)
        _report(config, job, about, [ready.task for ready in tasks], found)
    processes.barrier(runtime)


def _ask(evaluator: TaskEvaluator, console: Console, arm: str) -> Found:
    """Every task of one model. All ranks must call."""
    found = Found()
    for done in evaluator.each():
        name = done.ready.task.name
        found.rows[name], found.values[name], found.seconds[name] = done.rows, done.values, done.seconds
        shown = "  ".join(f"{metric} {value:.4g}" for metric, value in done.values.items())
        console.say(f"{arm}: {name}: {shown}  ({len(done.rows)} rows, {done.seconds:.1f} s)")
        if done.pace is not None:
            found.paces[name] = done.pace
            console.say(f"{arm}: {name}: {done.pace}")
    return found


def _about(config: RunConfig, job: Job, precision: str, runtime: processes.Runtime) -> dict[str, Any]:
    return {
        "version": record.VERSION,
        "model": {
            "path": config.model.path,
            "adapters": config.model.adapters,
            "run": job.run,
            "checkpoint": None if job.checkpoint is None else Path(job.checkpoint).name,
            "tuning": str(config.tuning.name),
        },
        "strategy": str(config.strategy.name),
        "processes": runtime.world_size,
        "device": processes.device_kind(runtime.device),
        "precision": precision,
        "versions": versions(),
    }


def _report(config: RunConfig, job: Job, about: dict[str, Any], tasks: list[Task], found: dict[str, Found]) -> None:
    """Intervals, comparison and files; rank 0 alone. Errors: ConfigError for a report that cannot be read, StorageError."""
    how = Bootstrap(config.evaluation.resamples, config.evaluation.resample_seed)
    mine = found[TUNED]
    earlier = None if job.report is None else record.read(Path(job.report), "against")
    said, apart, fell = {}, {}, []
    for task in tasks:
        drawn = resampled(task, mine.rows[task.name], how)
        spans = {name: interval(values) for name, values in drawn.items()}
        said[task.name] = record.task_record(task, mine, spans)
        if (other := _other(task, found.get(BASE), earlier)) is not None:
            apart[task.name] = against.compare(task, mine, drawn, *other, how)
            if job.gate:
                fell += against.regressions(task, apart[task.name]["metrics"])
    report = {**about, "method": how.says(paired=bool(apart)), "tasks": said}
    if job.against is not None:
        missing = [task.name for task in tasks if task.name not in apart]
        report["against"] = {"what": job.against, "tasks": apart, "not_there": missing}
    report |= {"regressions": fell} if job.gate else {}
    to = Path(job.to)
    record.write(to, report, found)
    write_text_atomic(to / record.PAGE, page.page(report, tasks, found))


def _other(task: Task, base: Found | None, earlier: Earlier | None) -> tuple[Any, dict[str, float]] | None:
    """(rows, metrics) of what a task is compared with; None where that has no such task."""
    if base is not None:
        return base.rows[task.name], base.values[task.name]
    if earlier is None or task.name not in earlier.report["tasks"]:
        return None
    metrics = earlier.report["tasks"][task.name]["metrics"]
    values = {name: each["value"] for name, each in metrics.items() if each["value"] is not None}
    return earlier.rows.get(task.name), values
