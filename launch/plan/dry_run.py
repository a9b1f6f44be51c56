"""`train --dry-run`: sizes, batch arithmetic, steps and memory of a run, computed on the meta device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launch.cluster.advice import gpu_kinds_of_job, partitions_of_job, query_partitions, settings_as_submitted
from launch.cluster.long_steps import estimated_step_s, long_step_notes
from launch.plan.dry_run_by_shape import describe_by_shape
from launch.plan.dry_run_memory import (
    DryRunNumbers,
    DryRunResult,
    deferred_gradient_lines,
    dry_run_result,
    simulate_step_memory,
)
from launch.plan.expert_notes import expert_lines_of_dry_run
from launch.plan.round_lines import round_lines_of_dry_run
from strategies.base import Precision
from strategies.hardware import slow_precision_warning
from strategies.parameters import named_parameters, num_elements_by_name
from trainer.build.parallel import check_parallel
from trainer.build.parts import build_model, largest_micro_batch, prepare_data
from trainer.build.recomputation import longest_sequence_lengths
from trainer.build.rounds import generation_memory_lines, num_documents_per_step, num_steps_of_run
from trainer.config.parallel import accumulation_steps, dp_size_of
from trainer.config.run import LEARNING_RATE_KEY, MICRO_BATCH_KEY, STRATEGY_KEY, RunConfig, SlurmConfig
from trainer.data.report.preview import is_prompts_alone, start_preview_text, summary_text
from trainer.model.known_shapes import shape_instead_of_files
from trainer.model.loading import load_tokenizer
from trainer.planner.lengths import SampledLengths, sampled_lengths
from trainer.planner.micro_batch import with_proposed_micro_batch
from trainer.planner.strategy_choice import with_proposed_strategy
from trainer.reporting.numbers import format_dp_ranks
from trainer.session.rate_text import learning_rate_of, rate_lines
from trainer.session.run_facts import model_flops_per_token, repetition_warning
from trainer.step import BuiltModel

if TYPE_CHECKING:
    from trainer.data.objective_spec import DataSpec
    from trainer.data.prepare import PreparedData


def describe_run(config: RunConfig) -> DryRunResult:
    """Answer `train --dry-run`: sizes, batch arithmetic, steps and memory of a run, which is not trained.

    Prepares the data, which the run itself then finds in the cache, and reads only the headers of the weights. If the model is
    not on this machine, its published shape stands for it, and the data is not read.
    """
    shape = shape_instead_of_files(config.model)
    if shape is not None:
        return describe_by_shape(config, shape)
    tokenizer = load_tokenizer(config.model)
    check_parallel(config)
    data = prepare_data(config, tokenizer)
    half_on_gpu = str(config.run.device) == "cuda" and config.precision is not Precision.fp32
    config = with_proposed_micro_batch(with_proposed_strategy(config, data), data)
    built, _ = build_model(config, tokenizer, data, half_on_gpu=half_on_gpu, scores_answers=True)
    world_size = config.launcher.per_node * config.launcher.nodes
    expert_lines = expert_lines_of_dry_run(config, built, world_size)
    sequences = built.data_spec.sequences_per_document
    samples = sampled_lengths(config, data.train, sequences)
    global_batch = config.batch["global"]
    micro = config.batch["micro"]
    dp_ranks_text = format_dp_ranks(dp_size_of(config, world_size), config.parallel.sequence)
    accumulation = accumulation_steps(config, world_size)
    steps = num_steps_of_run(config, samples.order, samples.tokens)
    epochs = steps * num_documents_per_step(config) / samples.order.num_units
    documents = len(data.train) // sequences
    tokens_per_step = samples.mean * global_batch
    # The length of a written answer is not known: each prompt counts with the longest.
    approximation = "at most" if is_prompts_alone(data.report.get("train", {})) else "about"
    num_parameters = sum(num_elements_by_name(built.step_module).values())
    num_trained = sum(p.numel() for _, p in named_parameters(built.step_module) if p.requires_grad)
    memory = simulate_step_memory(
        config, longest_sequence_lengths(built.data_spec, largest_micro_batch(config, data)), world_size
    )
    learning_rate = learning_rate_of(config, steps)
    lines = [
        summary_text(data.report),
        _first_document_text(config, data, tokenizer, built.data_spec),
        f"strategy {config.strategy.name}, tuning {config.tuning.name}, {world_size} process(es), layout {built.layout}, "
        f"attention {built.attention}",
        f"parameters: {num_parameters:,}, trainable {num_trained:,} ({num_trained / num_parameters:.2%})",
        f"batch: {global_batch} = {micro} micro x {accumulation} accumulation x {dp_ranks_text}",
        f"tokens per step: {approximation} {tokens_per_step:,.0f}; steps: {steps:,}; epochs: "
        f"{epochs:,.2f} of {documents:,} documents",
        *expert_lines,
        *rate_lines(learning_rate, steps),
        *generation_memory_lines(config, built, int(data.train.lengths.max(initial=0))),
        *round_lines_of_dry_run(
            config,
            built,
            prompt_lengths=data.train.lengths,
            mean_length=samples.mean,
            gpu_kinds=_gpu_kinds(config),
            num_parameters=num_parameters,
            num_trained=num_trained,
        ),
        *repetition_warning(global_batch, epochs, steps),
        *_long_step_warnings(config, built, samples),
        *memory.lines,
        *deferred_gradient_lines(config.strategy, num_trained, accumulation=accumulation),
    ]
    precision_advice = slow_precision_warning(config.precision, str(config.run.device))
    if precision_advice:
        lines.append(f"advice: {precision_advice}")
    for key in (STRATEGY_KEY, MICRO_BATCH_KEY, LEARNING_RATE_KEY):
        if key in config.substitutions:
            lines.append(f"resolved: {key}: {config.substitutions[key]}")
    lines += [f"resolved: {key}: {note}" for key, note in built.substitutions.items()]
    lines.append("nothing was trained (--dry-run)")
    numbers = DryRunNumbers(
        ranks=world_size,
        parameters=num_parameters,
        num_trained_parameters=num_trained,
        tokens_per_step=tokens_per_step,
        steps=steps,
        learning_rate=learning_rate,
        epochs=epochs,
        documents=documents,
    )
    return dry_run_result(lines, config, numbers, memory, built.substitutions)


def _first_document_text(config: RunConfig, data: PreparedData, tokenizer: Any, data_spec: DataSpec) -> str:
    """The first training document as a run shows it at its start."""
    return start_preview_text(
        data.train,
        tokenizer,
        data_spec,
        data.label_names,
        width=100,
        report=data.report,
        privacy=config.data.privacy,
    )


def _gpu_kinds(config: RunConfig) -> set[str]:
    """The cluster's names for the GPUs that a SLURM job of this run may be given, such as {"h100"}; empty without SLURM."""
    if not isinstance(config.launcher, SlurmConfig):
        return set()
    slurm = settings_as_submitted(config.launcher)
    return gpu_kinds_of_job(slurm, partitions_of_job(slurm, query_partitions()))


def _long_step_warnings(config: RunConfig, built: BuiltModel, samples: SampledLengths) -> list[str]:
    """Warn in a dry run if a step is estimated to take too long for settings in seconds, such as `run.timeout_s`.

    `samples`: the lengths of the run's documents. No warnings without SLURM, or for GPUs whose speed is not known.
    """
    if not isinstance(config.launcher, SlurmConfig):
        return []
    gpu_kinds = _gpu_kinds(config)
    # A token's attention is as long as its document: on average over tokens, not over documents.
    mean_length = float(samples.squared_tokens.sum()) / float(samples.tokens.sum())
    # How much of the tokens an encoder-decoder's decoder takes is not known here: half.
    flops_per_token = model_flops_per_token(built, mean_length, answer_share=0.5)
    step_s = estimated_step_s(config, flops_per_token, samples.mean * config.batch["global"], gpu_kinds)
    return [f"warning: {note}" for note in long_step_notes(config, step_s)]
