"""From a frozen config to a finished run, in one straight line: the assembly drawing. All ranks run it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strategies import runtime as processes
from strategies.audit import sharding_record
from strategies.base import Engine, Progress
from strategies.errors import ConfigError, Preempted
from trainer import facts as report
from trainer.build import build_engine, build_evaluators, build_loader, prepare_data, resolve_precision
from trainer.checkpoints.kept import Checkpoints, choose
from trainer.config.run import RunConfig
from trainer.data.labels import namer
from trainer.data.prepare import Prepared
from trainer.data.report.preview import preview, summary
from trainer.loop import Outcome, Trainer
from trainer.model.loading import Built, load_tokenizer, weights_directory
from trainer.objectives import reference
from trainer.objectives.build import build_objective
from trainer.preempt import Agreement, StopRequest
from trainer.records.console import Console
from trainer.records.metrics import Meter
from trainer.records.status import State, record_failure, write_status
from trainer.records.trackers import Trackers, build_trackers
from trainer.tuning.start import adapter_hash


@dataclass(slots=True)
class Where:
    """How far the run is, for the record of a failure."""

    phase: str = "data preparation"
    step: int | None = None
    run_dir: Path | None = None

    def at_step(self, step: int) -> None:
        """Note the step that is being taken."""
        self.step = step


def run_worker(config: RunConfig, run_dir: Path | None, sha256: str) -> None:
    """Train as one rank of the job that the environment describes; raises what ended the run.

    `run_dir` is needed on rank 0 only. The first failing rank leaves `failure.json`; rank 0 keeps `status.json`.
    """
    where = Where(run_dir=run_dir)
    rank = int(os.environ.get("RANK", 0))
    # Each host's first rank tells its own launcher; where the disk is shared, that is one directory and rank 0's word.
    tells = run_dir is not None and int(os.environ.get("LOCAL_RANK", 0)) == 0
    try:
        with StopRequest() as request:
            _run(config, run_dir, sha256, request, where)
        if tells and run_dir is not None:
            write_status(run_dir, State.done, step=where.step)
    except Preempted as stop:
        if tells and run_dir is not None:
            write_status(run_dir, State.preempted, step=where.step, reason=str(stop))
        raise
    except BaseException as error:
        if where.run_dir is not None and record_failure(where.run_dir, rank, error, where.phase, where.step):
            reason = f"rank {rank}, {where.phase}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            write_status(where.run_dir, State.failed, step=where.step, reason=reason)
        raise
    finally:
        processes.stop()


def _run(config: RunConfig, run_dir: Path | None, sha256: str, request: StopRequest, where: Where) -> None:
    # Data first: no collective can time out while documents are tokenised.
    tokenizer = load_tokenizer(config.model)
    data = prepare_data(config, tokenizer, stop=lambda: request.signal_name is not None)

    where.phase = "start of the processes"
    runtime = start_processes(config)
    run_dir = where.run_dir = agree_on_run(run_dir, sha256, runtime)
    console = introduce(config, run_dir, data, tokenizer, runtime)

    where.phase = "building the model"
    precision = resolve_precision(config.precision, runtime)
    engine, built, source = build_engine(config, tokenizer, data, precision, runtime)
    agreement = Agreement(request, runtime)
    record_reference(config, run_dir, sha256, data, engine, built, tokenizer, console, agreement, runtime, where)

    where.phase = "resuming"
    checkpoints = Checkpoints(run_dir / "checkpoints", config.checkpoint, runtime)
    resumed_from = choose(checkpoints.directory, config.run.resume, runtime, config.checkpoint)
    progress = engine.load(resumed_from) if resumed_from else Progress()
    where.step = progress.step
    loader, total_steps = build_loader(config, data, built, tokenizer, engine, runtime)
    evaluators = build_evaluators(config, data, built, tokenizer, engine, runtime, agreement)
    facts = report.run_facts(
        config,
        sha256=sha256,
        precision=precision,
        runtime=runtime,
        built=built,
        data=data,
        sharding=sharding_record(engine, runtime),
        initialised=source.initialised,
        total_steps=total_steps,
        loader=loader,
        resumed_from=resumed_from,
    )
    console.say(report.start_text(facts))
    trackers = open_records(config, run_dir, facts, progress, console, runtime)
    trainer = Trainer(
        config,
        engine=engine,
        loader=loader,
        total_steps=total_steps,
        progress=progress,
        checkpoints=checkpoints,
        evaluators=evaluators,
        meter=Meter(runtime, facts["flops_per_token"], facts["reference_tflops"], built.step_module.objective.metrics),
        trackers=trackers,
        console=console,
        agreement=agreement,
        on_step=where.at_step,
    )
    try:
        where.phase = "training"
        outcome = trainer.fit()
        where.phase = "export"
        exported = export(config, run_dir, engine, built, tokenizer, outcome, facts, runtime)
    finally:
        trackers.close()
    close_records(run_dir, facts, outcome, exported, trackers, console, runtime)


def start_processes(config: RunConfig) -> processes.Runtime:
    """This process as a rank of its job. All ranks must call."""
    run = config.run
    return processes.start(
        str(run.device),
        timeout_s=run.timeout_s,
        threads=run.threads,
        matmul=run.matmul,
        shared_memory=run.shared_memory,
    )


def agree_on_run(run_dir: Path | None, sha256: str, runtime: processes.Runtime) -> Path:
    """Rank 0's run directory, on every rank; raises ConfigError where ranks were given different configs."""
    hashes = processes.gather_objects(sha256, runtime)
    if len(set(hashes)) > 1:
        odd = next(rank for rank, value in enumerate(hashes) if value != hashes[0])
        raise ConfigError(
            f"rank {odd} has another configuration than rank 0 ({hashes[odd][:8]} and {hashes[0][:8]}): start all ranks "
            "with the same words and the same files"
        )
    agreed = processes.broadcast_object(None if run_dir is None else str(run_dir), runtime)
    if agreed is None:
        raise ConfigError("run.dir: rank 0 has none; set run.dir")
    return Path(agreed)


