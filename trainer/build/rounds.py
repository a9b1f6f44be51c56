"""Builds the loader of objectives whose batches are rounds: answers that the run's own engine writes, scored by rewards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from strategies.base import Engine, Precision, Progress
from strategies.errors import ConfigError
from strategies.runtime import Runtime, gather_objects
from trainer.build.recomputation import device_memory_gib
from trainer.config.run import RunConfig
from trainer.data.batches.cutting import RowCut, sequence_cut
from trainer.data.batches.loader import BatchShare
from trainer.data.batches.mixing import build_order
from trainer.data.batches.order import Order, steps_from_budget
from trainer.data.config import Layout
from trainer.data.prepare import PreparedData
from trainer.data.store.documents import DocumentTable
from trainer.evaluation.full_weights import USABLE_MEMORY_SHARE, kv_cache_bytes_upper_bound
from trainer.evaluation.group_answers import can_share_prompts
from trainer.model.architecture import text_model_config
from trainer.model.attention import VARLEN_ATTENTION
from trainer.model.flex import FLEX_ATTENTION
from trainer.model.loading import load_generation_config
from trainer.objectives.causal import unwrap_adapter
from trainer.objectives.grpo import settings_without_effect
from trainer.objectives.grpo_config import GrpoConfig
from trainer.objectives.registry import objective_family
from trainer.rollout.answer_batcher import AnswerBatcher
from trainer.rollout.generator import EngineGroupGenerator, ignored_generation_settings
from trainer.rollout.loader import RolloutLoader
from trainer.rollout.prompts import PromptReader
from trainer.rollout.rewards.model_files import BATCH_TOKENS
from trainer.rollout.round_builder import RoundBuilder
from trainer.rollout.types import RewardScorer
from trainer.step import BuiltModel

MAX_GENERATION_ROWS = {"cpu": 64, "cuda": 256}
"""The most completions that a rank generates at a time, by type of device: more are no faster."""
MAX_LOGP_DIFFERENCE = {Precision.fp32: 0.001, Precision.bf16: 0.1, Precision.fp16: 0.1}
"""The most nats by which log-probabilities in generation and in training may differ. By rounding they differ by about 1e-5 in
float32, and by about 0.01 in bf16."""


@dataclass(frozen=True, slots=True)
class RoundInputs:
    """What a loader of rounds needs, in addition to the parts that every run has."""

    tokenizer: Any
    precision: Precision
    """Of the run, resolved."""
    scorer: RewardScorer
    progress: Progress
    new_stop_check: Callable[[], Callable[[], bool]]
    """Makes a function that says, on all ranks alike, whether the run must stop."""
    report_phase: Callable[[str], None] = lambda phase: None
    """Called with what the run is doing now, such as `training`."""


def num_prompts_per_round(config: RunConfig) -> int:
    """How many prompts a round of generation has: the completions of its batches over those of each prompt (`group_size`).

    A round: the model generates answers to prompts, rewards score them, and a few optimizer steps learn from them.
    """
    settings: Any = config.objective
    num_completions: int = config.batch["global"] * settings.rollout.steps
    return num_completions // int(settings.group_size)


def num_documents_per_step(config: RunConfig) -> float:
    """How many documents an optimizer step consumes, on average.

    If the model generates what it learns, documents are prompts.
    """
    global_batch: int = config.batch["global"]
    if objective_family(config.objective).rollout is None:
        return global_batch
    settings: Any = config.objective
    return global_batch / (settings.group_size * settings.rollout.iterations)


def num_steps_of_run(config: RunConfig, order: Order, unit_tokens: np.ndarray) -> int:
    """How many optimizer steps the run's budget allows.

    - no rounds of generation, or `budget.steps` is set: as the budget says.
    - rounds: `budget.epochs` are passes over the prompts, rounded so that the last round is complete. A round consumes its
      prompts as a step of another objective consumes its global batch.

    `order`: that of the samples. `unit_tokens`: tokens of each document or pack.
    """
    if objective_family(config.objective).rollout is None or config.budget.steps is not None:
        return steps_from_budget(config.budget, order, unit_tokens, config.batch["global"])
    settings: Any = config.objective
    num_rounds = steps_from_budget(config.budget, order, unit_tokens, num_prompts_per_round(config))
    # Each batch of a round is learned from in every iteration over the round.
    return num_rounds * int(settings.rollout.steps * settings.rollout.iterations)


def generation_memory_lines(config: RunConfig, built: BuiltModel, longest_prompt: int) -> list[str]:
    """Lines for a dry run on the memory that generating and scoring completions takes; empty for an objective without rounds.

    One line has the size of the KV cache and of the gathered weights that a rank holds while it generates. Another one for each
    reward model has the size of its weights. All are computed from sizes of parameters. `longest_prompt`: in tokens.
    """
    if objective_family(config.objective).rollout is None:
        return []
    settings: Any = config.objective
    rollout = settings.rollout
    # Of a round, whose answers are learned from in `rollout.steps` optimizer steps.
    num_completions = config.batch["global"] * rollout.steps
    device_type = "cpu" if str(config.run.device) == "cpu" else "cuda"
    num_rows = rollout.rows or min(num_completions, MAX_GENERATION_ROWS[device_type])
    row_tokens = longest_prompt + rollout.max_new_tokens
    itemsize = 4 if config.precision is Precision.fp32 else 2
    weights_gib = sum(p.numel() for p in built.base_on_meta.parameters()) * itemsize / 2**30
    kv_cache_gib = kv_cache_bytes_upper_bound(built.config, num_rows, row_tokens, itemsize) / 2**30
    lines = [
        f"writing: {num_prompts_per_round(config)} prompts x {settings.group_size} answers a round, at "
        f"most {num_rows} at a time: "
        f"keys of {num_rows} x {row_tokens:,} tokens take {kv_cache_gib:.2f} GiB, and whole weights {weights_gib:.2f} GiB"
    ]
    return lines + _reward_model_memory_lines(config, built, itemsize)


def _reward_model_memory_lines(config: RunConfig, built: BuiltModel, itemsize: int) -> list[str]:
    """A line for a dry run on the weights of each reward model. `itemsize`: bytes of a number in the precision of the run."""
    settings: Any = config.objective
    lines = []
    for name, model in built.step_module.reward_models.items():
        size_gib = sum(p.numel() for p in model.parameters()) * itemsize / 2**30
        tokens_at_a_time = settings.rewards[name].options.get("batch_tokens", BATCH_TOKENS)
        lines.append(
            f"scoring: reward model {name} has {size_gib:.2f} GiB of weights, shared among ranks as "
            f"strategy={config.strategy.name} does, and reads {tokens_at_a_time:,} tokens at a time"
        )
    return lines


def build_round_loader(
    config: RunConfig, data: PreparedData, built: BuiltModel, engine: Engine, runtime: Runtime, inputs: RoundInputs
) -> tuple[RolloutLoader, int]:
    """Build the loader of a reinforcement-learning run; returns it, and the optimizer steps of the run's budget.

    Such a run works in rounds: the model generates answers to prompts, rewards score them, and a few optimizer steps learn from
    them. `inputs`: the tokenizer, the scorer, and functions by which the loader asks whether to stop and says what it does. All
    ranks must call.
    """
    settings: Any = config.objective
    assert isinstance(settings, GrpoConfig)
    _, order = build_order(config.data, data.train, sequences_per_document=1, seed=config.run.seed)
    num_prompts = num_prompts_per_round(config)

    # Notes on settings that have no effect.
    generation_config = load_generation_config(config.model, built.config, None)
    ignored_settings = ignored_generation_settings(generation_config)
    if ignored_settings:
        built.substitutions["generation_config.json"] = (
            f"only its end tokens hold while training, without {', '.join(ignored_settings)}: answers are "
            "drawn by the probabilities that "
            "are learned"
        )
    settings_of_no_effect = settings_without_effect(settings)
    if settings_of_no_effect:
        built.substitutions["objective.rollout.steps"] = (
            f"1, so that {', '.join(settings_of_no_effect)} changes nothing: the policy that learns is the one that wrote"
        )

    # What generates answers, and what makes rounds of them.
    share = BatchShare(num_prompts, config.batch["micro"], runtime.dp_rank, runtime.dp_size, sequence_cut(runtime))
    longest_row = int(data.train.lengths.max(initial=0)) + settings.rollout.max_new_tokens
    group_generator = EngineGroupGenerator(
        inputs.tokenizer,
        generation_config,
        settings.rollout,
        runtime,
        seed=config.run.seed,
        rows=settings.rollout.rows or max_concurrent_completions(built, engine, runtime, longest_row),
        stop_now=inputs.new_stop_check(),
    )
    collator: Any = built.collator
    objective: Any = built.step_module.objective
    round_builder = RoundBuilder(
        settings,
        num_prompts,
        engine,
        prompts=PromptReader(data.train, DocumentTable(data.directory), order),
        group_generator=group_generator,
        scorer=inputs.scorer,
        batcher=AnswerBatcher(
            share.micro_batch,
            share.dp_rank,
            share.dp_size,
            share.cut,
            collator,
            runtime.device,
            shares_prompts=shares_prompts_in_rows(config, built, share.cut, runtime),
        ),
        runtime=runtime,
        references=objective.references,
        stop_now=inputs.new_stop_check(),
        report_phase=inputs.report_phase,
    )

    # The loader, and the run's steps.
    max_logp_difference = settings.rollout.most_difference
    if max_logp_difference is None:
        max_logp_difference = MAX_LOGP_DIFFERENCE[inputs.precision]
    loader = RolloutLoader(round_builder, share, inputs.progress, max_logp_difference)
    num_steps = num_steps_of_run(config, order, loader.unit_tokens)
    built.set_total_steps(num_steps)
    return loader, num_steps


def shares_prompts_in_rows(config: RunConfig, built: BuiltModel, cut: RowCut | None, runtime: Runtime) -> bool:
    """Whether training puts all answers to a prompt into one row with the prompt, which saves computing it again.

    Such a row is `[prompt | answer | answer ...]`. `objective.rollout.share_prompts` decides; if it is not set, True on CPUs if
    it is possible, and False on GPUs, where its speed has not been measured. `cut`: which slice of each row the rank takes;
    None: whole rows. Raises ConfigError if it is set to true, and this model or other settings do not allow it.
    """
    settings: Any = config.objective
    share_prompts: bool | None = settings.rollout.share_prompts
    is_default_on = share_prompts is None and runtime.device.type == "cpu"
    if not share_prompts and not is_default_on:
        return False
    problem = _prompt_sharing_problem(config, built, cut)
    if share_prompts and problem is not None:
        raise ConfigError(f"objective.rollout.share_prompts=true: {problem}; leave it out")
    return problem is None


def _prompt_sharing_problem(config: RunConfig, built: BuiltModel, cut: RowCut | None) -> str | None:
    """Why answers cannot share their prompt in a row, as text for a message; None if they can.

    It needs our own attention functions, which keep the answers of a row apart, and a model in which tokens reach each other
    only through attention, with a cache of keys and values.
    """
    if cut is not None:
        return "ranks share rows (parallel.sequence)"
    if built.layout is not Layout.padding_free or built.attention not in (VARLEN_ATTENTION, FLEX_ATTENTION):
        return f"data.layout={built.layout} with attention {built.attention} does not know answers that share a prompt"
    if built.step_module.added_losses is not None:
        return "losses of routers count tokens, and a prompt would count less"  # once, instead of once for each answer
    if config.strategy.compile:
        return "strategy.compile would compile the blocks anew for other answers"
    if getattr(text_model_config(built.config), "attention_chunk_size", None) is not None:
        return "this model attends in chunks"
    if not can_share_prompts(unwrap_adapter(built.step_module.model)):
        return "layers of this model keep more of earlier tokens than keys and values"
    return None


def max_concurrent_completions(built: BuiltModel, engine: Engine, runtime: Runtime, tokens: int) -> int:
    """How many completions a rank generates at a time: the largest power of two whose KV cache fits beside whole weights.

    At least 1, and at most `MAX_GENERATION_ROWS`. `tokens`: of the longest prompt with its completion. The number follows from
    the size of the devices and from what this process has allocated for model and optimizer, not from the memory that is free
    at the moment: a resumed run must generate in batches of the same size, so that it rounds alike. All ranks must call; the
    rank with the least memory decides.
    """
    itemsize = min(p.element_size() for p in built.step_module.parameters() if p.is_floating_point())
    allocated_bytes = torch.cuda.memory_allocated(runtime.device) if runtime.device.type == "cuda" else 0
    # Generation needs whole weights, which a sharded engine gathers. 0 bytes if each rank has them whole already, or if an
    # engine cannot gather them (None).
    gathered_bytes = engine.full_parameters.gather_bytes() or 0
    own_free_bytes = USABLE_MEMORY_SHARE * device_memory_gib(runtime) * 2**30 - allocated_bytes - gathered_bytes
    least_free_bytes = min(gather_objects(own_free_bytes, runtime))
    num_completions = MAX_GENERATION_ROWS[runtime.device.type]
    while (
        num_completions > 1
        and kv_cache_bytes_upper_bound(built.config, num_completions, tokens, itemsize) > least_free_bytes
    ):
        num_completions //= 2
    return num_completions
