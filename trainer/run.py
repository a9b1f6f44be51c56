"""From a frozen configuration to a finished run, in one straight line: the assembly drawing. All ranks run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from strategies import runtime as processes
from strategies.base import Engine, Progress
from strategies.build import resolve_precision
from strategies.errors import Preempted
from strategies.sequence import with_sequence_parallelism
from trainer.build.inputs import RunInputs
from trainer.build.parallel import check_parallel
from trainer.build.parts import build_engine, build_loader, prepare_data
from trainer.build.reward_models import check_reward_models
from trainer.build.staging import StagedCopies, stage
from trainer.checkpoints.layout import checkpoint_dirs_of
from trainer.checkpoints.manager import Checkpoints
from trainer.checkpoints.patience import waiting_for_disk
from trainer.checkpoints.recovery import publish_complete_staging_dirs
from trainer.checkpoints.resume_selection import choose_checkpoint
from trainer.config.evaluation import is_greater_better
from trainer.config.launching import run_writes_export, separate_job_writes_export
from trainer.config.run import RunConfig, settled_matmul
from trainer.data.batches.loader import StepLoader
from trainer.data.prepare import PreparedData
from trainer.evaluation.tasks.prepared import PreparedTask, TaskContext, prepare_tasks
from trainer.loop import Trainer
from trainer.loop_types import LoopSettings, Monitors, Sinks
from trainer.model.loading import check_model_files, load_tokenizer
from trainer.monitors.anomalies import Guards
from trainer.monitors.anomaly_log import AnomalyLog
from trainer.monitors.detectors import ChallengeDetectors
from trainer.monitors.stragglers import Stragglers
from trainer.objectives.reference import RecordingSettings, record_reference_logps
from trainer.objectives.registry import objective_family
from trainer.objectives.rollouts import RoundsConfig
from trainer.planner.fit_check import check_run_fits
from trainer.planner.micro_batch import resolve_micro_batch
from trainer.planner.oom_report import reporting_out_of_memory
from trainer.planner.strategy_choice import resolve_strategy
from trainer.reporting.console import Console
from trainer.reporting.metrics import Meter
from trainer.reporting.profile import Profiler
from trainer.reporting.run_record import RunRecord
from trainer.reporting.tracking import Trackers
from trainer.rollout.loader import RolloutLoader
from trainer.rollout.rewards.copies import use_copies_of_run
from trainer.session.announcements import (
    build_slow_rank_reporter,
    close_records,
    metering_energy,
    open_console,
    open_trackers_and_records,
    recording_end_of_training,
)
from trainer.session.attempt import Attempt, open_rank_of_job, raise_if_config_was_replaced
from trainer.session.context import RunContext
from trainer.session.evaluation_interval import EvaluationInterval, resolve_evaluation_interval
from trainer.session.evaluators import build_run_evaluators
from trainer.session.export_at_end import export_at_end
from trainer.session.identity import agree_on_run, compare_and_write_identity
from trainer.session.matmul import resolve_matmul
from trainer.session.monitors import build_detectors, tasks_for_tokenizer
from trainer.session.result import TrainedRun, choose_and_measure_checkpoint
from trainer.session.rounds import open_rounds, show_answers_of_rounds
from trainer.session.run_facts import RunParts, build_run_record
from trainer.session.template_date import choose_template_date, record_template_date
from trainer.step import BuiltModel
from trainer.stopping.preempt import RankStopAgreement
from trainer.stopping.signals import StopRequest
from trainer.tuning.initial_adapter import adapter_sha256

WriteConfig = Callable[[Path, RunConfig], None]
"""Writes `config.yaml` of a run directory again, with what the run has chosen itself."""


def train_as_rank(config: RunConfig, run_dir: Path | None, config_sha256: str, write_config: WriteConfig) -> None:
    """Train as one rank of the job that the environment describes: the whole of a run, as `shardtune train` starts it.

    Raises what ended the run, after recording it.

    `run_dir`: needed on rank 0 only.
    `config_sha256`: hash of the configuration, which all ranks compare.
    `write_config`: called on rank 0 with what the run chooses itself, such as the micro-batch.
    """
    with open_rank_of_job(run_dir, config.run.lease_s) as (request, attempt):
        if attempt.lease is not None:  # rank 0, which owns the run directory
            owned_run_dir = attempt.lease.run_dir
            raise_if_config_was_replaced(owned_run_dir, config_sha256)
            # An earlier start may have been killed between writing a checkpoint and giving it its name.
            checkpoint_dirs = checkpoint_dirs_of(owned_run_dir, config.checkpoint.fallback_dir)
            publish_complete_staging_dirs(checkpoint_dirs, partial(print, flush=True))
        _run(config, run_dir, config_sha256, request, attempt, write_config)


def _run(
    config: RunConfig,
    run_dir: Path | None,
    config_sha256: str,
    request: StopRequest,
    attempt: Attempt,
    write_config: WriteConfig,
) -> None:
    """Prepare the data, let the ranks meet, settle what the configuration leaves open, and train. All ranks must call.

    Data comes first: preparing it may take hours, and no collective may wait that long.
    """
    tokenizer = load_tokenizer(config.model)
    check_before_data_is_prepared(config)
    data, tasks, staged_copies, runtime = prepare_data_and_meet_ranks(config, tokenizer, request, attempt)
    run_dir = attempt.set_run_dir(agree_on_run(run_dir, config_sha256, runtime), runtime.rank)

    # What the run chooses itself is written into `config.yaml`, if the directory is still this attempt's: a later start keeps it.
    attempt.require_run_dir_ownership(runtime)
    config = record_template_date(config, data.date, run_dir, runtime, write_config)
    config, runtime = resolve_matmul(config, run_dir, runtime, write_config)
    console = open_console(config, run_dir, data, tokenizer, runtime)
    context = RunContext(config_sha256, runtime, console, RankStopAgreement(request, runtime), attempt)
    inputs = RunInputs(tokenizer, data, resolve_precision(config.precision, runtime), runtime)
    identity_facts = compare_with_resumed_run(config, data, context)
    config = choose_strategy_and_micro_batch(config, inputs, context, write_config)
    # Refused here, before there are weights, rather than by the allocator an hour later.
    attempt.phase = "simulating whether the run fits"
    fit_facts = check_run_fits(config, data, inputs.precision, runtime, console.print_line)

    attempt.phase = "building the model"
    checked_facts = identity_facts | fit_facts | staged_copies.run_record_entry()
    local_config = staged_copies.with_local_model(config)
    _train_and_export(config, local_config, inputs, tasks, checked_facts, context, request)
    staged_copies.release()


def _train_and_export(
    config: RunConfig,
    local_config: RunConfig,
    inputs: RunInputs,
    tasks: list[PreparedTask],
    checked_facts: dict[str, Any],
    context: RunContext,
    request: StopRequest,
) -> None:
    """Build the model of a settled configuration, train it, measure it and export it. All ranks must call.

    `local_config`: `config` with the copy of the model on this node's disk, if there is one.
    `checked_facts`: fields of `run.json` that are known already, such as what the run was compared by.
    """
    data = inputs.data
    runtime = inputs.runtime
    attempt = context.attempt
    # The model, the checkpoint that it resumes from, and its batches.
    engine, built, source = build_engine(
        local_config, inputs.tokenizer, data, inputs.precision, runtime, scores_answers=True
    )
    # Before a checkpoint is loaded: the reference is the initial model.
    record_reference_logps_of_data(config, data, engine, built, context)
    checkpoints, resumed_from, progress = resume_from_checkpoint(config, engine, context)
    loader, total_steps = build_batch_loader(config, inputs, built, engine, progress, resumed_from, context)
    interval = resolve_evaluation_interval(config, data, built, loader, total_steps, progress, runtime)
    # What the run is, for `run.json` and the start screen.
    run_record = build_run_record(
        config,
        checked_facts,
        RunParts(
            config_sha256=context.config_sha256,
            precision=inputs.precision,
            runtime=runtime,
            data=data,
            engine=engine,
            built=built,
            source=source,
            loader=loader,
            total_steps=total_steps,
            resumed_from=resumed_from,
        ),
    )
    # From here on there is something to save: only the main thread ends the process, with trackers and checkpoints in order.
    request.disarm_end_of_stuck_process()
    # What watches and shows the training.
    trackers = open_trackers_and_records(config, run_record, progress, context)
    show_answers_of_rounds(config, loader, trackers, context)
    meter = build_meter(config, run_record, built, runtime)
    detectors = build_detectors(config, built, total_steps, interval, context)
    profiler = Profiler(config.profile, context.run_dir, runtime, attempt.at_step, context.console.print_line)
    trainer = Trainer(
        loop_settings(config, total_steps, interval),
        engine=meter.wrap_with_timing(engine) if config.logging.step_parts else engine,
        loader=loader,
        progress=progress,
        evaluators=build_run_evaluators(config, inputs, tasks, built, engine, loader, detectors, context),
        sinks=build_sinks(meter, trackers, checkpoints, profiler, context),
        monitors=build_monitors(config, data, loader, detectors, context),
    )
    # The training, and the export of what it made.
    with recording_end_of_training(config, trackers, trainer.outcome, run_record, meter, checkpoints, context):
        attempt.phase = "training"
        with metering_energy(config, context), reporting_out_of_memory(trainer, config, run_record, runtime), profiler:
            outcome = trainer.fit()
        trained = TrainedRun(
            config=config,
            inputs=inputs,
            built=built,
            engine=engine,
            loader=loader,
            checkpoints=checkpoints,
            detectors=detectors,
            outcome=outcome,
            context=context,
            local_model=local_config.model,
        )
        exported = measure_and_export(trained, run_record)
    attempt.require_run_dir_ownership(runtime)
    close_records(run_record, outcome, exported, trackers, context)


def check_before_data_is_prepared(config: RunConfig) -> None:
    """Refuse, before hours of preparation, models that cannot do what the run asks of them. Raises ConfigError."""
    # Whether ranks can share rows and experts is a matter of the model's architecture.
    check_parallel(config)
    if isinstance(config.objective, RoundsConfig) and config.run.dir is not None:
        # A requeued job may find no reward file any more: how it is called, and its columns, are read from the run's copy.
        use_copies_of_run(config.objective.rewards, Path(config.run.dir))
    check_reward_models(config)


class PreparedRun(NamedTuple):
    """What a run has once its data is prepared and its ranks have met."""

    data: PreparedData
    """Its tokens are read from the copy on this node's disk, if there is one."""
    tasks: list[PreparedTask]
    staged_copies: StagedCopies
    """The copies of model and data on this node's disk (`launcher.stage`), to be released at the end."""
    runtime: processes.Runtime


