"""A step on documents that stand out: what guards do about it, under every strategy. Part of `job.py`."""

import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from strategies import runtime as processes
from strategies.base import Precision, StepResult
from strategies.errors import ReplicasDiffer
from strategies.parameters import named_parameters
from tests.helpers.building import TUNINGS, model_dir, run_config
from tests.helpers.stores import write
from tests.parity.base import Curve, Job, lone_steps
from tests.parity.features import HostReads
from trainer.checkpoints.config import CheckpointConfig
from trainer.checkpoints.manager import Checkpoints
from trainer.config.parallel import ParallelConfig
from trainer.config.run import RunConfig
from trainer.data.batches.loader import StepBatch
from trainer.data.config import DataConfig
from trainer.data.prepare import PreparedData
from trainer.data.store.sequences import Sample, TokenDataset
from trainer.loop import Trainer
from trainer.monitors.guard_config import Action, GuardsConfig
from trainer.monitors.replicas import replicated_parameters
from trainer.objectives.sft import SftDataSpec
from trainer.reporting.metric_names import FIRST_NAMES_EDITION
from trainer.reporting.metrics import StepRecord
from trainer.reporting.tracking import Trackers

STEPS, BATCH, ODD = 12, 4, 8
FLIPPED, HIT = 7, "layers.1.post_attention_layernorm.weight"
"""The documents of step ODD say one word again and again, so that their gradients add up to ten times the usual norm."""


def config_of(job: Job, strategy: str, experts: int = 1, **changes: object) -> RunConfig:
    """A run of twelve steps. `experts`: ranks over which experts are distributed. Above 1 the model is a mixture."""
    mixture = experts > 1
    model = job.first_here(
        lambda: model_dir(job.root / "guarded", "qwen3_moe", num_experts=8) if mixture else model_dir(job.root)
    )
    config = run_config(model, strategy, "full", micro=2, steps=STEPS, parallel=ParallelConfig(experts=experts))
    return replace(config, batch={"global": BATCH, "micro": 2}, data=DataConfig(shuffle=False), **changes)


def documents(job: Job, *, odd: bool) -> PreparedData:
    """The documents of all steps in their order; without those of the odd step where not `odd`, and then as many more."""
    directory = job.root / f"guarded-{odd}"

    def made() -> PreparedData:
        if not (directory / "manifest.json").exists():
            generator, rows = np.random.default_rng(1), []
            for step in range(1, STEPS + 2):
                for _ in range(BATCH):
                    ids = generator.integers(3, 300, 40).astype(np.int32)
                    if step == ODD:
                        ids[:] = 17
                    if step != ODD or odd:
                        rows.append(Sample(ids, np.arange(40) > 0))
            write(directory, rows, SftDataSpec().counts, {"fingerprint": f"guarded-{odd}"})
        opened = TokenDataset.open(directory)
        return PreparedData(train=opened, evaluation=opened, directory=directory, report={}, label_names=None)

    return job.first_here(made)


def skipped(job: Job, strategy: str, experts: int = 1) -> dict:
    """Rows of a run that skips, host reads of its updates, and the curve of a lone process that never makes the odd update."""
    return _skipped(job, config_of(job, strategy, experts), documents(job, odd=True))


def not_finite(job: Job, strategy: str, experts: int) -> dict:
    """The same of a run in which a gradient of one rank's own experts is not a number in the odd step."""
    config, data = config_of(job, strategy, experts), documents(job, odd=True)
    trainer = job.trainer(config, data)
    real = trainer.engine.step

    def step(factor: float, update_filter: object = None) -> StepResult:
        if trainer.progress.step + 1 == ODD and job.runtime.rank == 1:
            parameters = dict(named_parameters(trainer.engine.step_module))
            gradient = next(value.grad for name, value in parameters.items() if ".experts." in name)
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            local.view(-1)[0] = float("nan")
        return real(factor, update_filter)  # type: ignore[arg-type]

    trainer.engine.step = step  # type: ignore[method-assign, assignment]
    for batch in trainer.loader.steps(0, STEPS):
        trainer.meter.add(trainer.train_step(batch))
    rows = trainer.meter.flush()
    key = ("guards", "skipped", experts > 1)
    return {
        "found": [[row["loss"], row["grad_norm"]] for row in rows],
        "skipped": [row["step"] for row in rows if row.get("skipped")],
        "expected": job.oracle(key, lambda: _never_updated(job, config, data), elsewhere=[]),
    }


def skipped_on_device(job: Job) -> dict:
    """The same of ZeRO-2 in bf16, which clips and skips without the host, beside DeepSpeed's own way."""
    config, data = config_of(job, "zero2", precision=Precision.bf16), documents(job, odd=True)
    with mock.patch("strategies.zero.steps_on_device", lambda *_: False):
        theirs = _skipped(job, config, data)
    return _skipped(job, config, data) | {"expected": theirs["found"]}


