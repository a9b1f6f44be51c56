"""Gathers the facts of a run for its start screen, `run.json`, W&B, the model card and its end."""

from __future__ import annotations

import os
import platform
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from strategies.base import Engine, Precision
from strategies.hardware import advice
from strategies.parameters import element_counts, named_parameters
from strategies.runtime import Runtime, gather_objects
from strategies.sharding_report import sharding_record
from trainer.build.recomputation import device_gib
from trainer.checkpoints.manifest import artefact_of
from trainer.config.run import MATMUL, RunConfig, kept_matmul
from trainer.data.batches.loader import StepLoader
from trainer.data.prepare import Prepared
from trainer.model.architecture import text_settings, width_and_blocks
from trainer.model.weights import WeightSource
from trainer.monitors.stragglers import Slow
from trainer.planner.communication_volume import expected_bytes
from trainer.planner.predicted_vs_measured import memory_text, predicted
from trainer.reporting.code_revision import revision
from trainer.reporting.documents.facts import ModelFacts, gather
from trainer.reporting.documents.questions import read_answers
from trainer.reporting.energy import taken
from trainer.reporting.findings import SHOWN_REMEDIES, findings_in
from trainer.reporting.jsonl import json_text
from trainer.reporting.metrics import flops_per_token, reference_tflops
from trainer.reporting.numbers import readable
from trainer.reporting.outcome import Outcome
from trainer.reporting.resolution import Resolution
from trainer.reporting.run_record import RUN_RECORD, Receipt, RunOutcome, RunRecord, Sharding, TuningStart
from trainer.reporting.status import write_text_atomic
from trainer.session.base_files import base_commit
from trainer.session.identity import versions_of
from trainer.step import Built
from trainer.tuning.initial_adapter import adapter_hash