def prepare_data_and_meet_ranks(
    config: RunConfig,
    tokenizer: Any,
    request: StopRequest,
    attempt: Attempt,
    open_data: Callable[..., PreparedData] = prepare_data,
) -> PreparedRun:
    """Prepare the data and that of tasks, copy them to this node's disk, and only then form the process group.

    All ranks must call. Before there is a process group, ranks exchange only short texts through a store, so no collective can
    time out meanwhile.

    `open_data`: prepares the data; an evaluation gives another function.

    Raises Preempted on every rank if any was told to stop meanwhile, LeaseLost on every rank if another attempt took the
    directory.
    """

    def is_told_to_stop() -> bool:
        return request.signal_name is not None

    check_model_files(config.model)
    with attempt.join_ranks(config.run.timeout_s) as rendezvous:

        def stop() -> bool:
            return rendezvous.poll_stop_decision(is_told_to_stop())

        # Called only for a template that writes today's date, which has to be one for all ranks and all starts.
        choose_date = partial(choose_template_date, config, attempt.run_dir, rendezvous, stop)
        log = None if attempt.run_dir is None else attempt.run_dir / "logs" / f"rank-{rendezvous.rank}.log"
        print_line = Console(enabled=rendezvous.rank == 0, log=log).print_line
        data = open_data(config, tokenizer, stop=stop, choose_date=choose_date, print_line=print_line)
        task_context = TaskContext.from_settings(config.data, config.objective, data.date)
        held_out_data = data if data.has_rows else None  # from which a task without a file takes its rows
        tasks = prepare_tasks(tasks_for_tokenizer(config, tokenizer), task_context, held_out_data, tokenizer, stop=stop)
        attempt.phase = "copying to the disk of the node"
        staged_copies = stage(config, data, should_stop=stop)
        attempt.phase = "start of the processes"
        if not rendezvous.wait_for_all(is_told_to_stop):
            raise Preempted("asked to stop before the processes had met; nothing is lost but the preparation")
    local_data = staged_copies.with_local_tokens(data)
    return PreparedRun(local_data, tasks, staged_copies, join_process_group(config, rendezvous.store))


