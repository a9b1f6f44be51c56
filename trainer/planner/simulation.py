"""Simulates a run's step from its configuration and a model's config.json, without weights, data, tokenizer or GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from strategies.base import Precision, ZeroConfig
from strategies.expert_counts import ASSUMED_IMBALANCE
from strategies.parameters import meta_context, named_parameters, num_elements_by_name
from strategies.runtime import SIMULATED, Runtime
from strategies.sequence import with_sequence_parallelism
from strategies.simulation import simulated_rank
from strategies.zero_config import MAX_LIVE_PARAMETERS
from trainer.build.experts import plan_expert_parallelism
from trainer.build.parts import needs_one_row_batches, tile_mlps_of_built_model
from trainer.build.recomputation import micro_batch_of
from trainer.build.references import attach_reference_model
from trainer.build.reward_models import attach_reward_models
from trainer.build.sequence import attention_heads_of, step_layout
from trainer.build.step_module import build_step_module
from trainer.config.parallel import ParallelConfig, accumulation_steps
from trainer.config.run import RunConfig
from trainer.data.batches.cutting import sequence_cut
from trainer.model.config import ModelConfig
from trainer.model.loading import load_model_config
from trainer.objectives.base import ObjectiveConfig
from trainer.objectives.registry import data_spec_of, objective_family
from trainer.optim.build import build_optimizer
from trainer.planner.cost_model import (
    CostModel,
    MicroBatchSize,
    fit_cost_model,
    micro_batches_to_simulate,
    simulate_sizes,
)
from trainer.planner.depth_extrapolation import END_BLOCKS, ExtrapolatedStep, is_near_an_end, step_at_depth
from trainer.planner.memory_tracker import StepPhase
from trainer.planner.model_blocks import BlockPattern, block_pattern, repeated_blocks, truncated_model
from trainer.planner.simulate import ShapesOnly, SimulatedStep, StepParts, simulate
from trainer.step import BuiltModel


class NoTokenizer:
    """Stands in for a tokenizer where a model is built: it has only the number of tokens, those added by the run included."""

    def __init__(self, config: ModelConfig) -> None:
        rows = load_model_config(config).get_text_config().vocab_size
        self._size = rows + len(config.add_tokens)
        self.pad_token_id = 0

    def __len__(self) -> int:
        return self._size


def simulate_run(
    config: RunConfig,
    lengths: list[int],
    *,
    rank: int = 0,
    world_size: int = 1,
    local_world_size: int = 8,
    device: torch.device = SIMULATED,
    full_pattern: BlockPattern | None = None,
    expert_imbalance: float = ASSUMED_IMBALANCE,
) -> SimulatedStep:
    """Simulate one training step of rank `rank`, as on a GPU (or on `device` "cpu"), on tensors without memory.

    Each micro-batch has sequences of `lengths` tokens. Of `model.path` only the config.json is read. `full_pattern`: if
    the model is a shallow one, the blocks of the full model that it is simulated for; else None.
    `expert_imbalance`: with `parallel.experts`, tokens that arrive at this rank's experts over the mean of its group. Raises
    ConfigError for what the run itself would refuse, RuntimeError in a process that is part of a job.
    """
    with simulated_rank(
        rank, world_size, local_world_size=local_world_size, device=device, expert_imbalance=expert_imbalance
    ) as all_ranks:
        runtime = with_sequence_parallelism(all_ranks, config.parallel.sequence)
        parts = build_step_parts(config, lengths, runtime)
        return simulate(_with_full_trained_elements(parts, full_pattern), runtime)


def simulate_depth(
    config: RunConfig,
    lengths: list[int],
    *,
    rank: int | None = None,
    world_size: int = 1,
    local_world_size: int = 8,
    exact: bool = False,
    device: torch.device = SIMULATED,
    expert_imbalance: float = ASSUMED_IMBALANCE,
) -> ExtrapolatedStep:
    """One training step of the whole model, extrapolated from simulations of two models with few of its blocks.

    `lengths`: tokens of each sequence of a micro-batch. `rank`: the rank to simulate; None for the busiest of those that
    share a row (`busiest_rank`). `expert_imbalance`: with `parallel.experts`, tokens that arrive at the rank's experts over the
    mean of its group. With `exact` the whole model is simulated.

    Encoder-decoder models, and those whose kinds of blocks do not repeat, are simulated as they are.
    """
    pattern = block_pattern(config.model)
    num_blocks = pattern.num_blocks

    def simulate_model_of(depth: int) -> SimulatedStep:
        """One step of the model with `depth` blocks."""
        with _truncated_run(config, depth, num_blocks) as truncated:
            return simulate_run(
                truncated,
                lengths,
                rank=busiest_rank(config) if rank is None else rank,
                world_size=world_size,
                local_world_size=local_world_size,
                device=device,
                full_pattern=pattern,
                expert_imbalance=expert_imbalance,
            )

    exact = exact or pattern.period is None
    return step_at_depth(
        simulate_model_of,
        num_blocks,
        pattern.period or 1,
        ends=END_BLOCKS if exact else end_blocks_of(config),
        ends_overlap=ends_may_overlap(config),
        exact=exact,
    )


def simulate_cost_model_of_run(
    config: RunConfig,
    length: int,
    *,
    accumulation: int,
    world_size: int = 1,
    local_world_size: int = 8,
    exact: bool = False,
    device: torch.device = SIMULATED,
    expert_imbalance: float = ASSUMED_IMBALANCE,
) -> CostModel:
    """The cost model of a rank's step: its memory and work at any size of micro-batch, from simulations of two sizes.

    `length`: tokens of each sequence. Steps of `accumulation` micro-batches are simulated for the rank that holds most, in
    two models of few blocks; with `exact`, in the whole model. `expert_imbalance`: with `parallel.experts`, tokens that arrive at
    the rank's experts over the mean of its group. Raises ConfigError for what the run itself would refuse, RuntimeError in a
    process that is part of a job.
    """
    pattern = block_pattern(config.model)
    num_blocks = pattern.num_blocks
    period = None if exact else pattern.period
    rank = _rank_with_most_memory(config, world_size)
    end_blocks = end_blocks_of(config) if period else END_BLOCKS
    sequences = data_spec_of(config.objective).sequences_per_document
    # Filled by the simulations: fields of the cost model that do not depend on the depth, and counts that do.
    details: dict[str, Any] = {}
    counts_by_depth: dict[int, ParameterCounts] = {}

    def simulate_model_of(
        depth: int, expected: dict[StepPhase, int] | None
    ) -> tuple[list[SimulatedStep], list[MicroBatchSize], bool]:
        """Steps in a model of `depth` blocks: (steps, sizes, whether sizes are rows). `expected`: see `simulate_sizes`."""
        with (
            simulated_rank(
                rank, world_size, local_world_size=local_world_size, device=device, expert_imbalance=expert_imbalance
            ) as all_ranks,
            _truncated_run(config, depth, num_blocks) as truncated,
        ):
            runtime = with_sequence_parallelism(all_ranks, config.parallel.sequence)
            parts = build_step_parts(truncated, [length] * sequences, runtime)
            parts = _with_full_trained_elements(parts, pattern)
            built = parts.built
            details.update(_fields_of_any_depth(built, config.objective))
            counts_by_depth[depth] = _parameter_counts(built)
            rows, lengths_by_size = micro_batches_to_simulate(
                built,
                num_vocabulary_rows(truncated.model),
                length,
                is_linear=parts.precision is not Precision.fp32,  # attention in fp32 keeps its scores, length x length
                slices=runtime.sequence_size,
                in_tiles=config.strategy.mlp_tokens is not None,
            )
            batches = []
            sizes = []
            for lengths in lengths_by_size:
                micro_batch = _micro_batch_of(parts, lengths, accumulation * runtime.dp_size, runtime)
                batches.append([micro_batch] * accumulation)
                units = len(lengths) // sequences if rows else sum(lengths)
                sizes.append(MicroBatchSize(units, sum_of_squared_lengths=sum(tokens**2 for tokens in lengths)))
            is_needed = partial(is_near_an_end, depth=depth, ends=end_blocks)
            return simulate_sizes(parts, batches, runtime, expected, is_needed), sizes, rows

    cost_model = fit_cost_model(
        simulate_model_of,
        num_blocks,
        period=period,
        ends=end_blocks,
        ends_overlap=ends_may_overlap(config),
        accumulation=accumulation,
        local_world_size=local_world_size,
    )
    counts = _extrapolated_counts(counts_by_depth, num_blocks)
    return replace(
        cost_model,
        num_parameters=counts.num_parameters,
        num_trained_parameters=counts.num_trained,
        num_trained_expert_parameters=counts.num_trained_expert_parallel,
        num_vocabulary_rows=num_vocabulary_rows(config.model),
        **details,
    )


def _fields_of_any_depth(built: BuiltModel, objective: ObjectiveConfig) -> dict[str, Any]:
    """The fields `notes`, `layout` and `needs_single_rows` of a cost model, which are the same at any depth."""
    # Without the note on attention kernels: they were chosen for this machine, not for the GPU of the plan.
    notes = [f"{key}: {note}" for key, note in built.substitutions.items() if key != "model.attention"]
    return {
        "notes": tuple(notes),
        "layout": str(built.layout),
        "needs_single_rows": needs_one_row_batches(built, objective),
    }


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """How many parameters a model has, all ranks together."""

    num_parameters: int
    num_trained: int
    num_trained_expert_parallel: int
    """Those of the trained ones that are in experts distributed over ranks (`parallel.experts`)."""


def _extrapolated_counts(counts_by_depth: dict[int, ParameterCounts], num_blocks: int) -> ParameterCounts:
    """The numbers of parameters of the whole model of `num_blocks` blocks, from those of one or two models by their depth."""
    shallow_depth = min(counts_by_depth)
    deep_depth = max(counts_by_depth)
    shallow = counts_by_depth[shallow_depth]
    deep = counts_by_depth[deep_depth]
    further_periods = (num_blocks - deep_depth) / max(1, deep_depth - shallow_depth)

    def at_full_depth(shallow_number: int, deep_number: int) -> int:
        return round(deep_number + (deep_number - shallow_number) * further_periods)

    return ParameterCounts(
        at_full_depth(shallow.num_parameters, deep.num_parameters),
        at_full_depth(shallow.num_trained, deep.num_trained),
        at_full_depth(shallow.num_trained_expert_parallel, deep.num_trained_expert_parallel),
    )


def end_blocks_of(config: RunConfig) -> int:
    """How many blocks at either end of a model take other memory than those between, and so must all be simulated.

    Blocks near an end have fewer neighbours whose weights are gathered at the same time. There are more such blocks if the
    first ones are of a kind of their own, and under ZeRO-3, which keeps further blocks gathered.
    """
    pattern = block_pattern(config.model)
    end_blocks = END_BLOCKS + pattern.num_leading_blocks
    if not isinstance(config.strategy, ZeroConfig) or config.strategy.stage < 3:
        return end_blocks
    with TemporaryDirectory() as directory, simulated_rank(0, 1) as runtime:
        depth = pattern.num_leading_blocks + (pattern.period or 1)
        # One rank suffices to build the blocks, whose sizes do not depend on how rows are shared.
        truncated = replace(
            config, model=truncated_model(config.model, depth, Path(directory)), parallel=ParallelConfig(sequence=1)
        )
        blocks = repeated_blocks(build_step_parts(truncated, [1], runtime).built.step_module)
    # ZeRO-3 keeps up to MAX_LIVE_PARAMETERS elements gathered: as many blocks as hold these.
    elements_per_block = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    smallest = min(elements_per_block, default=1)
    return max(end_blocks, MAX_LIVE_PARAMETERS // smallest + 1)


def ends_may_overlap(config: RunConfig) -> bool:
    """Whether a shallow model may be so short that one block belongs to both of its ends.

    It may not if several blocks fill a gradient bucket together (ZeRO-2 and 3), nor if the first blocks are of a kind of
    their own.
    """
    if block_pattern(config.model).num_leading_blocks:
        return False
    return not isinstance(config.strategy, ZeroConfig) or config.strategy.stage < 2


def busiest_rank(config: RunConfig) -> int:
    """The rank to simulate where ranks share a row (`parallel.sequence`): the first that has most attention heads.

    Rank 0 if ranks share no rows or have equally many heads.
    """
    degree = config.parallel.sequence
    if degree == 1:
        return 0
    heads = attention_heads_of(load_model_config(config.model))
    if heads is None or heads.num_query_heads % degree == 0:
        return 0
    # Heads are distributed by `head_shares`, whose last share is rounded up.
    return degree - 1


def _rank_with_most_memory(config: RunConfig, world_size: int) -> int:
    """The rank whose step takes most memory: under ZeRO-1 and 2 the last one, else the busiest of those that share a row."""
    reduces_by_bucket = isinstance(config.strategy, ZeroConfig) and config.strategy.stage < 3
    if reduces_by_bucket:
        # The last rank's part of the gradients is reduced first, when everything else is still live. It is also the last of the
        # ranks that share a row, which has as many heads and tokens as any.
        return world_size - 1
    return busiest_rank(config)


def _with_full_trained_elements(parts: StepParts, full_pattern: BlockPattern | None) -> StepParts:
    """The parts of a shallow model's step with `full_trained_elements`: how many elements train in the full model.

    `full_pattern`: the blocks of the full model, whose kinds repeat after `period` blocks. Each period that the shallow model
    lacks trains as many elements as its last one. `parts` come back as they are if there is no `full_pattern`, if its blocks do
    not repeat, or if the shallow model has as many blocks.
    """
    module = parts.built.step_module
    blocks = repeated_blocks(module)
    if full_pattern is None or full_pattern.period is None or len(blocks) >= full_pattern.num_blocks:
        return parts
    period = full_pattern.period
    trained_in_period = sum(_num_trained_elements(block) for block in blocks[-period:])
    num_missing_blocks = full_pattern.num_blocks - len(blocks)
    full_trained = _num_trained_elements(module) + trained_in_period * num_missing_blocks // period
    return replace(parts, full_trained_elements=full_trained)


def _num_trained_elements(module: nn.Module) -> int:
    """Elements of the parameters of a module that train."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _parameter_counts(built: BuiltModel) -> ParameterCounts:
    """How many parameters a model has, and how many train. It must not be sharded yet, so that all have their full shapes."""
    module = built.step_module
    trained = sum(p.numel() for _, p in named_parameters(module) if p.requires_grad)
    trained_expert_parallel = 0
    for name in module.plan.expert_parallel_modules:
        for parameter in module.get_submodule(name).parameters(recurse=False):
            if parameter.requires_grad:
                trained_expert_parallel += parameter.numel()
    return ParameterCounts(sum(num_elements_by_name(module).values()), trained, trained_expert_parallel)


