"""Gathers the facts of a run for its start screen, `run.json`, W&B, the model card and its end."""

from __future__ import annotations

import os
import platform
import socket
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strategies.base import Engine, Precision
from strategies.expert_share import expert_share_of_parameter
from strategies.hardware import slow_precision_warning
from strategies.mesh import replica_count
from strategies.parameters import named_parameters, num_elements_by_name
from strategies.runtime import Runtime, gather_objects
from strategies.sharding_report import sharding_record
from trainer.build.experts import expert_parallelism_lines
from trainer.build.recomputation import device_memory_gib
from trainer.checkpoints.manifest import manifest_sha256_at_step
from trainer.config.run import MATMUL_KEY, RunConfig, settled_matmul
from trainer.data.batches.loader import StepLoader
from trainer.data.prepare import PreparedData
from trainer.data.report.preview import is_prompts_alone
from trainer.model.architecture import text_model_config, width_and_num_blocks
from trainer.model.weights import WeightSource
from trainer.planner.communication_volume import expected_bytes_by_collective
from trainer.planner.predicted_vs_measured import memory_screen_lines, predicted_cost
from trainer.reporting.code_revision import code_revision
from trainer.reporting.documents.facts import ModelFacts, read_model_card_facts
from trainer.reporting.documents.questions import read_answers
from trainer.reporting.energy import energy_of_run
from trainer.reporting.jsonl import json_text
from trainer.reporting.outcome import TrainingOutcome
from trainer.reporting.reference_speed import flops_per_token, reference_tflops
from trainer.reporting.resolution import ResolvedSetting
from trainer.reporting.results import held_out_metrics_at_step
from trainer.reporting.run_record import (
    REFERENCE_TFLOPS_KEY,
    RUN_RECORD,
    Receipt,
    RunOutcome,
    RunRecord,
    Sharding,
    TuningStart,
)
from trainer.reporting.status import write_text_atomic
from trainer.rollout.loader import RolloutLoader
from trainer.session.base_files import base_commit
from trainer.session.identity import versions_of
from trainer.session.rate_text import LearningRate, learning_rate_of, rate_lines
from trainer.step import BuiltModel
from trainer.tuning.initial_adapter import adapter_sha256