def compare_with_resumed_run(config: RunConfig, data: PreparedData, context: RunContext) -> dict[str, Any]:
    """Check that a resumed run is the one that was begun: same code, data, model and settings. All ranks must call.

    Returns what it was compared by, for `run.json`. Raises ConfigError on every rank for a difference that `run.accept` does not
    name.
    """
    context.attempt.phase = "comparing with the run that is resumed"
    context.attempt.require_run_dir_ownership(context.runtime)
    return compare_and_write_identity(config, data, context.run_dir, context.runtime)


def choose_strategy_and_micro_batch(
    config: RunConfig, inputs: RunInputs, context: RunContext, write_config: WriteConfig
) -> RunConfig:
    """Choose the fastest strategy and the largest micro-batch that fit into memory, where they are `auto`. All ranks must call.

    `inputs`: data, tokenizer and precision, with which steps are tried. Returns the configuration with both choices; rank 0 also
    writes each into `config.yaml`, so that a resumed run keeps it. Raises DoesNotFit if no choice fits, LeaseLost on every rank
    if another attempt took the run directory.
    """

    def keep_choice(chosen_config: RunConfig) -> None:
        context.attempt.require_run_dir_ownership(context.runtime)
        if context.runtime.is_main:
            write_config(context.run_dir, chosen_config)

    context.attempt.phase = "choosing the strategy"
    config = resolve_strategy(config, inputs, context.console.print_line, keep_choice)
    context.attempt.phase = "choosing the micro-batch"
    return resolve_micro_batch(config, inputs, context.console.print_line, keep_choice)


