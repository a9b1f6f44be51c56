"""`train --dry-run`: sizes, batch arithmetic, steps and memory of a run, computed on the meta device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from launch.cluster.advice import as_submitted, gpu_kinds_of_job, list_partitions, partitions_of_job
from launch.cluster.long_steps import long_step_notes, reckoned_step_s
from launch.plan.round_lines import dry_run_lines
from strategies.base import ActivationCheckpointing, Fsdp2Config, Precision, StrategyConfig
from strategies.hardware import advice
from strategies.mesh import replica_count
from strategies.parameters import element_counts, meta_context, named_parameters
from strategies.runtime import SIMULATED, Runtime
from trainer.build.experts import dealing_lines, plan_experts
from trainer.build.parallel import check_parallel
from trainer.build.parts import build_model, prepare_data, workload
from trainer.build.recomputation import longest_lengths
from trainer.build.rounds import documents_per_step, steps_of_run, writing_lines
from trainer.config.parallel import accumulation_steps, readers_of
from trainer.config.run import LR, MICRO, STRATEGY, RunConfig, SlurmConfig
from trainer.data.prepare import PreparedData
from trainer.data.report.preview import is_prompts_alone, preview, summary
from trainer.model.loading import load_tokenizer
from trainer.planner.fit_check import single_step_config, why_not_simulated
from trainer.planner.lengths import SampledLengths, sampled_lengths
from trainer.planner.micro_batch import preview_micro
from trainer.planner.simulation import simulate_depth
from trainer.planner.strategy_choice import preview_strategy
from trainer.reporting.numbers import name_of_readers
from trainer.session.rate_text import learning_rate_of, rate_lines
from trainer.session.run_facts import model_flops_per_token, repetition_warning
from trainer.step import Built

DEFECTS = (LookupError, TypeError, AttributeError, AssertionError, NameError)
"""Errors of a simulated step that are a fault of the code, of ours or of the model's: training would likely meet them too."""


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a run would do, computed without training."""

    text: str
    """What `--dry-run` prints."""
    facts: dict[str, Any]
    """What `--dry-run --json` prints: JSON-compatible, sizes in bytes."""
    exit_code: int
    """0, or 70 if a defect keeps the step from being simulated."""


@dataclass(frozen=True, slots=True)
class SimulatedMemory:
    """Memory that a rank holds at the peak of the longest micro-batch, or why it is not known."""

    lines: list[str]
    """For the text of the dry run."""
    facts: dict[str, Any]
    """For its JSON: bytes in all and by kind, or the reason."""
    defect: bool = False
    """Whether the step could not be simulated because of a fault of the code."""


def describe(config: RunConfig) -> DryRun:
    """Compute sizes, batch arithmetic, steps and memory of a run, without training it.

    Prepares the data, which the run itself then finds in the cache, and reads only the headers of the weights.
    """
    tokenizer = load_tokenizer(config.model)
    check_parallel(config)
    data = prepare_data(config, tokenizer)
    half_on_gpu = str(config.run.device) == "cuda" and config.precision is not Precision.fp32
    config = preview_micro(preview_strategy(config, data), data)
    built, _ = build_model(config, tokenizer, data, meta_context(), half_on_gpu=half_on_gpu, scores_answers=True)
    world = config.launcher.per_node * config.launcher.nodes
    plan_experts(built, config, Runtime(0, world, 0, world // config.launcher.nodes, torch.device("cpu"), None))
    sequences = built.data_spec.sequences_per_document
    samples = sampled_lengths(config, data.train, sequences)
    global_batch = config.batch["global"]
    micro = config.batch["micro"]
    readers = name_of_readers(readers_of(config, world), config.parallel.sequence)
    accumulation = accumulation_steps(config, world)
    steps = steps_of_run(config, samples.order, samples.tokens)
    epochs = steps * documents_per_step(config) / samples.order.num_units
    documents = len(data.train) // sequences
    tokens_per_step = samples.mean * global_batch
    # The length of a written answer is not known: each prompt counts with the longest.
    approximation = "at most" if is_prompts_alone(data.report.get("train", {})) else "about"
    total = sum(element_counts(built.step_module).values())
    trained = sum(p.numel() for _, p in named_parameters(built.step_module) if p.requires_grad)
    memory = _memory(config, built, data, world)
    rate = learning_rate_of(config, steps)
    lines = [
        summary(data.report),
        preview(data.train, tokenizer, built.data_spec, data.label_names, width=100),
        f"strategy {config.strategy.name}, tuning {config.tuning.name}, {world} process(es), layout {built.layout}, "
        f"attention {built.attention}",
        f"parameters: {total:,}, trainable {trained:,} ({trained / total:.2%})",
        f"batch: {global_batch} = {micro} micro x {accumulation} accumulation x {readers}",
        f"tokens per step: {approximation} {tokens_per_step:,.0f}; steps: {steps:,}; epochs: "
        f"{epochs:,.2f} of {documents:,} documents",
        *_dealing_lines(config, built, world),
        *rate_lines(rate, steps),
        *writing_lines(config, built, int(data.train.lengths.max(initial=0))),
        *dry_run_lines(config, built, data.train.lengths, samples.mean, _gpu_kinds(config), (total, trained)),
        *repetition_warning(global_batch, epochs, steps),
        *_long_step_notes(config, built, samples),
        *memory.lines,
        *_deferred_gradient_lines(config.strategy, trained, accumulation=accumulation),
    ]
    precision_advice = advice(config.precision, str(config.run.device))
    if precision_advice:
        lines.append(f"advice: {precision_advice}")
    for key in (STRATEGY, MICRO, LR):
        if key in config.substitutions:
            lines.append(f"resolved: {key}: {config.substitutions[key]}")
    lines += [f"resolved: {key}: {note}" for key, note in built.substitutions.items()]
    lines.append("nothing was trained (--dry-run)")
    facts = {
        "strategy": str(config.strategy.name),
        "tuning": str(config.tuning.name),
        "ranks": world,
        "parameters": total,
        "trainable_parameters": trained,
        "batch": {"global": global_batch, "micro": micro, "accumulation": accumulation},
        "steps": steps,
        "learning_rate": asdict(rate),
        "epochs": epochs,
        "documents": documents,
        "tokens_per_step": tokens_per_step,
        "memory_per_rank": memory.facts,
        "substitutions": {key: str(note) for key, note in (config.substitutions | built.substitutions).items()},
    }
    return DryRun("\n".join(lines), facts, exit_code=70 if memory.defect else 0)


def _dealing_lines(config: RunConfig, built: Built, world: int) -> list[str]:
    """Over how many ranks the experts of a mixture are dealt, and what tokens exchange; nothing if they are not."""
    if config.parallel.experts == 1:
        return []
    precision = config.precision
    if precision is Precision.auto:
        precision = Precision.bf16 if str(config.run.device) == "cuda" else Precision.fp32
    return dealing_lines(built, precision, world // replica_count(config.strategy, world, config.launcher.nodes))


def _gpu_kinds(config: RunConfig) -> set[str]:
    """The cluster's names for the cards that the job may be given; empty on this machine."""
    if not isinstance(config.launcher, SlurmConfig):
        return set()
    slurm = as_submitted(config.launcher)
    return gpu_kinds_of_job(slurm, partitions_of_job(slurm, list_partitions()))


