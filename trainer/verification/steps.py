"""Takes one step of a run, as configured or by one process alone, and reads its loss and its gradients.

The gradient is read from the update: the step is one of plain SGD without clipping, so that the difference of the weights
over the rate is the gradient. That works alike for every engine, wherever it keeps its gradients.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strategies import runtime as processes
from strategies.base import Engine, ParameterSource, Precision
from strategies.errors import ConfigError
from strategies.runtime import Runtime, derive_seed
from trainer.build.parts import build_engine, build_loader
from trainer.config.run import RunConfig
from trainer.data.prepare import PreparedData
from trainer.model.loading import load_tokenizer
from trainer.model.weights import WeightSource
from trainer.objectives.reference import RecordingSettings, record_reference_logps
from trainer.planner.minimal_step import minimal_trainer
from trainer.step import Built
from trainer.verification.documents import open_documents
from trainer.verification.gradients import kinds_of_parameters
from trainer.verification.small_run import LR, SmallRun

DRAWN_STD = 0.05
"""Size of what is drawn in the place of adapter factors that begin at zero."""

MOST_HALVINGS = 14
"""Times that fp16 may halve its loss scale of 2^16 before its step counts as one without finite gradients."""


@dataclass(slots=True)
class TakenStep:
    """What one step computed. Only rank 0 has gradients and kinds."""

    loss: float
    """Mean over the step's targets, on every rank."""
    gradients: dict[str, Tensor]
    """By plain name, whole, float32 on the CPU."""
    kinds: dict[str, str]
    kernels: str
    finite: bool
    """Whether the update was applied; it is skipped if a gradient is no number."""
    expert_tokens: list[list[int]] | None = None
    """How many tokens chose each expert, by layer, all ranks together; None without experts."""