RECORDED_PACKAGES = (
    *("torch", "transformers", "peft", "deepspeed", "datasets", "hydra-core", "wandb", "accelerate", "flash-attn"),
    *("flash-linear-attention", "causal-conv1d", "mamba-ssm"),
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on; a missing one is left out."""
    return {"python": platform.python_version(), **versions_of(RECORDED_PACKAGES)}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunParts:
    """The parts of a run before its first step, of which `run.json` is made."""

    config_sha256: str
    """Hash of the configuration."""
    precision: Precision
    runtime: Runtime
    data: PreparedData
    engine: Engine
    built: BuiltModel
    source: WeightSource
    """The source of the initial values."""
    loader: StepLoader | RolloutLoader
    total_steps: int
    resumed_from: Path | None


def build_run_record(config: RunConfig, checked_facts: Mapping[str, Any], run_parts: RunParts) -> RunRecord:
    """Build the record that becomes `run.json` before the first step, with a prediction of what the run will cost.

    All ranks must call.

    `checked_facts`: fields of the record that were known before the model was built, such as what the run was compared by.
    """
    record = _run_record_without_prediction(config, checked_facts, run_parts)
    built = run_parts.built
    runtime = run_parts.runtime
    prediction = predicted_cost(built, record, str(config.optim.name), device_memory_gib(runtime))
    loader = run_parts.loader
    # A unit is what a batch counts: a document, a pack of documents in one row, or a pair of answers.
    tokens_per_micro_batch = float(loader.unit_tokens.mean()) * config.batch["micro"]
    prediction.exchanged_bytes = expected_bytes_by_collective(
        built, config.strategy, run_parts.precision, runtime, loader.accumulation, tokens_per_micro_batch
    )
    record.receipt = Receipt(predicted=prediction)  # what was measured is added at the end of training
    return record


def _run_record_without_prediction(
    config: RunConfig, checked_facts: Mapping[str, Any], run_parts: RunParts
) -> RunRecord:
    """Collect the facts of a run as it is built: sizes, batch, precision, model files, data and versions. All ranks must call.

    The prediction of its cost is added by the caller.
    """
    runtime = run_parts.runtime
    precision = run_parts.precision
    built = run_parts.built
    data = run_parts.data
    loader = run_parts.loader
    resumed_from = run_parts.resumed_from
    tflops, tflops_source = reference_tflops(config.logging.reference_tflops, runtime.device)
    mean_tokens = float(loader.unit_tokens.mean())
    # The share of tokens with a loss. In an encoder-decoder model they are those that the decoder processes.
    supervised_share = float(data.train.num_supervised.sum()) / max(1, int(data.train.lengths.sum()))
    # The adapter that training goes on with (`tuning.from`); other methods than adapters have no such setting.
    first_adapter = getattr(config.tuning, "from_", None)
    tuning_from = None
    if first_adapter is not None:
        tuning_from = TuningStart(path=first_adapter, sha256=adapter_sha256(first_adapter))
    device_name = None
    if runtime.device.type == "cuda":
        device_name = torch.cuda.get_device_name(runtime.device)
    added_losses = built.step_module.added_losses
    return RunRecord(
        config_sha256=run_parts.config_sha256,
        strategy=str(config.strategy.name),
        tuning=str(config.tuning.name),
        objective=str(config.objective.name),
        precision=str(precision),
        advice=slow_precision_warning(precision, runtime.device.type),
        attention=built.attention,
        layout=str(built.layout),
        world_size=runtime.world_size,
        hosts=runtime.num_hosts,
        sequence_size=runtime.sequence_size,
        global_batch=config.batch["global"],
        micro_batch=config.batch["micro"],
        accumulation=loader.accumulation,
        total_steps=run_parts.total_steps,
        epochs=run_parts.total_steps * loader.samples_per_step / loader.order.num_units,
        learning_rate=asdict(learning_rate_of(config, run_parts.total_steps)),
        tokens_per_step=round(mean_tokens * config.batch["global"]),
        host=socket.gethostname(),
        device=str(runtime.device),
        device_name=device_name,
        resumed_from=resumed_from.name if resumed_from else None,
        base_model=config.model.path,
        base_commit=base_commit(config),
        quantisation=None if built.scheme is None else str(built.scheme),
        # A packed weight with three axes has the matrices of several experts.
        quantised_experts=sum(len(shape) == 3 for shape in built.quantised_shapes.values()),
        folded_adapters={path: adapter_sha256(path) for path in config.model.adapters},
        tuning_from=tuning_from,
        data_fingerprint=data.train.fingerprint,
        data_directory=str(data.directory),
        data_report=data.report,
        label_names=data.label_names,
        sharding=Sharding(**sharding_record(run_parts.engine, runtime)),
        initialised=run_parts.source.initialised,
        weights_read_bytes=gather_objects(run_parts.source.checkpoint.conversions.files.bytes_read, runtime),
        packed_weights=_packed_weight_facts(run_parts.source, runtime),
        weights_left_out=_unused_weight_facts(run_parts.source),
        dealt_experts=_expert_parallel_lines(config, built, precision, runtime),
        routers=added_losses.start_lines(loader.accumulation) if added_losses else [],
        substitutions=_substitutions(config, built.substitutions, precision, runtime),
        base_parameters=sum(parameter.numel() for parameter in built.base_on_meta.parameters()),
        flops_per_token=model_flops_per_token(built, mean_tokens, supervised_share),
        reference_tflops=tflops,
        reference_tflops_source=tflops_source,
        versions=versions(),
        git_revision=code_revision(),
        slurm_job_id=os.environ.get("SLURM_JOB_ID"),
        command=Path(sys.argv[0]).name,
        **checked_facts,
    )


def _expert_parallel_lines(
    config: RunConfig, built: BuiltModel, precision: Precision, runtime: Runtime
) -> list[str] | None:
    """The lines on the start screen about how experts are distributed over ranks; None if they are not (`parallel.experts=1`)."""
    if config.parallel.experts == 1:
        return None
    num_replicas = replica_count(config.strategy, runtime.world_size, runtime.num_hosts)
    ranks_per_replica = runtime.world_size // num_replicas
    return expert_parallelism_lines(built, precision, ranks_per_replica) or None


def _packed_weight_facts(source: WeightSource, runtime: Runtime) -> dict[str, Any] | None:
    """Facts, for `run.json`, of the packed copy of a quantised base, which spares later runs the packing.

    For example {"directory": "/cache/packed/ab12", "bytes": 734003200, "packed_now": [112, 0], "not_kept": ""}. `packed_now`: how
    many weights each rank has packed in this start. `not_kept`: why the copy is not kept; empty if it is. None without
    quantisation. All ranks must call.
    """
    cache = source.checkpoint.packed_cache
    if cache is None:
        return None
    packed_and_reason_by_rank = gather_objects((cache.num_quantised, cache.reason_not_cached), runtime)
    packed_now = [packed for packed, _ in packed_and_reason_by_rank]
    reasons = [reason for _, reason in packed_and_reason_by_rank if reason]
    return {
        "directory": str(cache.directory),
        "bytes": cache.total_bytes,
        "packed_now": packed_now,
        "not_kept": reasons[0] if reasons else "",
    }


def _unused_weight_facts(source: WeightSource) -> dict[str, Any] | None:
    """Facts, for `run.json`, of stored weights that the architecture has no parameter for, such as a further head's.

    `weights`: how many. `first`: the names of the first five. `kept_in_export`: how many of them an export of the whole model
    copies. None if every weight has its parameter.
    """
    conversions = source.checkpoint.conversions
    # `left_out`: names of the weights that are not loaded; `carried`: those among them that an export copies unchanged.
    unused_names = conversions.left_out()
    if not unused_names:
        return None
    copied_names = conversions.carried()
    return {"weights": len(unused_names), "first": unused_names[:5], "kept_in_export": len(copied_names)}


def _substitutions(
    config: RunConfig, model_substitutions: Mapping[str, str], precision: Precision, runtime: Runtime
) -> dict[str, str]:
    """Collect what the run uses instead of a configured value, as notes by setting: for `auto`, or where a value is not possible.

    For example {"precision": "auto -> bf16 (on cuda)"}. `model_substitutions`: those that were made while the model was built.
    """
    substitutions = {**config.substitutions, **model_substitutions}
    if config.precision is Precision.auto:
        substitutions["precision"] = f"auto -> {precision} (on {runtime.device.type})"
    # Only `auto` leaves such a note, here or in the launcher. On GPUs, `auto` means bf16 unless one of them cannot compute in it.
    if "precision" in substitutions and runtime.device.type == "cuda" and precision is not Precision.bf16:
        substitutions["precision"] = f"auto -> {precision} (not all GPUs of this run have bf16 in hardware)"
    if runtime.matmul is None:  # on GPUs; an earlier start, on CPUs, may have left the note
        substitutions.pop(MATMUL_KEY, None)
    elif runtime.matmul.library is not settled_matmul(config):
        choice = runtime.matmul
        substitutions[MATMUL_KEY] = ResolvedSetting(
            MATMUL_KEY, str(config.run.matmul), str(choice.library), choice.reason
        )
    return {setting: str(note) for setting, note in substitutions.items()}


def model_flops_per_token(built: BuiltModel, mean_length: float, answer_share: float) -> float:
    """Count the floating-point operations of the model for one token, forward and backward; speed as MFU is computed from them.

    Matrices count with the elements that a token is multiplied with; frozen ones need no gradient of their own.

    `mean_length`: tokens of a document on average; attention grows with it.
    `answer_share`: the share of all tokens that the decoder of an encoder-decoder model processes.
    """
    width, num_blocks = width_and_num_blocks(built.base_on_meta)
    matmul_elements = 0.0
    trained_matmul_elements = 0.0
    full_count_by_name = num_elements_by_name(built.step_module)
    for name, parameter in named_parameters(built.step_module):
        # A rank may hold a part of the parameter alone, or nothing of it.
        shape = _full_shape(built, name, parameter)
        is_lookup = built.tuning.base_name(name) in built.vocabulary_parameters and not _multiplies_as_head(built, name)
        if len(shape) < 2 or is_lookup:  # norms, biases and embedding look-ups multiply nothing
            continue
        elements = _elements_per_token(built, name, shape, float(full_count_by_name[name]), answer_share)
        matmul_elements += elements
        if parameter.requires_grad:
            trained_matmul_elements += elements
    return flops_per_token(
        matmul_parameters=round(matmul_elements),
        trainable_matmul_parameters=round(trained_matmul_elements),
        layers=num_blocks,
        width=width,
        mean_length=mean_length,
    )


def _full_shape(built: BuiltModel, name: str, parameter: Tensor) -> tuple[int, ...]:
    """The shape of a parameter as the model defines it, whatever of it this rank holds: sharded, dealt to ranks or packed."""
    base_name = built.tuning.base_name(name)
    if base_name in built.quantised_shapes:
        return built.quantised_shapes[base_name]
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 keeps the full shape beside an empty parameter
    expert_share = expert_share_of_parameter(built.step_module, name)
    if expert_share is not None:  # this rank has some of the experts only: count all of them
        shape = expert_share.full_shape(shape)
    return tuple(shape)


def _elements_per_token(
    built: BuiltModel, name: str, shape: tuple[int, ...], num_elements: float, answer_share: float
) -> float:
    """How many of a matrix's elements one token is multiplied with, on average over all tokens.

    - Of experts, `[experts, ...]`: those of the experts that the router chooses for a token.
    - Of an encoder-decoder model: each side processes its own tokens only, the decoder `answer_share` of all.
    - Of any other: all of them.

    `shape`: before sharding. `num_elements`: the elements of the whole parameter.
    """
    text_config = text_model_config(built.config)
    # transformers' models name it differently; None without experts.
    experts_per_token = getattr(text_config, "num_experts_per_tok", None) or getattr(text_config, "moe_topk", None)
    if len(shape) == 3 and isinstance(experts_per_token, int):
        num_experts = shape[0]
        num_elements *= min(experts_per_token, num_experts) / num_experts
    if built.encoder_decoder is not None:
        is_encoder = ".encoder." in f".{name}"
        num_elements *= 1 - answer_share if is_encoder else answer_share
    return num_elements


def _multiplies_as_head(built: BuiltModel, name: str) -> bool:
    """Whether a vocabulary parameter multiplies as the head's matrix; a tied embedding does."""
    return bool(getattr(built.config, "tie_word_embeddings", False)) or "head" in name or "embed_out" in name


def repetition_warning(global_batch: int, epochs: float, steps: int) -> list[str]:
    """Warn on the start screen if a step takes more documents than the data has, since copies within a step add nothing; else [].

    `epochs`: of the whole run of `steps` steps.
    """
    epochs_per_step = epochs / max(1, steps)
    if epochs_per_step <= 1:
        return []
    num_documents = global_batch / epochs_per_step
    return [
        f"each document is used about {epochs_per_step:.1f} times in one step: batch.global={global_batch} is more than the "
        f"{num_documents:,.0f} documents; lower batch.global"
    ]


def start_screen_text(record: RunRecord) -> str:
    """Write the lines that a run shows before its first step: sizes, batch, memory, and what was resolved and accepted."""
    sharding = record.sharding
    least_held = min(sharding.held_per_rank)
    most_held = max(sharding.held_per_rank)
    held = f"{least_held:,}"
    if most_held != least_held:
        held += f" to {most_held:,}"
    trainable_share = sharding.trainable_parameters / max(1, sharding.parameters)
    ranks_text = record.dp_ranks_text
    if record.world_size != 1:
        ranks_text += f" (over {sharding.exchange})"
    # The length of a generated answer is not known: each prompt counts with the longest that is allowed.
    is_upper_bound = is_prompts_alone(record.data_report.get("train", {}))
    approximation = "at most" if is_upper_bound else "about"
    lines = [
        f"parameters: {sharding.parameters:,}, trainable {sharding.trainable_parameters:,} ({trainable_share:.2%}); held per "
        f"rank {held}",
        f"batch: {record.global_batch} = {record.micro_batch} micro x {record.accumulation} accumulation x "
        f"{ranks_text}; {approximation} {record.tokens_per_step:,} tokens a step, {record.total_steps} steps, "
        f"{record.epochs:,.2f} epochs",
        f"precision {record.precision}, attention {record.attention}, layout {record.layout}",
    ]
    lines += rate_lines(LearningRate(**record.learning_rate), record.total_steps)
    lines += repetition_warning(record.global_batch, record.epochs, record.total_steps)
    lines += memory_screen_lines(record)
    if record.advice:
        lines.append(f"advice: {record.advice}")
    if record.quantisation:
        experts_too = ", each expert" if record.quantised_experts else ""
        lines.append(f"base stored in {record.quantisation}: frozen linear layers but the head{experts_too}")
    lines += record.dealt_experts or ()
    lines += record.routers
    if record.packed_weights:
        lines.append(_packed_weights_line(record.packed_weights))
    tflops = record.mfu_tflops
    if tflops:
        lines.append(f"MFU against {tflops:.2f} TFLOP/s a device ({record.reference_tflops_source})")
    elif record.reference_tflops:
        lines.append(f"no MFU: the peak of a CPU is not known: set {REFERENCE_TFLOPS_KEY}")
    else:
        lines.append(f"no MFU: {record.reference_tflops_source}")
    unused = record.weights_left_out
    if unused:
        lines.append(
            f"not trained, since the architecture has no place for them: {unused['weights']} stored weights "
            f"({', '.join(unused['first'][:3])} ...), of which a whole export keeps {unused['kept_in_export']}"
        )
    if record.initialised:
        lines.append(f"newly initialised (not in the checkpoint): {', '.join(record.initialised)}")
    lines += [f"resolved: {key}: {sentence}" for key, sentence in record.substitutions.items()]
    if record.resumed_from:
        lines.append(f"resumed from {record.resumed_from}")
    lines += [f"accepted: {line}" for line in record.accepted or ()]
    return "\n".join(lines)


def _packed_weights_line(packed: Mapping[str, Any]) -> str:
    """The line on the start screen about the packed copy of a quantised base. `packed`: from `_packed_weight_facts`."""
    if packed["not_kept"]:
        return f"packed weights are not kept for later runs: {packed['not_kept']}"
    size = f"{packed['bytes'] / 2**30:.2f} GiB"
    return (
        f"packed weights are kept for later runs: {size} in {packed['directory']} ({sum(packed['packed_now'])} weights "
        "packed now); delete it when you like, or set model.keep_packed=false"
    )


def write_run_record(run_dir: Path, record: RunRecord) -> None:
    """Replace `run.json`. Errors: StorageError."""
    write_text_atomic(run_dir / RUN_RECORD, json_text(record.as_json(), indent=1, default=str))


_RESUME_ONLY_PROGRESS_KEYS = (
    "recent",
    "evaluations",
    "interval_loss",
    "interval_steps",
    "first_loss",
    "recent_losses",
    "level_rows",
)
"""Keys of the progress that only a resumed run needs, and `run.json` leaves out."""


def outcome_record(outcome: TrainingOutcome) -> RunOutcome:
    """Collect how training ended, under the names that `run.json` has for it.

    `before` and `after` are held-out metrics before and after training, `answers` those to chat questions.
    """
    progress = outcome.progress.as_json()
    for key in _RESUME_ONLY_PROGRESS_KEYS:
        del progress[key]
    return RunOutcome(
        progress=progress,
        before=outcome.metrics_before_training,
        after=outcome.last_metrics,
        last_row=outcome.last_row,
        speed=outcome.speed,
        experts=outcome.experts,
        slow_ranks=outcome.slow_ranks,
        stopped_early=outcome.stopped_early,
        answers=outcome.chat_answers,
        closing=outcome.overfitting_sentence,
        watch=outcome.watched_metric,
        greater_is_better=outcome.greater_is_better,
    )


def model_facts(
    config: RunConfig, record: RunRecord, outcome: TrainingOutcome, step: int, tokens: int, run_dir: Path
) -> ModelFacts:
    """Collect the facts from which the documents of the exported model, such as its model card, are written.

    `step`: of the checkpoint whose weights are exported; `tokens`: what it was trained on.
    `record`: stands for `run.json`, which gets the outcome later than these documents are written.

    Everything else is read from the run directory.
    """
    ended_record = replace(
        record, outcome=outcome_record(outcome), energy=energy_of_run(run_dir), challenges=outcome.findings_by_detector
    )
    answers, _ = read_answers(config.export.answers)  # its problems were reported before the run
    facts = read_model_card_facts(run_dir, ended_record, answers)
    facts.step = step
    facts.tokens = tokens
    facts.metrics_at_step = held_out_metrics_at_step(run_dir, step)
    # The SHA-256 of the checkpoint's manifest: it identifies the weights. Looked for in the second directory of checkpoints too.
    facts.artefact = manifest_sha256_at_step(run_dir, facts.step, config.checkpoint.fallback_dir)
    return facts