def num_vocabulary_rows(config: ModelConfig) -> int:
    """Rows of the model's vocabulary, before any is added."""
    return int(load_model_config(config).get_text_config().vocab_size)


@contextmanager
def _truncated_run(config: RunConfig, depth: int, num_blocks: int) -> Iterator[RunConfig]:
    """The run with a model of `depth` blocks of its `num_blocks`."""
    if depth == num_blocks:
        yield config
        return
    with TemporaryDirectory() as directory:
        yield replace(config, model=truncated_model(config.model, depth, Path(directory)))


def build_step_parts(config: RunConfig, lengths: list[int], runtime: Runtime, *, source: object = None) -> StepParts:
    """Everything that a rank's training step needs, as `simulate` takes it: model, optimizer factory and micro-batches.

    The model is on meta, without memory for its weights. All micro-batches have sequences of `lengths` tokens. `source`: where
    an engine reads weights from; None for a source of tensors without values.
    """
    precision = config.precision
    if precision is Precision.auto:
        precision = Precision.bf16 if runtime.kind == "cuda" else Precision.fp32
    tokenizer = NoTokenizer(config.model)
    weight_source = source or ShapesOnly()
    half_on_gpu = runtime.device == SIMULATED and precision is not Precision.fp32
    built = build_step_module(
        config.model,
        objective_config=config.objective,
        tuning_config=config.tuning,
        layout=step_layout(config),
        tokenizer=tokenizer,
        num_labels=objective_family(config.objective).num_outputs or 2,
        context=meta_context(),
        half_on_gpu=half_on_gpu,
    )
    built.step_module.plan.ema_decay = config.optim.ema_decay
    attach_reference_model(built, config.model, config.objective, config.tuning, weight_source, tokenizer)  # type: ignore[arg-type]
    attach_reward_models(built.step_module, config.objective, weight_source, half_on_gpu=half_on_gpu)
    tile_mlps_of_built_model(built, config)
    plan_expert_parallelism(built, config, runtime)
    names = [name for name, _ in named_parameters(built.step_module)]
    parts = StepParts(
        built=built,
        strategy=config.strategy,
        precision=precision,
        make_optimizer=partial(build_optimizer, config.optim, model_names=names, lr_factor=built.tuning.lr_factor),
        max_grad_norm=config.optim.max_grad_norm,
        micro_batches=[],
        weight_source=weight_source,
    )
    accumulation = accumulation_steps(config, runtime.world_size)
    micro_batch = _micro_batch_of(parts, lengths, accumulation * runtime.dp_size, runtime)
    return replace(parts, micro_batches=[micro_batch] * max(1, accumulation))


def _micro_batch_of(parts: StepParts, lengths: list[int], micro_batches: int, runtime: Runtime) -> dict[str, Any]:
    """A micro-batch of sequences of `lengths` tokens, cut to this rank's slice if ranks share a row.

    `micro_batches`: how many such micro-batches a step has, all ranks together; losses are divided by their tokens together.
    """
    batch = micro_batch_of(parts.built, lengths, sequence_cut(runtime))
    batch["totals"] = dict.fromkeys(batch["totals"], sum(lengths) * micro_batches)
    return batch