class ResumedRun(NamedTuple):
    """Where a run goes on: at the loaded checkpoint, or at its beginning."""

    checkpoints: Checkpoints
    """All of the run, to which it adds."""
    resumed_from: Path | None
    """The checkpoint that was loaded; None at a first start."""
    progress: Progress
    """That of the checkpoint; at a first start all zero."""


def resume_from_checkpoint(config: RunConfig, engine: Engine, context: RunContext) -> ResumedRun:
    """Load the checkpoint that `run.resume` names into `engine`, if there is one, so that the run goes on from it.

    All ranks must call.

    `engine`: the distributed model with its optimizer. Raises StorageError or ConfigError on every rank if it cannot be used.
    """
    context.attempt.phase = "resuming"
    checkpoint_dirs = checkpoint_dirs_of(context.run_dir, config.checkpoint.fallback_dir)
    checkpoints = Checkpoints(checkpoint_dirs, config.checkpoint, context.runtime, context.console.print_line)
    # Somebody may rename the run directory while the run is under way.
    context.attempt.on_run_dir_renamed.append(checkpoints.follow_renamed_run_dir)
    with waiting_for_disk("reading the checkpoints", 0, context.runtime, context.console.print_line):
        resumed_from = choose_checkpoint(checkpoint_dirs, config.run.resume, context.runtime)
        progress = engine.load(resumed_from) if resumed_from else Progress()
        checkpoints.continue_from_checkpoint(resumed_from, config.run.resume)
    context.attempt.step = progress.step
    return ResumedRun(checkpoints, resumed_from, progress)