def _long_step_notes(config: RunConfig, built: Built, samples: SampledLengths) -> list[str]:
    """A warning if a step takes longer than SLURM leaves a job to save; none if the cards of the job are not known."""
    if not isinstance(config.launcher, SlurmConfig):
        return []
    gpu_kinds = _gpu_kinds(config)
    # A token's attention is as long as its document: on average over tokens, not over documents.
    mean_length = float(samples.squares.sum()) / float(samples.tokens.sum())
    flops = model_flops_per_token(built, mean_length, 0.5)
    step_s = reckoned_step_s(config, flops, samples.mean * config.batch["global"], gpu_kinds)
    return [f"warning: {note}" for note in long_step_notes(config, step_s)]


def _deferred_gradient_lines(strategy: StrategyConfig, trained: int, *, accumulation: int) -> list[str]:
    """A line on the memory of whole gradients, if FSDP2 reduces them only after the last micro-batch of a step.

    The simulation is of a single micro-batch, so its estimate does not have them.
    """
    if not isinstance(strategy, Fsdp2Config) or accumulation == 1 or strategy.defer_sync is False:
        return []
    when = "wait" if strategy.defer_sync else "wait only where they fit"
    gradients_gib = 4 * trained / 2**30  # in fp32
    return [f"  gradients, whole until the last micro-batch: {gradients_gib:.2f} GiB more at most; they {when}"]


def _memory(config: RunConfig, built: Built, data: PreparedData, world: int) -> SimulatedMemory:
    """The memory of a step of the run with its longest micro-batch, simulated; or why it cannot be simulated."""
    on_gpu = str(config.run.device) == "cuda"
    try:
        step = simulate_depth(
            single_step_config(config, world, mode_if_auto=ActivationCheckpointing.none),
            longest_lengths(built.data_spec, workload(config, data)),
            world_size=world,
            local_world_size=max(1, world // config.launcher.nodes),
            device=SIMULATED if on_gpu else torch.device("cpu"),
        )
    except Exception as error:  # noqa: BLE001 - an architecture may do what cannot be simulated; that stops no run
        # Training may still work if the step cannot be simulated, but a defect will probably be met there too.
        is_defect = isinstance(error, DEFECTS)
        reason = why_not_simulated(error)
        if is_defect:
            reason = (
                f"not known: the simulated step failed with {type(error).__name__}: {error}. This is a fault of shardtune "
                "or of the model's code, and training may fail likewise; exit code 70"
            )
        return SimulatedMemory([f"memory per rank: {reason}"], {"unknown": reason}, defect=is_defect)
    unit_bytes = 2**20
    unit = "MiB"
    if step.total >= 2**30:
        unit_bytes = 2**30
        unit = "GiB"
    # The run itself chooses, by its free memory, which activations are recomputed.
    mode = config.strategy.activation_checkpointing
    note = ", with nothing recomputed yet" if mode is ActivationCheckpointing.auto else ""
    lines = [
        f"memory per rank of the longest micro-batch{note}, simulated: most in {step.peak}; libraries and what the allocator "
        "reserves come on top"
    ]
    kinds = dict(sorted(step.kinds.items(), key=lambda kind_and_size: -kind_and_size[1]))
    for kind, size_bytes in kinds.items():
        if size_bytes >= 0.005 * unit_bytes:  # smaller ones would be shown as 0.00
            lines.append(f"  {kind:<14}{size_bytes / unit_bytes:8.2f} {unit}")
    lines.append(f"  {'total':<14}{step.total / unit_bytes:8.2f} {unit}")
    if step.host_inputs.tensors:
        pinned_gib = step.host_inputs.pinned() / 2**30
        lines.append(f"  beside it {pinned_gib:.2f} GiB of pinned host memory a rank, for inputs of recomputed blocks")
    return SimulatedMemory(lines, {"bytes": step.total, "peak": str(step.peak), "kinds": kinds})
