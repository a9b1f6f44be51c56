"""`--dry-run` of a model whose files are not on this machine, but whose shape is published.

Without a tokenizer the data cannot be read. Every document is taken to be as long as `data.max_length` allows, as in a plan.
"""

from __future__ import annotations

import math
from dataclasses import replace

from launch.plan.dry_run_memory import (
    DryRunNumbers,
    DryRunResult,
    deferred_gradient_lines,
    dry_run_result,
    simulate_step_memory,
)
from launch.plan.expert_notes import expert_lines_of_dry_run
from strategies.base import Precision
from strategies.errors import ConfigError
from strategies.parameters import named_parameters, num_elements_by_name
from trainer.build.parallel import check_parallel
from trainer.build.sequence import step_layout
from trainer.build.step_module import build_step_module
from trainer.config.parallel import accumulation_steps, dp_size_of
from trainer.config.run import LEARNING_RATE_KEY, RunConfig
from trainer.model.known_shapes import KnownShape, shape_note
from trainer.objectives.registry import data_spec_of, max_generated_tokens, objective_family
from trainer.planner.simulation import NoTokenizer
from trainer.reporting.numbers import format_dp_ranks
from trainer.session.rate_text import learning_rate_of, rate_lines
from trainer.step import BuiltModel


def describe_by_shape(config: RunConfig, shape: KnownShape) -> DryRunResult:
    """Answer `train --dry-run` for a model that is not on this machine, by its published shape: sizes, batch, memory.

    Without its tokenizer the data is not read: each sequence counts as the longest that the settings allow.
    Raises ConfigError for a setting that the run would choose by its data.
    """
    _raise_if_auto_needs_data(config)
    check_parallel(config)
    built = _build_step_on_meta(config)
    num_parameters = sum(num_elements_by_name(built.step_module).values())
    num_trained = sum(p.numel() for _, p in named_parameters(built.step_module) if p.requires_grad)
    world_size = config.launcher.per_node * config.launcher.nodes
    expert_lines = expert_lines_of_dry_run(config, built, world_size)
    global_batch = config.batch["global"]
    micro = config.batch["micro"]
    accumulation = accumulation_steps(config, world_size)
    dp_ranks_text = format_dp_ranks(dp_size_of(config, world_size), config.parallel.sequence)
    data_spec = data_spec_of(config.objective)
    sequences = data_spec.sequences_per_document
    longest_sequence = data_spec.longest_sequence(config.data.max_length) + max_generated_tokens(config.objective)
    tokens_per_step = longest_sequence * sequences * global_batch
    memory = simulate_step_memory(config, [longest_sequence] * sequences * micro, world_size)
    steps = _steps_of_budget_or_none(config, tokens_per_step)
    # The lines of the text.
    note = shape_note(shape, config.model.path)
    lines = [
        note,
        f"strategy {config.strategy.name}, tuning {config.tuning.name}, {world_size} process(es)",
        f"parameters: {num_parameters:,}, trainable {num_trained:,} ({num_trained / num_parameters:.2%})",
        f"batch: {global_batch} = {micro} micro x {accumulation} accumulation x {dp_ranks_text}",
        f"tokens per step: at most {tokens_per_step:,} (the data is not read without a tokenizer)",
        *expert_lines,
    ]
    learning_rate = None
    if steps is None:
        lines.append(f"steps: not known without a tokenizer; learning rate: {config.optim.peak_lr:g}")
    else:
        learning_rate = learning_rate_of(config, steps)
        lines += [f"steps: {steps:,}", *rate_lines(learning_rate, steps)]
    lines += [*memory.lines, *deferred_gradient_lines(config.strategy, num_trained, accumulation=accumulation)]
    if LEARNING_RATE_KEY in config.substitutions:
        lines.append(f"resolved: {LEARNING_RATE_KEY}: {config.substitutions[LEARNING_RATE_KEY]}")
    lines += [f"resolved: {key}: {note}" for key, note in built.substitutions.items()]
    lines.append("nothing was trained (--dry-run)")
    numbers = DryRunNumbers(
        ranks=world_size,
        parameters=num_parameters,
        num_trained_parameters=num_trained,
        tokens_per_step=tokens_per_step,
        steps=steps,
        learning_rate=learning_rate,
    )
    answer = dry_run_result(lines, config, numbers, memory, {"model.path": note, **built.substitutions})
    shape_facts = {"name": shape.name, "source": shape.source, "date": shape.date}
    return replace(answer, facts={"shape": shape_facts, **answer.facts})


def _raise_if_auto_needs_data(config: RunConfig) -> None:
    """Refuse strategy=auto and batch.micro=auto in a dry run by shape: a run chooses them by the lengths of its documents.

    Those cannot be read, since the model, with its tokenizer, is not on this machine. Raises ConfigError.
    """
    problems = []
    for key, value in (("strategy", config.strategy.name), ("batch.micro", config.batch["micro"])):
        if str(value) == "auto":
            problems.append(
                f"{key}=auto: is chosen by the lengths of the documents, and model.path={config.model.path} is not on this "
                f"machine to read them; give a value, or let shardtune plan try all of them"
            )
    if problems:
        raise ConfigError(problems)


def _build_step_on_meta(config: RunConfig) -> BuiltModel:
    """Build what a training step computes (model, tuning method, objective) on the meta device: shapes without values."""
    return build_step_module(
        config.model,
        objective_config=config.objective,
        tuning_config=config.tuning,
        layout=step_layout(config),
        tokenizer=NoTokenizer(config.model),
        num_labels=objective_family(config.objective).num_outputs or 2,  # labels are counted in the data: the fewest
        half_on_gpu=str(config.run.device) == "cuda" and config.precision is not Precision.fp32,
    )


def _steps_of_budget_or_none(config: RunConfig, tokens_per_step: int) -> int | None:
    """Optimizer steps of the budget; None for `budget.epochs`, whose documents nobody can count without a tokenizer.

    `tokens_per_step`: at most, so that a budget of tokens gives the fewest steps.
    """
    if config.budget.steps is not None:
        return config.budget.steps
    if config.budget.tokens is not None:
        return math.ceil(config.budget.tokens / tokens_per_step)
    return None
