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
from strategies.runtime import Runtime, derived_seed
from trainer.build.parts import build_engine, build_loader
from trainer.config.run import RunConfig
from trainer.data.batches.loader import StepBatch
from trainer.data.prepare import PreparedData
from trainer.loop import Trainer
from trainer.model.loading import load_tokenizer
from trainer.model.weights import WeightSource
from trainer.objectives.reference import RecordingSettings, record_reference_logps
from trainer.planner.minimal_step import minimal_trainer
from trainer.reporting.metrics import StepRecord
from trainer.step import BuiltModel
from trainer.verification.documents import open_documents
from trainer.verification.gradients import kind_by_parameter
from trainer.verification.small_run import GRADIENT_READING_LR, SmallRun

DRAWN_STD = 0.05
"""Standard deviation of the random values of adapter factors that would begin at zero."""

MAX_LOSS_SCALE_HALVINGS = 14
"""Times that fp16 may halve its loss scale of 2^16 before its step counts as one without finite gradients."""


@dataclass(slots=True)
class TakenStep:
    """The results of one training step, to be compared with another run's first step. Only rank 0 has gradients and kinds."""

    loss: float
    """Mean over the step's targets, on every rank."""
    gradients: dict[str, Tensor]
    """Full gradients by plain name, float32 on the CPU."""
    kinds: dict[str, str]
    """The kind of each parameter, by plain name."""
    kernels: str
    """What the model computed with, in words."""
    finite: bool
    """Whether the update was applied; it is skipped if a gradient is NaN or infinite."""
    expert_tokens: list[list[int]] | None = None
    """How many tokens chose each expert, by layer, all ranks together; None without experts."""