def _skipped(job: Job, config: RunConfig, data: PreparedData) -> dict:
    trainer = job.trainer(replace(config, guards=GuardsConfig(grad_norm=Action.skip, window=10)), data)
    reads = _count_reads(trainer)
    for batch in trainer.loader.steps(0, STEPS):
        trainer.meter.add(trainer.train_step(batch))
    rows = trainer.meter.flush()
    trainer.guards.mark_outliers(rows)
    key = ("guards", "skipped", config.parallel.experts > 1)
    return {
        "found": [[row["loss"], row["grad_norm"]] for row in rows],
        "skipped": [row["step"] for row in rows if row.get("skipped")],
        "outliers": [row["step"] for row in rows if "outlier/grad_norm" in row],
        "window": len(trainer.guards.recent_steps()),
        "updates": int(trainer.engine._num_updates),  # type: ignore[attr-defined]
        "reads": reads,
        "expected": job.oracle(key, lambda: _never_updated(job, config, data), elsewhere=[]),
    }


class Rows:
    """Keeps the last row of each step."""

    def __init__(self) -> None:
        self.rows: dict[int, dict] = {}

    def log(self, metrics: dict, *, step: int) -> None:
        self.rows[step] = metrics

    def close(self, ended: object) -> None:
        pass


def rolled_back(job: Job, strategy: str, experts: int = 1) -> dict:
    """The rows of a run that goes back for the odd step, and the curve of a lone process on data that never had its documents."""
    config = config_of(job, strategy, experts)
    trainer = job.trainer(
        replace(config, guards=GuardsConfig(grad_norm=Action.rollback, window=10)), documents(job, odd=True)
    )
    places = [Path(processes.broadcast_object(tempfile.mkdtemp(dir=job.root), job.runtime)) / "checkpoints"]
    trainer.checkpoints = Checkpoints(places, CheckpointConfig(every_steps=3), job.runtime)
    rows = Rows()
    trainer.metrics = Trackers(trackers=[rows], metric_names=FIRST_NAMES_EDITION)
    progress = trainer.fit().progress

    never_had = documents(job, odd=False)

    def never_seen() -> Curve:
        lone = job.lone_trainer(replace(config, parallel=ParallelConfig()), never_had)
        lone.loader.share = replace(lone.loader.share, global_batch=BATCH, micro_batch=BATCH)
        return lone_steps(lone, STEPS)

    return {
        "found": [[row["loss"], row["grad_norm"]] for _, row in sorted(rows.rows.items())],
        "progress": [progress.step, progress.rollbacks, progress.skipped_samples, progress.samples],
        "told": processes.gather_objects([progress.rollbacks, progress.skipped_samples], job.runtime),
        "expected": job.oracle(("guards", "never seen", experts > 1), never_seen, elsewhere=[]),
    }


def replicas(job: Job, strategy: str, tuning: str, flips: bool) -> dict:
    """How a run ends in which one bit of a parameter flips on rank 1 while step FLIPPED is taken, and its last checkpoint."""
    config = replace(config_of(job, strategy), tuning=TUNINGS[tuning], guards=GuardsConfig(replicas_every_steps=2))
    config = replace(config, logging=replace(config.logging, every_steps=2))
    trainer = job.trainer(config, documents(job, odd=False))
    places = [Path(processes.broadcast_object(tempfile.mkdtemp(dir=job.root), job.runtime)) / "checkpoints"]
    trainer.checkpoints = Checkpoints(places, CheckpointConfig(every_steps=3), job.runtime)
    real = trainer.train_step

    def step(batch: StepBatch) -> StepRecord:
        record = real(batch)
        if flips and record.step == FLIPPED and job.runtime.rank == 1:
            parameters = dict(named_parameters(trainer.engine.step_module))
            parameter = next(value for name, value in parameters.items() if name.endswith(HIT)).detach()
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.view(torch.int32).view(-1)[7] ^= 1
        return record

    trainer.train_step = step  # type: ignore[method-assign]
    try:
        trainer.fit()
        said = ""
    except ReplicasDiffer as error:
        said = str(error)
    held = len(list(replicated_parameters(trainer.engine)))
    names = [path.name for path in places[0].iterdir()] if job.runtime.is_main else []
    told = processes.gather_objects(said, job.runtime)
    return {"said": told, "held": held, "checkpoints": sorted(names), "step": trainer.progress.step}


def _count_reads(trainer: Trainer) -> list[int]:
    reads: list[int] = []
    real = trainer.engine.step

    def counted(factor: float, update_filter: object) -> StepResult:
        assert update_filter is not None
        with HostReads() as mode:
            result = real(factor, update_filter)  # type: ignore[arg-type]
        reads.append(mode.number)
        return result

    trainer.engine.step = counted  # type: ignore[method-assign, assignment]
    return reads


def _never_updated(job: Job, config: RunConfig, data: PreparedData) -> Curve:
    """The lone process's curve; at the odd step its gradients are dropped, by nobody's judgement."""
    trainer = job.lone_trainer(replace(config, parallel=ParallelConfig()), data)
    trainer.loader.share = replace(trainer.loader.share, global_batch=BATCH, micro_batch=BATCH)
    real = trainer.engine.step

    def step(factor: float, update_filter: object = None) -> StepResult:
        if trainer.progress.step + 1 == ODD:
            for _, parameter in trainer.engine.trainable:  # type: ignore[attr-defined]
                parameter.grad.fill_(float("nan"))
        return real(factor)

    trainer.engine.step = step  # type: ignore[method-assign, assignment]
    return lone_steps(trainer, STEPS)