def build_batch_loader(
    config: RunConfig,
    inputs: RunInputs,
    built: BuiltModel,
    engine: Engine,
    progress: Progress,
    resumed_from: Path | None,
    context: RunContext,
) -> tuple[StepLoader | RolloutLoader, int]:
    """Build what gives this rank its batches; returns (the loader, the optimizer steps of the whole run). All ranks must call.

    - An objective without rollouts (`sft`, `dpo`): batches of prepared documents.
    - One with rollouts (`grpo`): rounds, in which the model writes answers that rewards score, and steps learn from them. They go
      on from where `progress` and the checkpoint `resumed_from` stand.

    `inputs`: data, tokenizer and precision of the run.
    `built`: the model with its objective. `engine`: that model distributed over the ranks.

    Raises StorageError, or an error of a reward that cannot be opened.
    """
    learns_from_documents = objective_family(config.objective).rollout is None
    if learns_from_documents:
        return build_loader(config, inputs.data, built, context.runtime)
    return open_rounds(config, inputs, built, engine, progress, resumed_from, context)


def build_meter(config: RunConfig, run_record: RunRecord, built: BuiltModel, runtime: processes.Runtime) -> Meter:
    """Build the meter, which measures the speed of every step and times the forward passes of the model's blocks.

    It needs the floating-point operations of a token for the share of the hardware's peak (MFU).
    """
    meter = Meter(runtime, run_record.flops_per_token, run_record.mfu_tflops, built.step_module.objective.metrics)
    meter.time_blocks(built.step_module.shard_units(), expert_ranks=config.parallel.experts)
    return meter


def build_sinks(
    meter: Meter, trackers: Trackers, checkpoints: Checkpoints, profiler: Profiler, context: RunContext
) -> Sinks:
    """Collect the objects that receive what the loop produces: metrics, lines on the screen, checkpoints and traces."""
    require_run_dir_ownership = partial(context.attempt.require_run_dir_ownership, context.runtime)
    return Sinks(meter, trackers, context.console, checkpoints, profiler.at_step, require_run_dir_ownership)


def build_monitors(
    config: RunConfig,
    data: PreparedData,
    loader: StepLoader | RolloutLoader,
    detectors: ChallengeDetectors,
    context: RunContext,
) -> Monitors:
    """Build what may end the run early, leave an update out, or warn of slow ranks.

    `detectors`: of overfitting, forgetting, divergence and the like, which look at evaluations and training losses.
    """
    # Steps whose loss or gradient norm stands out: noted with their documents, left out or rolled back (`guards.*`).
    anomaly_log = AnomalyLog(context.run_dir, data.directory, loader, context.console.print_line)
    guards = Guards(config.guards, config.optim.max_skipped_steps, context.runtime, anomaly_log)
    # Ranks that compute slower than the others: only reported.
    stragglers = Stragglers(config.logging.slow_rank, context.runtime, build_slow_rank_reporter(context))
    # Beside these: signals on any rank (`stop_agreement`), and overfitting, forgetting and divergence (`detectors`).
    return Monitors(context.stop_agreement, guards, stragglers, detectors)