@dataclass(frozen=True, slots=True)
class NonzeroValues:
    """A `ParameterSource` with random values for adapter parameters that would begin at zero.

    If one factor of an adapter is zero, the other one gets no gradient that could be compared.
    """

    source: WeightSource
    seed: int

    def read_slice(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """Elements `[start, stop)` of the flattened parameter `name`, on the CPU: what an engine starts this parameter with.

        The source's values, but for an adapter parameter that is zero in all elements: it is drawn at random, the same on all
        ranks.
        """
        if not self.source.tuning.is_added_parameter(name):
            return self.source.read_slice(name, shape, start, stop)
        # The whole parameter decides whether it is zero: a rank's slice may be zero by chance.
        full = self.source.read_slice(name, shape, 0, shape.numel())
        is_zero = full.is_floating_point() and not bool(full.any())
        if not is_zero:
            return full[start:stop]
        generator = torch.Generator().manual_seed(derived_seed(self.seed, name))
        return (torch.randn(shape.numel(), generator=generator) * DRAWN_STD)[start:stop]


def build_and_take_step(
    config: RunConfig, documents_dir: Path, label_names: list[str] | None, scratch_dir: Path, runtime: Runtime
) -> TakenStep:
    """Build the engine of `config`, and take one step on the random documents. All ranks of `runtime` must call.

    A verification compares two such steps of one model: one by a single process, and one by all ranks as the user configured
    it. But for rounding they must have the same loss and gradients.

    `documents_dir`: directory of the random documents. `label_names`: of a classifier's labels; None for other objectives.
    `scratch_dir`: for recorded log-probabilities of the reference model; another one for each step. Raises ConfigError, and what
    the engines raise.
    """
    if "deepspeed" in sys.modules:
        # ZeRO-3 replaces torch's linear function for the whole process; undo that for the next engine.
        from strategies.compat.deepspeed import restore_torch_linear

        restore_torch_linear()
    data = open_documents(documents_dir, label_names)

    def parameter_source_of(source: WeightSource) -> ParameterSource:
        return NonzeroValues(source, config.run.seed)

    # The third value would read weights later, say for an export.
    engine, built, _weight_source = build_engine(
        config, load_tokenizer(config.model), data, config.precision, runtime, values_of=parameter_source_of
    )
    try:
        _record_reference_logps(config, data, engine, built, scratch_dir, runtime)
        return _measured_step(config, data, engine, built, runtime)
    finally:
        engine.close()
        del engine
        gc.collect()


def _measured_step(
    config: RunConfig, data: PreparedData, engine: Engine, built: BuiltModel, runtime: Runtime
) -> TakenStep:
    """Take the first step of the run, and compute its gradients from the change of the weights. All ranks must call.

    The optimizer of `config` is SGD without momentum at the rate `GRADIENT_READING_LR`, so gradient = (weight before - weight
    after) / rate. This works for every engine, wherever it keeps its gradients.
    """
    loader, _ = build_loader(config, data, built, runtime)
    trainer = minimal_trainer(engine)
    trainer.settings = replace(trainer.settings, seed=config.run.seed, schedule=config.schedule)
    weights_before = _trained_weights(engine)
    with closing(loader.steps(0, 1)) as batches:
        batch = next(batches)
    record = _take_first_step(trainer, batch, config.precision)
    weights_after = _trained_weights(engine)
    gradients = {}
    for name, weight_before in weights_before.items():
        gradients[name] = (weight_before - weights_after[name]) / GRADIENT_READING_LR

    # Each rank has the sums of its own rows: the loss over their targets, and the tokens of each expert.
    local_sum = record.local_sums["loss"].double()
    expert_tokens = record.expert_tokens
    if runtime.world_size > 1:
        local_sum = processes.sum_over_ranks(local_sum)
        if expert_tokens is not None:
            expert_tokens = processes.sum_over_ranks(expert_tokens)
    return TakenStep(
        loss=float(local_sum) / record.counts["loss"],
        gradients=gradients,
        kinds=kind_by_parameter(built, list(gradients)),
        kernels=kernels_description(built),
        finite=not bool(record.result.skipped),
        expert_tokens=None if expert_tokens is None else expert_tokens.tolist(),
    )


def _take_first_step(trainer: Trainer, batch: StepBatch, precision: Precision) -> StepRecord:
    """Take the first step of a run; in fp16, repeat it until no gradient overflows, at most `MAX_LOSS_SCALE_HALVINGS` times.

    Every run in fp16 begins with steps that overflow: they are skipped, and halve the loss scale. All ranks must call.
    """
    record = trainer.train_step(batch)
    if precision is Precision.fp16:
        for _ in range(MAX_LOSS_SCALE_HALVINGS):
            if not bool(record.result.skipped):
                break
            # As step 0 again, with the same learning rate and random numbers.
            trainer.progress.step = 0
            record = trainer.train_step(batch)
    return record


def _trained_weights(engine: Engine) -> dict[str, Tensor]:
    """A copy of every trained parameter in float32; empty on all ranks but 0. All ranks must call."""
    weights = {}
    for name, weight in engine.gather_full_parameters(trainable_only=True):
        if weight is not None:
            weights[name] = weight.float().clone()
    return weights


def _record_reference_logps(
    config: RunConfig, data: PreparedData, engine: Engine, built: BuiltModel, scratch_dir: Path, runtime: Runtime
) -> None:
    """Record the documents' log-probabilities before the step, for objectives such as DPO that compare with them.

    Not needed with an adapter that can be switched off: then the step computes them itself. All ranks must call. Writes into
    `scratch_dir`.
    """
    if not built.step_module.objective.uses_reference or built.tuning.keeps_base:
        return
    settings = RecordingSettings(
        built.collator,
        look_ahead_of=built.data_spec.look_ahead_sample,  # kto also compares with an answer to another prompt
        max_batch=config.batch["micro"],
        directory=scratch_dir,
        key="drawn",  # the documents are the same in each verification, and the directory is new
    )
    record_reference_logps({"train": data.train}, engine, settings, runtime)


def kernels_description(built: BuiltModel) -> str:
    """Say in words what a forward pass computes with: attention, layout of documents, head, quantisation.

    It is shown beside the differences. Such as `attention sdpa, padded rows, loss in the head, base in nf4`.
    """
    parts = [f"attention {built.attention}", f"{built.layout.value} rows".replace("_", "-")]
    # Whether the head itself makes the loss; only causal models have this attribute.
    path = getattr(built.base_on_meta, "forward_path", None)
    if path is not None:
        parts.append("loss in the head" if path.fused else "the model's own head")
    # The scheme says in which few bits the base model is stored; None if it is not quantised.
    if built.scheme is not None:
        parts.append(f"base in {built.scheme}")
    kernel_note = built.substitutions.get("model.kernels")  # which kernels were asked for and could not be had
    if kernel_note:
        parts.append(kernel_note)
    return ", ".join(parts)


def single_process_runtime(runtime: Runtime) -> Runtime:
    """The runtime of this process as if it were the only rank."""
    return replace(runtime, rank=0, world_size=1, local_rank=0, local_world_size=1, sequence_size=1)


@dataclass(frozen=True, slots=True)
class ComparedSteps:
    """Two steps in one precision: by one process, and as configured on all ranks."""

    precision: Precision
    single_process_step: TakenStep | None
    """None on all ranks but 0."""
    configured_step: TakenStep


def compare_steps(
    small_run: SmallRun,
    documents_dir: Path,
    label_names: list[str] | None,
    scratch_dir: Path,
    runtime: Runtime,
    report_progress: Callable[[str], None],
) -> list[ComparedSteps]:
    """Take the pairs of steps that a verification compares: one by a single process, one as configured. All ranks must call.

    There is a pair in float32, and one in the run's own precision if that is another.

    `documents_dir`: directory of the random documents. `label_names`: of a classifier's labels; None for other objectives.
    `scratch_dir`: each step gets a directory below it for what it records. `report_progress`: gets texts such as "one process,
    fp32".
    """
    precisions = [Precision.fp32]
    if small_run.config.precision is not Precision.fp32:
        precisions.append(small_run.config.precision)
    compared = []
    for precision in precisions:
        single_process_step = None
        if runtime.is_main:
            report_progress(f"one process, {precision}")
            single_process_step = _take_single_process_step(
                small_run, precision, documents_dir, label_names, scratch_dir / f"single-{precision}", runtime
            )
        # The other ranks wait here: the timeout of a strategy's first collective may be shorter.
        processes.barrier(runtime)
        report_progress(f"as configured, {precision}")
        config = replace(small_run.config, precision=precision)
        configured_step = build_and_take_step(
            config, documents_dir, label_names, scratch_dir / f"ranks-{precision}", runtime
        )
        compared.append(ComparedSteps(precision, single_process_step, configured_step))
    return compared


def _take_single_process_step(
    small_run: SmallRun,
    precision: Precision,
    documents_dir: Path,
    label_names: list[str] | None,
    scratch_dir: Path,
    runtime: Runtime,
) -> TakenStep:
    """Take the step that the configured one is compared with: by one process, with all documents in one micro-batch.

    Some models compute correctly only with one document in a batch, and say so in a ConfigError. Then each document is a
    micro-batch. Only rank 0 calls.
    """
    config = small_run.single_process_config(precision)
    single_runtime = single_process_runtime(runtime)
    try:
        return build_and_take_step(config, documents_dir, label_names, scratch_dir, single_runtime)
    except ConfigError as error:
        needs_single_documents = error.problems[0].startswith("batch.micro=")  # such as: batch.micro=4: ... use 1
        if not needs_single_documents:
            raise
    one_by_one: dict[str, Any] = {**config.batch, "micro": 1}
    return build_and_take_step(
        replace(config, batch=one_by_one), documents_dir, label_names, scratch_dir, single_runtime
    )
