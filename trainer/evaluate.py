"""Runs an evaluation from a frozen configuration, in one straight line: what `shardtune evaluate` does on every rank."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from strategies import runtime as processes
from strategies.base import Engine, Precision
from strategies.build import resolve_precision
from strategies.errors import ConfigError, Interrupted, Preempted
from trainer.build.parallel import check_parallel
from trainer.build.parts import build_engine, build_loader, prepare_data
from trainer.build.quantised_model import build_quantised_for_evaluation
from trainer.build.rounds import num_steps_of_run
from trainer.checkpoints.manifest import manifest_sha256
from trainer.config.evaluation import tasks_to_run
from trainer.config.run import RunConfig, settled_template_date
from trainer.data.batches.mixing import build_order
from trainer.data.prepare import ChooseDate, PreparedData
from trainer.data.report.progress import PrintLine, print_on_rank_0
from trainer.evaluation.base_and_tuned import (
    FinishedTaskReporter,
    evaluate_models,
    printing_finished_tasks_if_it_fails,
    set_opponent_answers,
)
from trainer.evaluation.endpoint.judge import Judge
from trainer.evaluation.job import TEST_FILE, EvaluationJob
from trainer.evaluation.report import comparison, page, record
from trainer.evaluation.report.intervals import Bootstrap, confidence_intervals, resample_metrics
from trainer.evaluation.report.record import BASE, TUNED, EarlierEvaluation, EvaluatedModel
from trainer.evaluation.report.tables import row_tables
from trainer.evaluation.report.unfinished import UnfinishedReport
from trainer.evaluation.served import ServedModel, connect_served_model
from trainer.evaluation.task_evaluator import TaskEvaluator
from trainer.evaluation.tasks.base import Task, TaskRow
from trainer.evaluation.tasks.prepared import TaskContext, keys_of_tasks_on_run_documents
from trainer.model.loading import load_tokenizer
from trainer.model.quantised_checkpoints import quantising_library
from trainer.model.rules import read_config
from trainer.objectives.reference import RecordingSettings, record_reference_logps
from trainer.objectives.registry import objective_family
from trainer.objectives.rollouts import RoundsConfig
from trainer.planner.oom_report import reporting_evaluation_out_of_memory
from trainer.reporting.console import Console
from trainer.reporting.jsonl import json_text
from trainer.reporting.results import EVALUATION_REPORT, TEST_REPORT, keep_report
from trainer.reporting.status import write_text_atomic
from trainer.reporting.trackers.base import LoggedTable
from trainer.rollout.rewards.scorer import open_scorer
from trainer.run import prepare_data_and_meet_ranks
from trainer.session.announcements import track_evaluation
from trainer.session.attempt import Attempt, open_rank_of_job
from trainer.session.evaluators import build_test_evaluators, model_interface_for_run
from trainer.session.looks_at_test_set import (
    CheckpointWeights,
    measure_test_metrics,
    num_test_documents,
    record_test_result,
)
from trainer.session.run_data import DataRecord, ReasonToReadRows, load_run_data, read_data_record
from trainer.session.run_facts import versions
from trainer.step import BuiltModel
from trainer.stopping.preempt import RankStopAgreement
from trainer.stopping.signals import StopRequest

GIVE_TASK_FILE_ADVICE = "Give the task a file of its own (evaluation.tasks.NAME.path=FILE)"


def evaluate_worker(config: RunConfig, job: EvaluationJob, job_dir: Path) -> None:
    """Evaluate as one rank of the job that the environment describes; rank 0 writes the report into `job.report_dir`.

    `job_dir`: has the records of the processes (status, logs), apart from those of a run. Raises what ended the evaluation.
    """
    with open_rank_of_job(job_dir, config.run.lease_s) as (request, attempt):
        _evaluate(config, job, job_dir, request, attempt)


def _evaluate(config: RunConfig, job: EvaluationJob, job_dir: Path, request: StopRequest, attempt: Attempt) -> None:
    """Read tasks and data, build or connect the model, run all tasks, and let rank 0 write the report. All ranks must call."""
    attempt.set_run_dir(job_dir, int(os.environ.get("RANK", 0)))
    tokenizer = load_tokenizer(config.model)
    check_parallel(config, scores_answers=False)
    evaluation_data = _EvaluationData(job)
    data, tasks, staged_copies, runtime = prepare_data_and_meet_ranks(
        config, tokenizer, request, attempt, evaluation_data.open_or_prepare
    )
    if evaluation_data.accepted_differences:
        job = replace(job, accepted=[*job.accepted, *evaluation_data.accepted_differences])
    console = Console(enabled=runtime.is_main, log=job_dir / "logs" / f"rank-{runtime.rank}.log")
    precision = resolve_precision(config.precision, runtime)
    stop_now = RankStopAgreement(request, runtime).new_stop_check()
    attempt.phase = "building the model"
    engine_and_model: tuple[Engine, BuiltModel] | None = None  # None: the model runs on a server
    if config.evaluation.server.url is not None:
        evaluator = TaskEvaluator(tasks, _connect_server(config, tokenizer, runtime, stop_now))
    else:
        local_config = staged_copies.with_local_model(config)
        with reporting_evaluation_out_of_memory(lambda: attempt.phase, config, runtime):
            engine, built, precision = _build_model(config, local_config, tokenizer, data, precision, runtime)
        engine_and_model = (engine, built)
        data_record = evaluation_data.record
        recorded_steps = None if data_record is None else data_record.total_steps
        _set_total_steps_of_optimizer_hooks(config, data, built, runtime, recorded_steps)
        if job.split == TEST_REPORT:
            attempt.phase = "evaluating the test documents"
            stop_agreement = RankStopAgreement(request, runtime)
            _evaluate_test(config, job, data, tokenizer, engine_and_model, job_dir, runtime, stop_agreement)
            staged_copies.release()
            return
        model_interface = model_interface_for_run(config, data, built, tokenizer, engine, runtime, stop_now)
        evaluator = TaskEvaluator(tasks, model_interface)
    evaluator.report_progress(console.print_line)
    _raise_if_checkpoint_was_deleted(job, runtime)
    attempt.phase = "evaluating"
    report_head = _report_head(config, job, str(precision), runtime)
    unfinished = UnfinishedReport(Path(job.report_dir), report_head["model"]) if runtime.is_main else None
    earlier = None if job.report is None else record.read_report(Path(job.report))
    set_opponent_answers(job, evaluator, {} if earlier is None else earlier.rows)
    evaluator.check_rows()
    try:
        with (
            reporting_evaluation_out_of_memory(lambda: f"evaluation.tasks.{evaluator.current_task}", config, runtime),
            printing_finished_tasks_if_it_fails(unfinished, console),
        ):
            reporter = FinishedTaskReporter(console, unfinished, prints_metrics=job.kept)
            models = evaluate_models(job, engine_and_model, evaluator, reporter)
    except Interrupted:
        raise Preempted("asked to stop; the same command begins the evaluation again, with its first task") from None
    attempt.phase = "writing the report"
    request.disarm_end_of_stuck_process()
    attempt.require_run_dir_ownership(runtime)
    if unfinished is not None:
        report, shown_tables = _write_report(config, job, report_head, [prepared.task for prepared in tasks], models)
        unfinished.discard()
        if config.logging.tables and not job.is_opponent:
            track_evaluation(config, job_dir, report, shown_tables, console.print_line)
    processes.barrier(runtime)
    staged_copies.release()


def _build_model(
    config: RunConfig,
    local_config: RunConfig,
    tokenizer: Any,
    data: PreparedData,
    precision: Precision,
    runtime: processes.Runtime,
) -> tuple[Engine, BuiltModel, Precision]:
    """Build the model to evaluate: (the engine, the model in it, the precision that it computes in). All ranks must call.

    A model whose files are quantised computes in their type; any other in `precision`. `local_config`: names the copy of the
    model's files on this node, if there is one.
    """
    if quantising_library(config.model.path) is not None:
        return build_quantised_for_evaluation(config, tokenizer, data, runtime)
    engine, built, _ = build_engine(local_config, tokenizer, data, precision, runtime)
    return engine, built, precision


def _evaluate_test(
    config: RunConfig,
    job: EvaluationJob,
    data: PreparedData,
    tokenizer: Any,
    engine_and_model: tuple[Engine, BuiltModel],
    job_dir: Path,
    runtime: processes.Runtime,
    stop_agreement: RankStopAgreement,
) -> None:
    """Measure a checkpoint on the run's test documents, and let rank 0 record and count that. All ranks must call.

    Each such evaluation is counted, since documents by which a checkpoint is chosen test nothing any more.

    `engine_and_model`: with the weights of before the training; the checkpoint is loaded here.
    `job_dir`: for the result, and for log-probabilities of the initial model if the loss compares with it.

    Errors: ConfigError without test documents, StorageError, Preempted, those of rewards.
    """
    engine, built = engine_and_model
    if data.test is None or len(data.test) == 0:
        raise ConfigError(
            f"split=test: {job.run} has no test documents left: all of them were dropped as copies or leaks"
        )
    assert job.run is not None
    assert job.checkpoint is not None
    if built.step_module.objective.uses_reference and not built.tuning.keeps_base:
        # The loss compares with the initial model, which the engine has until the checkpoint is loaded.
        recording = RecordingSettings(
            built.collator,
            built.data_spec.look_ahead_sample,
            max_batch=config.evaluation.batch,
            directory=job_dir / "reference",
            key="/".join([job.checkpoint, *job.accepted]),  # another base has other log-probabilities
        )
        record_reference_logps({"test": data.test}, engine, recording, runtime, stop_agreement.new_stop_check())
    _raise_if_checkpoint_was_deleted(job, runtime)
    progress = engine.load(Path(job.checkpoint))

    with ExitStack() as at_end:
        scorer = None
        if isinstance(config.objective, RoundsConfig):
            judge = None
            if config.evaluation.judge.url:
                judge = Judge(config.evaluation.judge, runtime, stop_agreement.new_stop_check())
            scorer = open_scorer(
                config.objective, runtime, job_dir, stop_asked=stop_agreement.is_asked_on_this_rank, judge=judge
            )
            at_end.callback(scorer.close)
        evaluators = build_test_evaluators(
            config, data, built, tokenizer, engine, runtime, scorer, stop_agreement.new_stop_check
        )
        metrics = measure_test_metrics(evaluators, engine)
    weights = CheckpointWeights(
        run_dir=Path(job.run),
        step=progress.step,
        checkpoint=Path(job.checkpoint).name,
        manifest_sha256=None if job.accepted else manifest_sha256(Path(job.checkpoint)),
    )
    if runtime.is_main:
        result = record_test_result(weights, metrics, num_test_documents(data), may_write_run_dir=job.recorded)
        write_text_atomic(job_dir / TEST_FILE, json_text(result, indent=1) + "\n")
    processes.barrier(runtime)


def _raise_if_checkpoint_was_deleted(job: EvaluationJob, runtime: processes.Runtime) -> None:
    """Raise ConfigError if the run, which still trains, deleted the checkpoint while the model was built. All ranks must call."""
    if job.checkpoint is None:
        return
    checkpoint = Path(job.checkpoint)
    if not processes.call_on_main(checkpoint.is_dir, runtime):
        raise ConfigError(
            f"checkpoint: {checkpoint} was deleted meanwhile, since the run is still training; start the same command again"
        )


class _EvaluationData:
    """The data of an evaluation: of a run only the documents that its tasks need, often none; else what `data.path` names."""

    def __init__(self, job: EvaluationJob) -> None:
        self.job = job
        self.record: DataRecord | None = None
        """What the run recorded of its data; None if the evaluated model is not a run's, and before `open_or_prepare`."""
        self.accepted_differences: list[str] = []
        """How the rows differ from those of the training, if the user accepts that."""

    def open_or_prepare(
        self,
        config: RunConfig,
        tokenizer: Any,
        *,
        stop: Callable[[], bool],
        choose_date: ChooseDate | None = None,
        print_line: PrintLine = print_on_rank_0,
    ) -> PreparedData:
        """Give an evaluation its data: what `data.path` names, or what the evaluated run was trained on.

        Of a run, its own documents are read only if a task or `split=test` asks for them; else a stand-in of one document gives
        the model its shapes. Sets `record` and `accepted_differences`, and replaces the objective in `config` by the one that
        this data goes with. Raises ConfigError or DataError if the data cannot be prepared, DataError if the run's own rows are
        missing.

        `choose_date`: settles which date a chat template writes as today's.
        """
        if self.job.data_run is None:
            return prepare_data(config, tokenizer, stop=stop, choose_date=choose_date, print_line=print_line)
        self.record = read_data_record(Path(self.job.data_run))
        run_data = load_run_data(
            config,
            self.record,
            tokenizer,
            reason_to_read=self._reason_to_read_rows(config),
            accept_changed_rows=self.job.accept_data,
            stop=stop,
            print_line=print_line,
        )
        # The objective is changed in place, because the model is built from the same configuration.
        config.objective = run_data.objective
        self.accepted_differences = run_data.accepted_differences
        return run_data.data

    def _reason_to_read_rows(self, config: RunConfig) -> ReasonToReadRows | None:
        """Why the evaluation needs the run's own documents, such as for `split=test`; None if it needs none of them."""
        if self.job.split == TEST_REPORT:
            return ReasonToReadRows(purpose="split=test: asks the run's test documents", way_out="Leave split=test out")
        task_keys = keys_of_tasks_on_run_documents(tasks_to_run(config))
        if task_keys:
            return ReasonToReadRows(
                purpose=f"{', '.join(task_keys)}: asks the run's own documents", way_out=GIVE_TASK_FILE_ADVICE
            )
        return None


