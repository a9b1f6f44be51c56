"""From a frozen config to a finished run, in one straight line: the assembly drawing. All ranks run it."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strategies import runtime as processes
from strategies.base import Engine, Precision, Progress
from strategies.build import resolve_precision
from strategies.errors import Preempted, ShardtuneError
from trainer.build import build_engine, build_loader, prepare_data
from trainer.checkpoints.chosen import choose
from trainer.checkpoints.kept import Checkpoints
from trainer.checkpoints.places import places_of
from trainer.config.run import RunConfig
from trainer.data.prepare import Prepared
from trainer.data.report.preview import preview, summary
from trainer.evaluation.base import Evaluator
from trainer.evaluation.build import build_evaluators
from trainer.export.card import CardFacts
from trainer.export.write import write_export
from trainer.facts import (
    Started,
    card_facts,
    end_text,
    outcome_record,
    run_facts,
    start_text,
    tracker_settings,
    write_run_record,
)
from trainer.forecast.fitting import must_fit
from trainer.guards.told import Told
from trainer.guards.watch import Guards
from trainer.lifecycle.attempt import Where, attempt
from trainer.lifecycle.identity import agree_on_run, establish
from trainer.loop import LoopSettings, Output, Trainer, Watch
from trainer.model.loading import load_tokenizer, weights_directory
from trainer.objectives.reference import Recording, record
from trainer.objectives.registry import reading_of
from trainer.planning.receipt import measured
from trainer.records.console import Console
from trainer.records.metrics import Meter
from trainer.records.outcome import Outcome
from trainer.records.status import State, write_status
from trainer.records.trackers import Trackers, build_trackers
from trainer.step import Built
from trainer.stopping.preempt import Agreement
from trainer.stopping.signals import StopRequest
from trainer.tuning.start import adapter_hash


def run_worker(config: RunConfig, run_dir: Path | None, sha256: str) -> None:
    """Train as one rank of the job that the environment describes; raises what ended the run.

    `run_dir` is needed on rank 0 only. How it ended is written down by `trainer/lifecycle/attempt.py`.
    """
    failed = False
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1  # a terminal's Ctrl-C goes to the launcher of several
    with StopRequest(interrupts=alone) as request:  # over when everything is written down
        try:
            with attempt(run_dir, config.run.lease_s, request) as where:
                _run(config, run_dir, sha256, request, where)
        except Preempted as stop:
            stop.signal_name = request.signal_name
            raise
        except BaseException:
            failed = True
            raise
        finally:
            processes.stop(failed=failed)


@dataclass(slots=True)
class Place:
    """Where a run takes place and who hears of it."""

    run_dir: Path
    sha256: str
    """Of the configuration."""
    runtime: processes.Runtime
    console: Console
    agreement: Agreement
    where: Where


def _run(config: RunConfig, run_dir: Path | None, sha256: str, request: StopRequest, where: Where) -> None:
    tokenizer = load_tokenizer(config.model)
    data, runtime = meet(config, tokenizer, request, where)
    run_dir = where.settle(agree_on_run(run_dir, sha256, runtime), runtime.rank)
    console = introduce(config, run_dir, data, tokenizer, runtime)
    place = Place(run_dir, sha256, runtime, console, Agreement(request, runtime), where)

    precision = resolve_precision(config.precision, runtime)
    checked = check(config, data, precision, place)
    where.phase = "building the model"
    engine, built, source = build_engine(config, tokenizer, data, precision, runtime)
    record_reference(config, data, engine, built, place)

    where.phase = "resuming"
    places = places_of(run_dir, config.checkpoint.fallback_dir)
    checkpoints = Checkpoints(places, config.checkpoint, runtime, console.say)
    resumed_from = choose(checkpoints.places, config.run.resume, runtime)
    progress = engine.load(resumed_from) if resumed_from else Progress()
    checkpoints.begin(resumed_from, config.run.resume)
    where.step = progress.step
    loader, total_steps = build_loader(config, data, built, engine, runtime)
    facts = run_facts(
        config,
        checked,
        Started(
            sha256=sha256,
            precision=precision,
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
    trackers = open_records(config, facts, progress, place)
    meter = Meter(runtime, facts["flops_per_token"], facts["reference_tflops"], built.step_module.objective.metrics)
    told = Told(run_dir, data.directory, loader, console.say)
    trainer = Trainer(
        loop_settings(config, total_steps),
        engine=meter.timing(engine) if config.logging.step_parts else engine,
        loader=loader,
        progress=progress,
        evaluators=evaluators_of(config, data, built, tokenizer, engine, place),
        output=Output(meter, trackers, console, checkpoints, where.at_step, lambda: where.still_ours(runtime)),
        watch=Watch(place.agreement, Guards(config.guards, config.optim.max_skipped_steps, runtime, told)),
    )
    try:
        where.phase = "training"
        outcome = trainer.fit()
        where.phase = "export"
        where.still_ours(runtime)
        exported = export(config, engine, built, tokenizer, card_facts(config, facts, outcome, run_dir), place)
    finally:
        trackers.close()
        note_measured(facts, meter, checkpoints, place)
    where.still_ours(runtime)
    close_records(facts, outcome, exported, trackers, place)


def meet(config: RunConfig, tokenizer: Any, request: StopRequest, where: Where) -> tuple[Prepared, processes.Runtime]:
    """The data, and then this process as a rank of its job: no collective can time out while documents are tokenised.

    All ranks must call. Raises Preempted on every rank when any was told to stop meanwhile, LeaseLost on every rank when rank 0
    stopped since another attempt had taken the directory over.
    """

    def told() -> bool:
        return request.signal_name is not None

    with where.meet(config.run.timeout_s) as meeting:
        data = prepare_data(config, tokenizer, stop=lambda: meeting.stopping(told()))
        where.phase = "start of the processes"
        if not meeting.go_on(told):
            raise Preempted("asked to stop before the processes had met; nothing is lost but the preparation")
    return data, start_processes(config, meeting.store)


def check(config: RunConfig, data: Prepared, precision: Precision, place: Place) -> dict[str, Any]:
    """What `run.json` says of the run that is gone on with and, where that was asked for, of the memory there is.

    All ranks must call. Raises ConfigError where it is another run, DoesNotFit where it takes more memory.
    """
    place.where.phase = "comparing with the run that is gone on with"
    place.where.still_ours(place.runtime)
    identity = establish(config, data, place.run_dir, place.runtime)
    place.where.phase = "simulating whether the run fits"
    return identity | must_fit(config, data, precision, place.runtime, place.console.say)


def evaluators_of(
    config: RunConfig, data: Prepared, built: Built, tokenizer: Any, engine: Engine, place: Place
) -> list[Evaluator]:
    """The evaluators that the configuration asks for; none without held-out data."""
    return build_evaluators(
        config.evaluation,
        config.model,
        data.evaluation,
        built,
        tokenizer,
        engine,
        place.runtime,
        watch_for_stop=lambda: place.agreement.another().asked,
    )


def loop_settings(config: RunConfig, total_steps: int) -> LoopSettings:
    """What of the configuration the loop goes by."""
    return LoopSettings(
        total_steps=total_steps,
        seed=config.run.seed,
        lr=config.optim.lr,
        schedule=config.schedule,
        evaluation=config.evaluation,
        log_every=config.logging.every_steps,
        save_final=config.checkpoint.save_final,
    )


def start_processes(config: RunConfig, store: Any = None) -> processes.Runtime:
    """This process as a rank of its job, whose ranks may have met in `store` before. All ranks must call."""
    run = config.run
    return processes.start(
        str(run.device),
        timeout_s=run.timeout_s,
        threads=run.threads,
        matmul=run.matmul,
        shared_memory=run.shared_memory,
        store=store,
    )


def introduce(config: RunConfig, run_dir: Path, data: Prepared, tokenizer: Any, runtime: processes.Runtime) -> Console:
    """The console of this rank, and on it what will be learned, before anything is."""
    console = Console(enabled=runtime.is_main, log=run_dir / "logs" / f"rank-{runtime.rank}.log")
    head = f"run {run_dir}: {config.strategy.name}, {config.tuning.name}, {runtime.world_size} process(es)"
    reading = reading_of(config.objective)
    shown = preview(data.train, tokenizer, reading, data.label_names, width=console.width)
    console.say("\n".join([head, summary(data.report), shown]))
    return console


def record_reference(config: RunConfig, data: Prepared, engine: Engine, built: Built, place: Place) -> None:
    """What the initial model says of the data, where the objective compares with it and it will be gone. All ranks call."""
    if not built.step_module.objective.uses_reference or built.tuning.keeps_base:
        return
    place.where.phase = "recording the reference"
    start = getattr(config.tuning, "from_", None)
    place.console.say("reference: recording what the model says of every answer before training, once")
    how = Recording(
        built.collator,
        built.reading.ahead,
        batch=max(config.batch["micro"], config.evaluation.batch),
        directory=place.run_dir / "reference",
        key=place.sha256 if start is None else f"{place.sha256}/{adapter_hash(start)}",
    )
    splits = {"train": data.train, "eval": data.evaluation}
    try:
        record(splits, engine, how, place.runtime, place.agreement.another().asked)
    except Preempted:  # on all ranks alike
        place.where.still_ours(place.runtime)
        raise


def open_records(config: RunConfig, facts: dict[str, Any], progress: Progress, place: Place) -> Trackers:
    """The start screen, and rank 0's trackers, with `run.json` and `status.json` begun; nothing on the others. All ranks call."""
    place.console.say(start_text(facts))
    place.where.still_ours(place.runtime)
    if not place.runtime.is_main:
        return Trackers([])
    trackers, progress.wandb_id, note = build_trackers(
        config.logging,
        place.run_dir,
        wandb_id=progress.wandb_id,
        resume_step=progress.step,
        settings=tracker_settings(config, facts),
    )
    if note:
        facts["substitutions"]["logging.wandb"] = note
        place.console.say(f"substituted: logging.wandb: {note}")
    write_run_record(place.run_dir, facts)
    write_status(place.run_dir, State.running, step=progress.step)
    return trackers