def introduce(config: RunConfig, run_dir: Path, data: Prepared, tokenizer: Any, runtime: processes.Runtime) -> Console:
    """The console of this rank, and on it what will be learned, before anything is."""
    console = Console(enabled=runtime.is_main, log=run_dir / "logs" / f"rank-{runtime.rank}.log")
    pairs = build_objective(config.objective).sequences_per_document == 2
    head = f"run {run_dir}: {config.strategy.name}, {config.tuning.name}, {runtime.world_size} process(es)"
    name_label = namer(data.label_names, multi_label=getattr(config.objective, "multi_label", False))
    shown = preview(data.train, tokenizer, width=console.width, name_label=name_label, pairs=pairs)
    console.say("\n".join([head, summary(data.report), shown]))
    return console


def record_reference(
    config: RunConfig,
    run_dir: Path,
    sha256: str,
    data: Prepared,
    engine: Engine,
    built: Built,
    tokenizer: Any,
    console: Console,
    agreement: Agreement,
    runtime: processes.Runtime,
    where: Where,
) -> None:
    """What the initial model says of the data, where the objective compares with it and it will be gone. All ranks call."""
    if not reference.is_recorded(built):
        return
    where.phase = "recording the reference"
    start = getattr(config.tuning, "from_", None)
    console.say("reference: recording what the model says of every answer before training, once")
    reference.record(
        config,
        data,
        engine=engine,
        built=built,
        pad_token_id=tokenizer.pad_token_id,
        runtime=runtime,
        directory=run_dir / "reference",
        key=sha256 if start is None else f"{sha256}/{adapter_hash(start)}",
        stop_now=agreement.asked,
    )


def open_records(
    config: RunConfig,
    run_dir: Path,
    facts: dict[str, Any],
    progress: Progress,
    console: Console,
    runtime: processes.Runtime,
) -> Trackers:
    """Rank 0's trackers, with `run.json` and `status.json` begun; nothing on the other ranks."""
    if not runtime.is_main:
        return Trackers([])
    trackers, progress.wandb_id, note = build_trackers(
        config.logging,
        run_dir,
        wandb_id=progress.wandb_id,
        resume_step=progress.step,
        settings=report.tracker_settings(config, facts),
    )
    if note:
        facts["substitutions"]["logging.wandb"] = note
        console.say(f"substituted: logging.wandb: {note}")
    report.write_run_record(run_dir, facts)
    write_status(run_dir, State.running, step=progress.step)
    return trackers


def close_records(
    run_dir: Path,
    facts: dict[str, Any],
    outcome: Outcome,
    exported: Path | None,
    trackers: Trackers,
    console: Console,
    runtime: processes.Runtime,
) -> None:
    """The outcome into `run.json` and `status.json`, and the last lines on the screen. All ranks must call."""
    if runtime.is_main:
        report.write_run_record(run_dir, {**facts, "outcome": report.outcome_record(outcome)})
        write_status(run_dir, State.done, step=outcome.progress.step)
        console.say(report.end_text(run_dir, outcome, exported, trackers.sync_line))
    processes.barrier(runtime)


def export(
    config: RunConfig,
    run_dir: Path,
    engine: Engine,
    built: Built,
    tokenizer: Any,
    outcome: Outcome,
    facts: dict[str, Any],
    runtime: processes.Runtime,
) -> Path | None:
    """Write `export/`, where asked for; its directory. All ranks must call."""
    if not config.export.at_end:
        return None
    from trainer.export.write import write_export

    return write_export(
        engine,
        built,
        tokenizer,
        base_path=str(weights_directory(config.model)),
        destination=run_dir / "export",
        config=config.export,
        card=report.card_facts(config, facts, outcome, run_dir),
        runtime=runtime,
    )