def _set_total_steps_of_optimizer_hooks(
    config: RunConfig,
    data: PreparedData,
    built: BuiltModel,
    runtime: processes.Runtime,
    recorded_steps: int | None,
) -> None:
    """Tell a tuning method whose parameters change with the step (such as AdaLoRA's ranks) how many steps the run had.

    - No such method: nothing to do.
    - The run recorded its steps (`recorded_steps`): those.
    - Else: as many as the data and the budget make.
    """
    if built.step_module.plan.optimizer_hooks is None:
        return
    if recorded_steps is not None:
        built.set_total_steps(recorded_steps)
        return
    learns_from_rounds = objective_family(config.objective).rollout is not None
    if learns_from_rounds:
        _, order = build_order(config.data, data.train, sequences_per_document=1, seed=config.run.seed)
        steps = num_steps_of_run(config, order, data.train.lengths)
        built.set_total_steps(steps)
    else:
        build_loader(config, data, built, runtime)  # sets them, too


def _connect_server(
    config: RunConfig, tokenizer: Any, runtime: processes.Runtime, stop_now: Callable[[], bool]
) -> ServedModel:
    """Connect to the model of `evaluation.server`, which is sent tokens of `model.path`'s tokenizer. Loads no weights.

    `stop_now`: asked on all ranks while answers are awaited. Raises ConfigError if the server cannot be used.
    """
    model_config = read_config(config.model.path) or {}
    text_config = model_config.get("text_config") or {}  # of a model for text and images
    # The length of the context: as set, or as config.json says it.
    positions = config.model.positions or _max_positions_of(model_config) or _max_positions_of(text_config)
    # What turns rows of tasks into tokens, with the run's chat template.
    encoder = TaskContext.from_settings(config.data, config.objective, settled_template_date(config)).build_encoder(
        tokenizer
    )
    return connect_served_model(config.evaluation, config.model.path or "", encoder, positions, runtime, stop_now)