def loop_settings(config: RunConfig, total_steps: int, interval: EvaluationInterval | None = None) -> LoopSettings:
    """Take from the configuration what the loop reads.

    `total_steps`: of the whole run, those before a resume included.
    `interval`: what `evaluation.every_steps` was resolved to. Without it, `auto` evaluates nothing between start and end.
    """
    every_steps = config.evaluation.every_steps
    if interval is None:
        interval = EvaluationInterval(every_steps if isinstance(every_steps, int) else 0)
    return LoopSettings(
        total_steps=total_steps,
        seed=config.run.seed,
        lr=config.optim.peak_lr,
        schedule=config.schedule,
        evaluation=replace(config.evaluation, greater_is_better=is_greater_better(config)),
        evaluate_every=interval.steps,
        intermediate_loss_only=interval.intermediate_loss_only,
        log_every=config.logging.every_steps,
        # The export job of a pipeline, which runs after this one, has nothing but this checkpoint to read.
        save_final=config.checkpoint.save_final or separate_job_writes_export(config),
        save_for_export=run_writes_export(config),
    )


def measure_and_export(trained: TrainedRun, run_record: RunRecord) -> Path | None:
    """Measure the checkpoint that is to be exported, the last or the best one, and export it. All ranks must call.

    Returns the directory of the export; None if nothing is exported. Errors: those of `choose_and_measure_checkpoint` and
    `export_at_end`; LeaseLost on every rank if another attempt took the run directory.
    """
    model_facts = choose_and_measure_checkpoint(trained, run_record)
    attempt = trained.context.attempt
    attempt.phase = "export"
    attempt.require_run_dir_ownership(trained.context.runtime)  # measuring may have taken long
    return export_at_end(trained, model_facts, run_record)


def join_process_group(config: RunConfig, store: Any = None) -> processes.Runtime:
    """Join the process group of the job, and choose threads, device and the library for matrix products. All ranks must call.

    `store`: of torch.distributed, where the ranks have met before; None lets them meet here.
    """
    run = config.run
    runtime = processes.join_job(
        str(run.device),
        timeout_s=run.timeout_s,
        threads=run.threads,
        matmul=settled_matmul(config),  # the library that an earlier start chose, or what the configuration says
        shared_memory=run.shared_memory,
        store=store,
    )
    return with_sequence_parallelism(runtime, config.parallel.sequence)


def record_reference_logps_of_data(
    config: RunConfig, data: PreparedData, engine: Engine, built: BuiltModel, context: RunContext
) -> None:
    """Record how likely the model finds each answer before training, for objectives that compare with it (`dpo`, `kto`).

    Done once, since the untrained model is gone after the first step. All ranks must call. Nothing is recorded if the objective
    needs none (`sft`), or if the base stays in the model under its adapter: each step then computes them anew. Raises Preempted
    on every rank if any was asked to stop meanwhile, or LeaseLost.
    """
    if not built.step_module.objective.uses_reference or built.tuning.keeps_base:
        return
    context.attempt.phase = "recording the reference"
    # What decides the initial model: the configuration, and the weights of the adapter that it begins from.
    initial_model_key = context.config_sha256
    first_adapter = getattr(config.tuning, "from_", None)
    if first_adapter is not None:
        initial_model_key += f"/{adapter_sha256(first_adapter)}"
    context.console.print_line("reference: recording what the model says of every answer before training, once")
    recording = RecordingSettings(
        collator=built.collator,
        look_ahead_of=built.data_spec.look_ahead_sample,  # kto also compares with an answer to another prompt
        max_batch=max(config.batch["micro"], config.evaluation.batch),
        directory=context.run_dir / "reference",
        key=initial_model_key,
    )
    splits = {"train": data.train, "eval": data.evaluation, "test": data.test}
    try:
        record_reference_logps(splits, engine, recording, context.runtime, context.stop_agreement.new_stop_check())
    except Preempted:
        # Raised on all ranks alike. If the directory was lost meanwhile, that is the reason to give.
        context.attempt.require_run_dir_ownership(context.runtime)
        raise