class NonzeroValues:
    """A `ParameterSource` that draws the adapter parameters which would begin at zero.

    A factor that is zero leaves the other one without a gradient, and then nothing would be compared.
    """

    def __init__(self, source: WeightSource, seed: int) -> None:
        self.source = source
        self.seed = seed

    def read_slice(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """Elements `[start, stop)` of the flattened full parameter `name`, on the CPU."""
        if not self.source.tuning.owns(name):
            return self.source.read_slice(name, shape, start, stop)
        whole = self.source.read_slice(name, shape, 0, shape.numel())
        if not whole.is_floating_point() or bool(whole.any()):
            return whole[start:stop]
        generator = torch.Generator().manual_seed(derive_seed(self.seed, name))
        return (torch.randn(shape.numel(), generator=generator) * DRAWN_STD)[start:stop]


def take_step(
    config: RunConfig, documents: Path, label_names: list[str] | None, directory: Path, runtime: Runtime
) -> TakenStep:
    """One step of `config` on the drawn documents. All ranks of `runtime` must call.

    `directory`: where a reference is recorded; another one for each step that is compared. Errors: ConfigError, and those
    of the engines.
    """
    if "deepspeed" in sys.modules:
        # ZeRO-3 leaves a linear function behind, which the next engine of this process must not meet.
        from strategies.compat.deepspeed import restore_linear

        restore_linear()
    data = open_documents(documents, label_names)

    def values_of(source: WeightSource) -> ParameterSource:
        return NonzeroValues(source, config.run.seed)

    engine, built, _ = build_engine(
        config, load_tokenizer(config.model), data, config.precision, runtime, values_of=values_of
    )
    try:
        _record_reference(config, data, engine, built, directory, runtime)
        return _measured_step(config, data, engine, built, runtime)
    finally:
        engine.close()
        del engine
        gc.collect()


def _measured_step(config: RunConfig, data: PreparedData, engine: Engine, built: Built, runtime: Runtime) -> TakenStep:
    """Take the first step of the run, and read it."""
    loader, _ = build_loader(config, data, built, engine, runtime)
    trainer = minimal_trainer(engine)
    trainer.settings = replace(trainer.settings, seed=config.run.seed, schedule=config.schedule)
    before = _weights(engine)
    with closing(loader.steps(0, 1)) as batches:
        batch = next(batches)
    record = trainer.train_step(batch)
    if config.precision is Precision.fp16:
        # A step that overflows is skipped, and halves the loss scale: so begins every run in fp16.
        for _ in range(MOST_HALVINGS):
            if not bool(record.result.skipped):
                break
            trainer.progress.step = 0
            record = trainer.train_step(batch)
    after = _weights(engine)

    local_sum = record.local_sums["loss"].double()
    expert_tokens = record.expert_tokens
    if runtime.world_size > 1:
        local_sum = processes.dist_sum(local_sum)
        if expert_tokens is not None:
            expert_tokens = processes.dist_sum(expert_tokens)
    gradients = {name: (weight - after[name]) / LR for name, weight in before.items()}
    return TakenStep(
        loss=float(local_sum) / record.counts["loss"],
        gradients=gradients,
        kinds=kinds_of_parameters(built, list(gradients)),
        kernels=describe_kernels(built),
        finite=not bool(record.result.skipped),
        expert_tokens=None if expert_tokens is None else expert_tokens.tolist(),
    )


def _weights(engine: Engine) -> dict[str, Tensor]:
    """A copy of every trained parameter in float32; empty on all ranks but 0. All ranks must call."""
    weights = {}
    for name, weight in engine.gather(trainable_only=True):
        if weight is not None:
            weights[name] = weight.float().clone()
    return weights


def _record_reference(
    config: RunConfig, data: PreparedData, engine: Engine, built: Built, directory: Path, runtime: Runtime
) -> None:
    """Record what the model says before the step, if the objective compares with it and no adapter can be switched off."""
    if not built.step_module.objective.uses_reference or built.tuning.keeps_base:
        return
    settings = RecordingSettings(
        built.collator,
        built.data_spec.ahead,
        max_batch=config.batch["micro"],
        directory=directory,
        key="drawn",
    )
    record_reference_logps({"train": data.train}, engine, settings, runtime)


def describe_kernels(built: Built) -> str:
    """What a pass of the model computes with: attention, the layout of documents, the head."""
    parts = [f"attention {built.attention}", f"{built.layout.value} rows".replace("_", "-")]
    path = getattr(built.plain, "forward_path", None)
    if path is not None:
        parts.append("loss in the head" if path.fused else "the model's own head")
    if built.scheme is not None:
        parts.append(f"base in {built.scheme}")
    missing = built.substitutions.get("model.kernels")
    if missing:
        parts.append(missing)
    return ", ".join(parts)


def alone(runtime: Runtime) -> Runtime:
    """This process as if it were the only one."""
    return replace(runtime, rank=0, world_size=1, local_rank=0, local_world_size=1, sequence_size=1)


@dataclass(frozen=True, slots=True)
class Compared:
    """The steps of one precision: by one process, and as configured."""

    precision: Precision
    single: TakenStep | None
    """None on all ranks but 0."""
    configured: TakenStep


def compare_steps(
    small: SmallRun,
    documents: Path,
    label_names: list[str] | None,
    directory: Path,
    runtime: Runtime,
    say: Callable[[str], None],
) -> list[Compared]:
    """The step in float32, then in the run's own precision if that is another. All ranks must call; `say` prints progress."""
    precisions = [Precision.fp32]
    if small.config.precision is not Precision.fp32:
        precisions.append(small.config.precision)
    compared = []
    for precision in precisions:
        single = None
        if runtime.is_main:
            say(f"one process, {precision}")
            single = _single_step(small, precision, documents, label_names, directory / f"single-{precision}", runtime)
        # The others wait here, not in the first collective of a strategy, whose own limit may be shorter.
        processes.barrier(runtime)
        say(f"as configured, {precision}")
        config = replace(small.config, precision=precision)
        configured = take_step(config, documents, label_names, directory / f"ranks-{precision}", runtime)
        compared.append(Compared(precision, single, configured))
    return compared


def _single_step(
    small: SmallRun,
    precision: Precision,
    documents: Path,
    label_names: list[str] | None,
    directory: Path,
    runtime: Runtime,
) -> TakenStep:
    """The step of one process: in one micro-batch, or for a model that is right for one document alone, one by one."""
    config = small.alone(precision)
    lone = alone(runtime)
    try:
        return take_step(config, documents, label_names, directory, lone)
    except ConfigError as error:
        if not error.problems[0].startswith("batch.micro="):
            raise
    one_by_one: dict[str, Any] = {**config.batch, "micro": 1}
    return take_step(replace(config, batch=one_by_one), documents, label_names, directory, lone)