def _max_positions_of(settings: dict[str, Any]) -> int | None:
    """The number of positions of a model by its config.json; None if it does not say."""
    return settings.get("max_position_embeddings") or settings.get("n_positions") or None


def _report_head(config: RunConfig, job: EvaluationJob, precision: str, runtime: processes.Runtime) -> dict[str, Any]:
    """The head of an evaluation's report, as JSON values: the model, how and where it was evaluated, and versions of libraries.

    `job.accepted`: differences between model and checkpoint that the user has accepted, as lines.
    """
    # With an accepted difference, such as another base, the weights are not those of the checkpoint.
    is_checkpoint_of_run = job.checkpoint is not None and not job.accepted
    return {
        "version": record.REPORT_VERSION,
        "model": {
            "path": config.model.path,
            "adapters": config.model.adapters,
            "run": job.run,
            "checkpoint": None if job.checkpoint is None else Path(job.checkpoint).name,
            "tuning": str(config.tuning.name),
            "artefact": manifest_sha256(Path(str(job.checkpoint))) if is_checkpoint_of_run else None,
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


def _write_report(
    config: RunConfig,
    job: EvaluationJob,
    report_head: dict[str, Any],
    tasks: list[Task],
    models: dict[str, EvaluatedModel],
) -> tuple[dict[str, Any], dict[str, LoggedTable]]:
    """Compute intervals and comparisons, and write the report's files; rank 0 alone. Returns (report, tables of rows by name).

    `models`: the evaluated model under `TUNED`, and the base under `BASE` if the job asked for it.
    `job.report`: an earlier report to compare with; `job.gate`: whether to list what became worse.

    Raises ConfigError for an earlier report that cannot be read, StorageError if a file cannot be written.
    """
    bootstrap = Bootstrap(config.evaluation.resamples, config.evaluation.resample_seed)
    model = models[TUNED]
    earlier = None if job.report is None else record.read_report(Path(job.report))
    task_records = {}
    comparisons = {}
    regressions: list[str] = []
    shown_tables: dict[str, LoggedTable] = {}
    compared_rows_by_task: dict[str, list[TaskRow]] = {}
    for task in tasks:
        rows = model.rows[task.name]
        resampled = resample_metrics(task, rows, bootstrap)
        task_records[task.name] = record.build_task_record(task, model, confidence_intervals(task, rows, resampled))
        compared = _compared_result(task, models.get(BASE), earlier)
        if compared is None:
            shown_tables |= row_tables(task, rows, None)
            continue
        compared_rows, compared_metrics = compared
        shown_tables |= row_tables(task, rows, compared_rows)
        compared_rows_by_task[task.name] = compared_rows or []
        comparisons[task.name] = comparison.compare_task(
            task, model, resampled, compared_rows, compared_metrics, bootstrap
        )
        if job.gate:
            regressions += comparison.regression_lines(task, comparisons[task.name]["metrics"])
    report = {**report_head, "method": bootstrap.description(paired=bool(comparisons)), "tasks": task_records}
    if job.against is not None:
        missing = [task.name for task in tasks if task.name not in comparisons]
        report["against"] = {"what": job.against, "tasks": comparisons, "not_there": missing}
    if job.gate:
        report["regressions"] = regressions
    directory = Path(job.report_dir)
    record.write_report(directory, report, models)
    if job.run is not None and job.kept and job.recorded and not job.accepted:
        keep_report(Path(job.run), EVALUATION_REPORT, report)
    write_text_atomic(directory / record.PAGE_FILE, page.render_page(report, tasks, models, compared_rows_by_task))
    return report, shown_tables


class ComparedResult(NamedTuple):
    """What the model that an evaluation is compared with reached in one task."""

    rows: list[TaskRow] | None
    """None if the earlier evaluation kept none of the task."""
    metrics: dict[str, float]


def _compared_result(
    task: Task, base: EvaluatedModel | None, earlier: EarlierEvaluation | None
) -> ComparedResult | None:
    """What the compared model reached in a task: the base, or the model of an earlier report; None if it did not run the task."""
    if base is not None:
        return ComparedResult(base.rows[task.name], base.metrics[task.name])
    if earlier is None or task.name not in earlier.report["tasks"]:
        return None
    metrics = {}
    for name, entry in earlier.report["tasks"][task.name]["metrics"].items():
        if entry["value"] is not None:
            metrics[name] = entry["value"]
    return ComparedResult(earlier.rows.get(task.name), metrics)