def note_measured(facts: dict[str, Any], meter: Meter, checkpoints: Checkpoints, place: Place) -> None:
    """What the run took into `run.json`, however it ends: rank 0's word, without a collective."""
    if place.runtime.is_main:
        facts["receipt"]["measured"] = measured(meter, place.runtime.device, checkpoints.last)
        with suppress(OSError, ShardtuneError):  # what ended the run is not to be hidden; a success writes it once more
            if place.where.lease is not None:
                place.where.lease.check()
            write_run_record(place.run_dir, facts)


def close_records(
    facts: dict[str, Any], outcome: Outcome, exported: Path | None, trackers: Trackers, place: Place
) -> None:
    """The outcome into `run.json`, and the last lines on the screen. All ranks must call."""
    if place.runtime.is_main:
        write_run_record(place.run_dir, {**facts, "outcome": outcome_record(outcome)})
        place.console.say(end_text(place.run_dir, outcome, exported, trackers.sync_line))
    processes.barrier(place.runtime)


def export(
    config: RunConfig, engine: Engine, built: Built, tokenizer: Any, card: CardFacts, place: Place
) -> Path | None:
    """Write `export/`, where asked for; its directory. All ranks must call."""
    if not config.export.at_end:
        return None
    return write_export(
        engine,
        built,
        tokenizer,
        base_path=str(weights_directory(config.model)),
        destination=place.run_dir / "export",
        config=config.export,
        card=card,
        runtime=place.runtime,
    )