PACKAGES = (
    *("torch", "transformers", "peft", "deepspeed", "datasets", "hydra-core", "wandb", "accelerate", "flash-attn"),
    *("flash-linear-attention", "causal-conv1d", "mamba-ssm"),
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on; a missing one is left out."""
    return {"python": platform.python_version(), **versions_of(PACKAGES)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """What a run is made of when it takes its first step."""

    sha256: str
    """Of the configuration."""
    precision: Precision
    runtime: Runtime
    data: Prepared
    engine: Engine
    built: Built
    source: WeightSource
    """Where the initial values came from."""
    loader: StepLoader
    total_steps: int
    resumed_from: Path | None


def run_facts(config: RunConfig, checked: Mapping[str, Any], started: Started) -> RunRecord:
    """Everything `run.json` records before the first step. All ranks must call.

    `checked` has fields of the record that were settled before the model was built.
    """
    record = _record(config, checked, started)
    prediction = predicted(started.built, record, str(config.optim.name), device_gib(started.runtime))
    parts = started.built, config.strategy, started.precision, started.runtime
    prediction.exchanged_bytes = expected_bytes(*parts, started.loader.accumulation)
    record.receipt = Receipt(predicted=prediction)
    return record


def _record(config: RunConfig, checked: Mapping[str, Any], started: Started) -> RunRecord:
    runtime, precision, built, data = started.runtime, started.precision, started.built, started.data
    loader, resumed_from = started.loader, started.resumed_from
    tflops, tflops_source = reference_tflops(config.logging.reference_tflops, runtime.device)
    mean_tokens = float(loader.unit_tokens.mean())
    supervised_share = float(data.train.num_supervised.sum()) / max(1, int(data.train.lengths.sum()))
    start = getattr(config.tuning, "from_", None)
    routed = built.step_module.routed
    return RunRecord(
        config_sha256=started.sha256,
        strategy=str(config.strategy.name),
        tuning=str(config.tuning.name),
        objective=str(config.objective.name),
        precision=str(precision),
        advice=advice(precision, runtime.device.type),
        attention=built.attention,
        layout=str(built.layout),
        world_size=runtime.world_size,
        global_batch=config.batch["global"],
        micro_batch=config.batch["micro"],
        accumulation=loader.accumulation,
        total_steps=started.total_steps,
        epochs=started.total_steps * config.batch["global"] / loader.order.num_units,
        tokens_per_step=round(mean_tokens * config.batch["global"]),
        host=socket.gethostname(),
        device=str(runtime.device),
        device_name=torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else None,
        resumed_from=resumed_from.name if resumed_from else None,
        base_model=config.model.path,
        base_commit=base_commit(config),
        quantisation=None if built.scheme is None else str(built.scheme),
        quantised_experts=sum(len(shape) == 3 for shape in built.quantised.values()),
        folded_adapters={path: adapter_hash(path) for path in config.model.adapters},
        tuning_from=None if start is None else TuningStart(path=start, sha256=adapter_hash(start)),
        data_fingerprint=data.train.fingerprint,
        data_directory=str(data.directory),
        data_report=data.report,
        label_names=data.label_names,
        sharding=Sharding(**sharding_record(started.engine, runtime)),
        initialised=started.source.initialised,
        weights_read_bytes=gather_objects(started.source.checkpoint.conversions.files.bytes_read, runtime),
        packed_weights=_packed(started.source, runtime),
        weights_left_out=_left_out(started.source),
        routers=routed.said(loader.accumulation) if routed else [],
        substitutions=_substitutions(config, built.substitutions, precision, runtime),
        base_parameters=sum(parameter.numel() for parameter in built.plain.parameters()),
        flops_per_token=_flops(built, mean_tokens, supervised_share),
        reference_tflops=tflops,
        reference_tflops_source=tflops_source,
        versions=versions(),
        git_revision=revision(),
        slurm_job_id=os.environ.get("SLURM_JOB_ID"),
        command=Path(sys.argv[0]).name,
        **checked,
    )


def _packed(source: WeightSource, runtime: Runtime) -> dict[str, Any] | None:
    """Where a quantised base is kept packed, its bytes, and how many weights each rank has packed just now; or why not."""
    kept = source.checkpoint.kept
    if kept is None:
        return None
    ranks = gather_objects((kept.packed, kept.reason), runtime)
    reason = next((reason for _, reason in ranks if reason), "")
    now = [packed for packed, _ in ranks]
    return {"directory": str(kept.directory), "bytes": kept.total, "packed_now": now, "not_kept": reason}


def _left_out(source: WeightSource) -> dict[str, Any] | None:
    """Stored weights that do not take part in training: how many, the first of them, and how many a whole export keeps."""
    conversions = source.checkpoint.conversions
    left = conversions.left_out()
    return {"weights": len(left), "first": left[:5], "kept_in_export": len(conversions.carried())} if left else None


def _substitutions(
    config: RunConfig, of_model: Mapping[str, str], precision: Precision, runtime: Runtime
) -> dict[str, str]:
    """What stands in for the settings asked, by setting: their `auto` choices, and what was refused."""
    substitutions = {**config.substitutions, **of_model}
    if config.precision is Precision.auto:
        substitutions["precision"] = f"auto -> {precision} (on {runtime.device.type})"
    if "precision" in substitutions and runtime.device.type == "cuda" and precision is not Precision.bf16:
        substitutions["precision"] = f"auto -> {precision} (not all GPUs of this run have bf16 in hardware)"
    if runtime.matmul is None:  # on GPUs; an earlier start may have been on CPUs
        substitutions.pop(MATMUL, None)
    elif runtime.matmul.library is not kept_matmul(config):
        choice = runtime.matmul
        substitutions[MATMUL] = Resolution(MATMUL, str(config.run.matmul), str(choice.library), choice.reason)
    return {setting: str(note) for setting, note in substitutions.items()}


def _flops(built: Built, mean_length: float, answer_share: float) -> float:
    """Of an encoder-decoder model each side is passed by its own tokens only; `answer_share` of them are the decoder's.

    Of experts a token meets those that are chosen for it.
    """
    text, (width, blocks) = text_settings(built.config), width_and_blocks(built.plain)
    met = getattr(text, "num_experts_per_tok", None) or getattr(text, "moe_topk", None)
    total = trained = 0.0
    counts = element_counts(built.step_module)
    for name, p in named_parameters(built.step_module):
        shape, numel = getattr(p, "ds_shape", p.shape), float(counts[name])
        if (base := built.tuning.base_name(name)) in built.quantised:
            shape = built.quantised[base]
        lookup = built.tuning.base_name(name) in built.vocabulary and not _is_head(built, name)
        if len(shape) < 2 or lookup:  # norms, biases and embedding look-ups multiply nothing
            continue
        if len(shape) == 3 and isinstance(met, int):
            numel *= min(met, shape[0]) / shape[0]
        if built.two_sides is not None:
            numel *= 1 - answer_share if ".encoder." in f".{name}" else answer_share
        total += numel
        trained += numel if p.requires_grad else 0
    return flops_per_token(
        matmul_parameters=round(total),
        trainable_matmul_parameters=round(trained),
        layers=blocks,
        width=width,
        mean_length=mean_length,
    )


def _is_head(built: Built, name: str) -> bool:
    """A tied embedding is also the head's matrix, so it does multiply."""
    return bool(getattr(built.config, "tie_word_embeddings", False)) or "head" in name or "embed_out" in name


def repeated_in_a_step(global_batch: int, epochs: float, steps: int) -> list[str]:
    """A line if a step takes more documents than there are: copies in one step teach nothing that one document does not."""
    times = epochs / max(1, steps)
    if times <= 1:
        return []
    return [
        f"each document is used about {times:.1f} times in one step: batch.global={global_batch} is more than the "
        f"{global_batch / times:,.0f} documents; lower batch.global"
    ]


def start_text(record: RunRecord) -> str:
    """The few lines before step 0: sizes, batch arithmetic, substitutions."""
    sharding = record.sharding
    held = sharding.held_per_rank
    share = sharding.trainable_parameters / max(1, sharding.parameters)
    ranks = "ranks" if record.world_size == 1 else f"ranks (over {sharding.exchange})"
    lines = [
        f"parameters: {sharding.parameters:,}, trainable {sharding.trainable_parameters:,} ({share:.2%}); held per "
        f"rank {min(held):,}" + (f" to {max(held):,}" if max(held) != min(held) else ""),
        f"batch: {record.global_batch} = {record.micro_batch} micro x {record.accumulation} accumulation x "
        f"{record.world_size} {ranks}; about {record.tokens_per_step:,} tokens a step, {record.total_steps} steps, "
        f"{record.epochs:,.2f} epochs",
        f"precision {record.precision}, attention {record.attention}, layout {record.layout}",
    ]
    lines += repeated_in_a_step(record.global_batch, record.epochs, record.total_steps)
    lines += memory_text(record)
    if record.advice:
        lines.append(f"advice: {record.advice}")
    if record.quantisation:
        also = ", each expert" if record.quantised_experts else ""
        lines.append(f"base stored in {record.quantisation}: frozen linear layers but the head{also}")
    lines += record.routers
    if packed := record.packed_weights:
        lines.append(_packed_text(packed))
    tflops = record.reference_tflops
    source = record.reference_tflops_source
    lines.append(f"MFU against {tflops:.2f} TFLOP/s a device ({source})" if tflops else f"no MFU: {source}")
    if left := record.weights_left_out:
        lines.append(
            f"not trained, since the architecture has no place for them: {left['weights']} stored weights "
            f"({', '.join(left['first'][:3])} ...), of which a whole export keeps {left['kept_in_export']}"
        )
    if record.initialised:
        lines.append(f"newly initialised (not in the checkpoint): {', '.join(record.initialised)}")
    lines += [f"resolved: {key}: {sentence}" for key, sentence in record.substitutions.items()]
    if record.resumed_from:
        lines.append(f"resumed from {record.resumed_from}")
    lines += [f"accepted: {line}" for line in record.accepted or ()]
    return "\n".join(lines)


def _packed_text(packed: Mapping[str, Any]) -> str:
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


_STATE = ("recent", "evaluations", "interval_loss", "interval_steps", "first_loss", "recent_losses")
"""Of the progress: what only a resumed run needs."""


def outcome_record(outcome: Outcome) -> RunOutcome:
    """The outcome as `run.json` has it: without what only a resumed run needs."""
    return RunOutcome(
        progress={key: content for key, content in asdict(outcome.progress).items() if key not in _STATE},
        before=outcome.before,
        after=outcome.after,
        last_row=outcome.last_row,
        speed=outcome.speed,
        experts=outcome.experts,
        slow_ranks=outcome.slow_ranks,
        stopped_early=outcome.stopped_early,
    )


def model_facts(config: RunConfig, record: RunRecord, outcome: Outcome, run_dir: Path) -> ModelFacts:
    """What the documents of the exported model are written from."""
    ended = replace(record, outcome=outcome_record(outcome), energy=taken(run_dir), challenges=outcome.challenges)
    of_model = gather(run_dir, ended, read_answers(config.export.answers)[0])
    of_model.step = outcome.progress.step
    of_model.tokens = outcome.progress.tokens
    of_model.artefact = artefact_of(run_dir, of_model.step, config.checkpoint.fallback_dir)
    return of_model


def end_text(run_dir: Path, outcome: Outcome, export: Path | None, hints: Sequence[tuple[str, str]]) -> str:
    """The last lines of a run: what came of it and where everything is, `hints` of trackers with it."""
    speed = f", {outcome.speed['tokens_per_s']:,.0f} tokens/s (median)" if outcome.speed else ""
    lines = ["", f"done: {outcome.progress.step} steps, {outcome.progress.tokens:,} tokens{speed}"]
    width = max([22, *map(len, outcome.after)])
    for name, value in outcome.after.items():
        before = outcome.before.get(name)
        earlier = "" if before is None else f"   (before: {readable(before)})"
        lines.append(f"  {name:<{width}} {readable(value)}{earlier}")
    lines += _finding_lines(run_dir, outcome)
    lines += [f"slow:       {Slow(**each).since()}" for each in outcome.slow_ranks]
    if export is not None:
        lines.append(f"model:      {export}")
    lines += [f"run record: {run_dir / RUN_RECORD}", f"metrics:    {run_dir / 'metrics.jsonl'}"]
    lines += [f"{name + ':':<11} {where}" for name, where in hints]
    return "\n".join(lines)


def _finding_lines(run_dir: Path, outcome: Outcome) -> list[str]:
    """What the detectors have found, with what to try, and the command for a better checkpoint."""
    findings = findings_in(outcome.challenges)
    lines = []
    for finding in findings:
        lines.append(f"warning:    {finding.text}")
        lines.append(f"            try: {'; '.join(finding.remedies[:SHOWN_REMEDIES])}")
    if not findings:
        return lines
    best_step = outcome.progress.best_step
    best = outcome.progress.best_metric
    now = outcome.after.get(outcome.watch)
    before = outcome.before.get(outcome.watch)
    if best_step is None or best is None or now is None:
        return lines
    sign = 1 if outcome.greater_is_better else -1
    if before is not None and sign * (best - before) <= 0:
        lines.append(f"best:       no checkpoint has a better {outcome.watch} than before training ({before:.4f})")
    elif best_step != outcome.progress.step:
        lines.append(
            f"best:       step {best_step} had {outcome.watch} {best:.4f}: shardtune export {run_dir} checkpoint=best"
        )
    return lines
