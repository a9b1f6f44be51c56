"""From a frozen config to a finished run, in one straight line: the assembly drawing. All ranks run it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from strategies import runtime as processes
from strategies.audit import sharding_record
from strategies.base import Engine, Precision, Progress
from strategies.build import build_strategy
from strategies.errors import ConfigError, Preempted
from strategies.parameters import named_parameters
from trainer import report
from trainer.checkpoint import Checkpoints, choose
from trainer.config import RunConfig
from trainer.console import Console
from trainer.data.audit import preview, summary
from trainer.data.loader import StepLoader, eval_batches
from trainer.data.order import GlobalOrder, steps_for_tokens
from trainer.data.pack import best_fit_decreasing
from trainer.data.prepare import Prepared, prepare
from trainer.data.settings import Layout
from trainer.evaluation.base import Evaluator
from trainer.evaluation.loss import LossEvaluator
from trainer.loop import Outcome, Trainer, steps_from_budget
from trainer.metrics import Meter
from trainer.model import Built, build_step, load_tokenizer, weights_directory
from trainer.objectives.build import build_objective
from trainer.optim import build_optimizer
from trainer.preempt import Agreement, StopRequest
from trainer.status import State, record_failure, write_status
from trainer.tracking import Trackers, build_trackers
from trainer.weights import Checkpoint, WeightSource


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
    request = StopRequest().install()
    where = Where(run_dir=run_dir)
    rank = int(os.environ.get("RANK", 0))
    try:
        _run(config, run_dir, sha256, request, where)
    except Preempted as stop:
        if rank == 0 and where.run_dir is not None:
            write_status(where.run_dir, State.preempted, step=where.step, reason=str(stop))
        raise
    except BaseException as error:
        if where.run_dir is not None:
            record_failure(where.run_dir, rank, error, where.phase, where.step)
        raise
    finally:
        processes.stop()


def _run(config: RunConfig, run_dir: Path | None, sha256: str, request: StopRequest, where: Where) -> None:
    # Data first: no collective can time out while documents are tokenised.
    tokenizer = load_tokenizer(config.model)
    data = prepare_data(config, tokenizer)

    where.phase = "start of the processes"
    runtime = processes.start(str(config.run.device), timeout_s=config.run.timeout_s, threads=config.run.threads)
    run_dir = where.run_dir = agree_on_run(run_dir, sha256, runtime)
    console = Console(enabled=runtime.is_main)
    console.say(f"run {run_dir}: {config.strategy.name}, {config.tuning.name}, {runtime.world_size} process(es)")
    console.say(summary(data.report))
    console.say(preview(data.train, tokenizer, width=console.width))

    where.phase = "building the model"
    precision = resolve_precision(config.precision, runtime)
    engine, built, source = build_engine(config, tokenizer, data, precision, runtime)

    where.phase = "resuming"
    checkpoints = Checkpoints(run_dir / "checkpoints", config.checkpoint, runtime)
    found = choose(checkpoints.directory, config.run.resume, runtime, config.checkpoint)
    progress = engine.load(found) if found else Progress()
    where.step = progress.step

    loader, total_steps = build_loader(config, data, built, tokenizer, engine, runtime)
    agreement = Agreement(request, runtime)
    facts = report.run_facts(
        config,
        sha256=sha256,
        precision=precision,
        runtime=runtime,
        built=built,
        data=data,
        sharding=sharding_record(engine.step_module, runtime),
        initialised=source.initialised,
        total_steps=total_steps,
        loader=loader,
        resumed_from=None if found is None else found.name,
    )
    console.say(report.start_text(facts))
    trackers = Trackers([])
    if runtime.is_main:
        trackers, progress.wandb_id, note = build_trackers(
            config.logging,
            run_dir,
            wandb_id=progress.wandb_id,
            resume_step=progress.step,
            settings=report.tracker_settings(config, facts),
        )
        if note:
            facts["substitutions"]["logging.wandb"] = note
            console.say(f"substituted: logging.wandb -> {note}")
        report.write_run_record(run_dir, facts)
        write_status(run_dir, State.running, step=progress.step)
    trainer = Trainer(
        config,
        engine=engine,
        loader=loader,
        total_steps=total_steps,
        progress=progress,
        checkpoints=checkpoints,
        evaluators=build_evaluators(config, data, built, tokenizer, engine, runtime, agreement),
        meter=Meter(runtime, facts["flops_per_token"], facts["reference_tflops"]),
        trackers=trackers,
        console=console,
        agreement=agreement,
        on_step=where.at_step,
    )
    where.phase = "training"
    outcome = trainer.fit()

    where.phase = "export"
    finish(config, run_dir, engine, built, tokenizer, outcome, facts, trackers, console, runtime)


def prepare_data(config: RunConfig, tokenizer: Any) -> Prepared:
    """The prepared data set of the run, from the cache where nothing has changed."""
    objective = build_objective(config.objective)
    return prepare(
        config.data,
        tokenizer,
        counts=objective.counts,
        seed=config.run.seed,
        label_names=getattr(config.objective, "labels", None),
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


def resolve_precision(asked: Precision, runtime: processes.Runtime) -> Precision:
    """What `auto` means on this device: bf16 on GPUs that have it, else fp32."""
    if asked is not Precision.auto:
        return asked
    on_gpu = runtime.device.type == "cuda" and torch.cuda.is_bf16_supported()
    return Precision.bf16 if on_gpu else Precision.fp32


def build_engine(
    config: RunConfig, tokenizer: Any, data: Prepared, precision: Precision, runtime: processes.Runtime
) -> tuple[Engine, Built, WeightSource]:
    """Architecture on meta, tuned, sharded, filled, with its optimizer. All ranks must call."""
    strategy = build_strategy(config.strategy, precision, runtime)
    built = build_step(
        config.model,
        objective_config=config.objective,
        tuning_config=config.tuning,
        layout=config.data.layout,
        tokenizer=tokenizer,
        num_labels=len(data.label_names) if data.label_names else None,
        context=strategy.init_context(),
        on_cuda=runtime.device.type == "cuda",
    )
    if config.data.packing and built.layout is not Layout.padding_free:
        raise ConfigError(
            f"data.packing=true: needs a padding-free layout, and {built.config.model_type} is trained with "
            "padded rows here; set data.packing=false"
        )
    source = WeightSource(
        Checkpoint(weights_directory(config.model), built.base_prefix),
        built.tuning,
        seed=config.run.seed,
        init_std=getattr(built.config, "initializer_range", 0.02),
        new_token_ids=built.new_token_ids,
        vocabulary=built.vocabulary,
    )
    shapes = {name: tuple(p.shape) for name, p in named_parameters(built.step_module)}
    source.check(shapes, head_prefixes=built.head_prefixes)
    engine = strategy.prepare(
        built.step_module,
        source=source,
        make_optimizer=partial(build_optimizer, config.optim),
        max_grad_norm=config.optim.max_grad_norm,
    )
    return engine, built, source


def build_loader(
    config: RunConfig, data: Prepared, built: Built, tokenizer: Any, engine: Engine, runtime: processes.Runtime
) -> tuple[StepLoader, int]:
    """The batches of this rank, and how many steps the budget makes of them."""
    packs = best_fit_decreasing(data.train.lengths, config.data.max_length) if config.data.packing else None
    num_units = len(packs) if packs is not None else len(data.train)
    order = GlobalOrder(num_units, seed=config.run.seed, shuffle=config.data.shuffle)
    loader = StepLoader(
        data.train,
        order=order,
        units=packs,
        global_batch=config.batch["global"],
        micro_batch=config.batch["micro"],
        dp_rank=engine.dp_rank,
        dp_size=engine.dp_size,
        layout=built.layout,
        pad_token_id=tokenizer.pad_token_id,
        device=runtime.device,
    )
    steps = steps_from_budget(
        config,
        num_units=num_units,
        for_tokens=lambda tokens: steps_for_tokens(order, loader.unit_tokens, config.batch["global"], tokens),
    )
    return loader, steps


def build_evaluators(
    config: RunConfig,
    data: Prepared,
    built: Built,
    tokenizer: Any,
    engine: Engine,
    runtime: processes.Runtime,
    agreement: Agreement,
) -> list[Evaluator]:
    """The evaluators that the config asks for; none without held-out data."""
    held_out = data.evaluation
    if held_out is None or len(held_out) == 0:
        return []
    limit = config.evaluation.max_documents
    batches = partial(
        eval_batches,
        held_out,
        batch=config.evaluation.batch,
        dp_rank=engine.dp_rank,
        dp_size=engine.dp_size,
        layout=built.layout,
        pad_token_id=tokenizer.pad_token_id,
        device=runtime.device,
        max_documents=limit,
    )

    def stop_now() -> bool:
        agreement.ask()
        return agreement.stop_now()

    count = int(held_out.counts["loss"][:limit].sum())
    return [LossEvaluator(batches, count=count, prefix="eval", stop_now=stop_now)]


def finish(
    config: RunConfig,
    run_dir: Path,
    engine: Engine,
    built: Built,
    tokenizer: Any,
    outcome: Outcome,
    facts: dict[str, Any],
    trackers: Trackers,
    console: Console,
    runtime: processes.Runtime,
) -> None:
    """Export, summary, final records. All ranks must call."""
    destination = None
    if config.export.at_end:
        from trainer.export import write_export

        destination = write_export(
            engine,
            built,
            tokenizer,
            base_path=str(weights_directory(config.model)),
            destination=run_dir / "export",
            config=config.export,
            card=report.card_facts(config, facts, outcome, run_dir),
            runtime=runtime,
        )
    if runtime.is_main:
        trackers.summarise(report.tracker_summary(outcome))
        sync = trackers.sync_line
        trackers.close()
        report.write_run_record(run_dir, {**facts, "outcome": report.outcome_record(outcome)})
        write_status(run_dir, State.done, step=outcome.progress.step)
        console.say(report.end_text(run_dir, outcome, destination, sync))
    processes.barrier(runtime)
