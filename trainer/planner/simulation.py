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
from strategies.parameters import named_parameters, num_elements_by_name
from strategies.runtime import SIMULATED, Runtime
from strategies.sequence import with_sequence_parallelism
from strategies.simulation import simulated_rank
from strategies.zero_config import MAX_LIVE_PARAMETERS
from trainer.build.experts import plan_expert_parallelism
from trainer.build.parts import needs_one_row_batches, tile_mlps_of_built_model
from trainer.build.recomputation import placeholder_micro_batch
from trainer.build.references import attach_reference_model
from trainer.build.reward_models import attach_reward_models
from trainer.build.sequence import attention_heads_of, step_layout
from trainer.build.step_module import build_step_module
from trainer.config.parallel import ParallelConfig, accumulation_steps
from trainer.config.run import RunConfig
from trainer.data.batches.cutting import sequence_cut
from trainer.model.config import ModelConfig
from trainer.model.loading import load_model_config
from trainer.objectives.registry import data_spec_of, objective_family
from trainer.optim.build import build_optimizer
from trainer.planner.cost_model import CostModel, ParameterCounts
from trainer.planner.cost_model_fit import (
    SimulationOfSizes,
    SizesToSimulate,
    fit_cost_model,
    micro_batches_to_simulate,
    simulate_two_sizes,
)
from trainer.planner.depth_extrapolation import (
    DEFAULT_END_BLOCKS,
    ExtrapolatedStep,
    is_near_an_end,
    simulate_or_extrapolate_step,
)
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _RankOfJob:
    """The rank whose step is simulated, and the job that it is part of."""

    rank: int
    world_size: int
    local_world_size: int
    """Ranks of a host."""
    device: torch.device
    """SIMULATED for a GPU, or the CPU."""
    expert_imbalance: float
    """With `parallel.experts`: tokens that arrive at this rank's experts over the mean of its group."""

    @contextmanager
    def simulated(self, config: RunConfig) -> Iterator[Runtime]:
        """Let this process be that rank inside the context; yields its runtime, with the group of a row if ranks share rows."""
        with simulated_rank(
            self.rank,
            self.world_size,
            local_world_size=self.local_world_size,
            device=self.device,
            expert_imbalance=self.expert_imbalance,
        ) as runtime:
            yield with_sequence_parallelism(runtime, config.parallel.sequence)


def simulate_run(
    config: RunConfig,
    lengths: list[int],
    *,
    rank: int = 0,
    world_size: int = 1,
    local_world_size: int = 8,
    device: torch.device = SIMULATED,
    expert_imbalance: float = ASSUMED_IMBALANCE,
) -> SimulatedStep:
    """Simulate one training step of rank `rank` in the whole model, to learn its memory, FLOPs and communication without a GPU.

    The step is the run's own code on fake tensors, which have a shape and a device but no memory. Of `model.path` only the
    config.json is read.

    `lengths`: tokens of each sequence of a micro-batch; all micro-batches of the step are alike. `local_world_size`: ranks of a
    host. `device`: what the fake tensors claim to lie on; `SIMULATED` is a GPU. `expert_imbalance`: with `parallel.experts`,
    tokens that arrive at this rank's experts over the mean of its group.

    Raises ConfigError for what the run itself would refuse, RuntimeError in a process that is part of a job.
    """
    rank_of_job = _RankOfJob(
        rank=rank,
        world_size=world_size,
        local_world_size=local_world_size,
        device=device,
        expert_imbalance=expert_imbalance,
    )
    with rank_of_job.simulated(config) as runtime:
        return simulate(build_step_parts(config, lengths, runtime), runtime)


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
    """Estimate one training step of the whole model, quickly: simulate it in two models with few blocks, and extrapolate.

    Blocks of one kind cost the same, so the difference between the two models is what each further group of blocks costs. The
    first and the last blocks of a model (its ends) may take other memory than those between: both shallow models have them all.
    Encoder-decoder models, and those whose kinds of blocks do not repeat, are simulated as a whole.

    `lengths`: tokens of each sequence of a micro-batch. `rank`: the rank to simulate; None for the one with most attention
    heads (`rank_with_most_attention_heads`). `exact`: simulate the whole model. `device`: what tensors claim to lie on;
    `SIMULATED` is a GPU. `expert_imbalance`: with `parallel.experts`, tokens that arrive at the rank's experts over the mean
    of its group.
    """
    # Its period is the number of blocks after which their kinds repeat; None if they do not.
    pattern = block_pattern(config.model)
    rank_of_job = _RankOfJob(
        rank=rank_with_most_attention_heads(config) if rank is None else rank,
        world_size=world_size,
        local_world_size=local_world_size,
        device=device,
        expert_imbalance=expert_imbalance,
    )
    exact = exact or pattern.period is None
    return simulate_or_extrapolate_step(
        partial(_simulate_first_blocks, config, lengths, pattern, rank_of_job),
        pattern.num_blocks,
        pattern.period or 1,
        num_end_blocks=DEFAULT_END_BLOCKS if exact else num_end_blocks_of(config),
        ends_may_overlap=may_ends_overlap(config),
        exact=exact,
    )


def _simulate_first_blocks(
    config: RunConfig, lengths: list[int], pattern: BlockPattern, rank: _RankOfJob, depth: int
) -> SimulatedStep:
    """Simulate a step of the model's first `depth` blocks, one of the two to extrapolate. `pattern`: the whole model's blocks."""
    with _truncated_run(config, depth, pattern.num_blocks) as truncated, rank.simulated(config) as runtime:
        parts = build_step_parts(truncated, lengths, runtime)
        return simulate(_with_full_trained_elements(parts, pattern), runtime)


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
    """Simulate the run so that a plan can try micro-batches: gives one rank's memory and work at any size of micro-batch.

    Two sizes are simulated, each in two models of few blocks: four steps, from which every other size and depth is extrapolated.
    The rank is the one that needs most memory.

    `length`: tokens of each sequence. `accumulation`: micro-batches of a simulated step. `exact`: simulate the whole model.
    `device`: what tensors claim to lie on; `SIMULATED` is a GPU. `expert_imbalance`: with `parallel.experts`, tokens that arrive
    at the rank's experts over the mean of its group.

    Raises ConfigError for what the run itself would refuse, RuntimeError in a process that is part of a job.
    """
    pattern = block_pattern(config.model)
    period = None if exact else pattern.period
    num_end_blocks = num_end_blocks_of(config) if period else DEFAULT_END_BLOCKS
    simulator = _SizesSimulator(
        config=config,
        length=length,
        accumulation=accumulation,
        rank=_RankOfJob(
            rank=_rank_with_most_memory(config, world_size),
            world_size=world_size,
            local_world_size=local_world_size,
            device=device,
            expert_imbalance=expert_imbalance,
        ),
        pattern=pattern,
        num_end_blocks=num_end_blocks,
    )
    return fit_cost_model(
        simulator.simulate_model_of,
        pattern.num_blocks,
        period=period,
        accumulation=accumulation,
        local_world_size=local_world_size,
        num_end_blocks=num_end_blocks,
        ends_may_overlap=may_ends_overlap(config),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _SizesSimulator:
    """Simulates steps of two sizes of micro-batch in the run's model with fewer blocks; see `simulate_cost_model_of_run`."""

    config: RunConfig
    length: int
    """Tokens of each sequence."""
    accumulation: int
    """Micro-batches of a step."""
    rank: _RankOfJob
    pattern: BlockPattern
    """How the kinds of the whole model's blocks repeat."""
    num_end_blocks: int
    """Blocks at either end of a model that may take other memory than those between."""

    def simulate_model_of(self, depth: int, expected_peaks: dict[StepPhase, int] | None) -> SimulationOfSizes:
        """Simulate a step of either size of micro-batch in the model with its first `depth` blocks, for `fit_cost_model`.

        `expected_peaks`: by phase of a step (such as the forward pass of block 3), after which operation its memory was
        highest in a shallower model. There it is counted by kind. None if nothing is known yet.
        """
        # 2 for an objective that compares two answers to a prompt, else 1.
        sequences_per_document = data_spec_of(self.config.objective).sequences_per_document
        with (
            self.rank.simulated(self.config) as runtime,
            _truncated_run(self.config, depth, self.pattern.num_blocks) as truncated,
        ):
            # One document in a micro-batch for now: the real micro-batches depend on the layout of the built model.
            parts = build_step_parts(truncated, [self.length] * sequences_per_document, runtime)
            parts = _with_full_trained_elements(parts, self.pattern)
            parameter_counts = _count_parameters(parts.built)  # before the engine shards them
            micro_batches = self._micro_batches_to_simulate(parts, runtime)
            small, large = simulate_two_sizes(
                parts,
                (
                    self._batches_of_step(parts, micro_batches.small_lengths, runtime),
                    self._batches_of_step(parts, micro_batches.large_lengths, runtime),
                ),
                runtime,
                expected_peaks,
                # Only phases of blocks near an end are extrapolated, so only their peaks must be counted exactly.
                is_needed=partial(is_near_an_end, num_blocks=depth, num_end_blocks=self.num_end_blocks),
            )
            return SimulationOfSizes(
                small=small,
                large=large,
                sizes=micro_batches.sizes(sequences_per_document),
                size_is_in_rows=micro_batches.size_is_in_rows,
                parameter_counts=parameter_counts,
                num_vocabulary_rows=vocabulary_rows_of(self.config.model),
                layout=str(parts.built.layout),
                notes=_notes_for_plan(parts.built),
                needs_single_rows=needs_one_row_batches(parts.built, self.config.objective),
            )

    def _micro_batches_to_simulate(self, parts: StepParts, runtime: Runtime) -> SizesToSimulate:
        """Choose the two sizes of micro-batch to simulate for the built model, each as the lengths of its sequences."""
        return micro_batches_to_simulate(
            parts.built,
            vocabulary_rows_of(self.config.model),
            self.length,
            is_linear=parts.precision is not Precision.fp32,  # attention in fp32 keeps its scores, length x length
            ranks_per_row=runtime.sequence_size,
            in_tiles=self.config.strategy.mlp_tokens is not None,
        )

    def _batches_of_step(self, parts: StepParts, lengths: list[int], runtime: Runtime) -> list[dict[str, Any]]:
        """The equal micro-batches of a step of this rank, each with sequences of `lengths` tokens."""
        num_micro_batches_of_all_ranks = self.accumulation * runtime.dp_size
        return [_micro_batch_of(parts, lengths, num_micro_batches_of_all_ranks, runtime)] * self.accumulation


def _notes_for_plan(built: BuiltModel) -> tuple[str, ...]:
    """What was chosen while the model was built, as lines such as `data.layout: padded, ...`.

    Without the note on attention kernels: they were chosen for this machine, not for the GPU of the plan.
    """
    return tuple(f"{key}: {note}" for key, note in built.substitutions.items() if key != "model.attention")


def num_end_blocks_of(config: RunConfig) -> int:
    """How many blocks at either end of a model take other memory than those between, so that a shallow model must have them all.

    Blocks near an end have fewer neighbours whose weights are gathered at the same time: two as a rule. There are more such
    blocks if the first ones are of a kind of their own (the dense first layers of a mixture of experts), and under ZeRO-3, which
    keeps further blocks gathered. To learn how large these are, a model of few blocks is built on meta.
    """
    pattern = block_pattern(config.model)
    num_end_blocks = DEFAULT_END_BLOCKS + pattern.num_leading_blocks
    if not isinstance(config.strategy, ZeroConfig) or config.strategy.stage < 3:
        return num_end_blocks
    with TemporaryDirectory() as directory, simulated_rank(rank=0, world_size=1) as runtime:
        # All kinds of blocks: the leading ones, and one period, the number of blocks after which their kinds repeat.
        depth = pattern.num_leading_blocks + (pattern.period or 1)
        # One rank suffices to build the blocks, whose sizes do not depend on how rows are shared.
        truncated = replace(
            config, model=truncated_model(config.model, depth, Path(directory)), parallel=ParallelConfig(sequence=1)
        )
        blocks = repeated_blocks(build_step_parts(truncated, lengths=[1], runtime=runtime).built.step_module)
    # ZeRO-3 keeps up to MAX_LIVE_PARAMETERS elements gathered: as many blocks as hold these.
    elements_per_block = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    smallest = min(elements_per_block, default=1)
    return max(num_end_blocks, MAX_LIVE_PARAMETERS // smallest + 1)


def may_ends_overlap(config: RunConfig) -> bool:
    """Whether a shallow model may have so few blocks that one belongs to both of its ends, which saves time to simulate.

    An end is the first or the last blocks, which may take other memory than those between (`num_end_blocks_of`). They must
    not overlap if several blocks fill a gradient bucket together (ZeRO-2 and 3), nor if the first blocks are of a kind of their
    own (dense layers before those with experts).
    """
    if block_pattern(config.model).num_leading_blocks:
        return False
    return not isinstance(config.strategy, ZeroConfig) or config.strategy.stage < 2


def rank_with_most_attention_heads(config: RunConfig) -> int:
    """Which rank's training step the memory simulation should run: one with as many attention heads as any rank.

    With sequence parallelism (`parallel.sequence` = n > 1), n ranks share each row of the batch, and in attention each computes
    some of the heads. If n does not divide the number of heads, some ranks have one more, and need more memory.

    Returns 0 if ranks do not share rows, have equally many heads, or the model's configuration states no heads. Otherwise n - 1,
    the last of the n ranks that share the first row.
    """
    num_ranks = config.parallel.sequence  # that share a row, not those of the job
    if num_ranks == 1:
        return 0
    heads = attention_heads_of(load_model_config(config.model))  # None for a model without attention heads
    if heads is None or heads.num_query_heads % num_ranks == 0:
        return 0
    # `head_shares` rounds the bounds between ranks down, so that the last rank has one head more: 9 heads are 2, 2, 2 and 3.
    return num_ranks - 1


def _rank_with_most_memory(config: RunConfig, world_size: int) -> int:
    """The rank whose step takes most memory, so that it decides what fits."""
    if isinstance(config.strategy, ZeroConfig) and config.strategy.stage < 3:
        # The last rank's part of the gradients is reduced first, when everything else is still live. It is also the last of the
        # ranks that share a row, which has as many heads and tokens as any.
        return world_size - 1
    return rank_with_most_attention_heads(config)


def _with_full_trained_elements(parts: StepParts, full_pattern: BlockPattern) -> StepParts:
    """Tell the simulation of a shallow model how many elements train in the full model that it stands for.

    DeepSpeed collects gradients in buckets of a fixed size, so a bucket of the full model may be fuller than a shallow model's
    own gradients could make it. `full_pattern`: the blocks of the full model, whose kinds repeat after `period` blocks. Each
    period that the shallow model lacks trains as many elements as its last one.

    Returns `parts` with `full_trained_elements` set; as they are if the blocks do not repeat, or none is lacking.
    """
    module = parts.built.step_module
    blocks = repeated_blocks(module)
    if full_pattern.period is None or len(blocks) >= full_pattern.num_blocks:
        return parts
    period = full_pattern.period
    trained_in_period = sum(_num_trained_elements(block) for block in blocks[-period:])
    num_missing_blocks = full_pattern.num_blocks - len(blocks)
    full_trained = _num_trained_elements(module) + trained_in_period * num_missing_blocks // period
    return replace(parts, full_trained_elements=full_trained)


def _num_trained_elements(module: nn.Module) -> int:
    """Elements of the parameters of a module that train."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _count_parameters(built: BuiltModel) -> ParameterCounts:
    """Count the parameters of a model for a plan: all, those that train, and the trained ones in experts that ranks distribute.

    The model must not be sharded yet, so that all parameters have their full shapes.
    """
    module = built.step_module
    num_trained_expert_parallel = 0
    for name in module.plan.expert_parallel_modules:
        for parameter in module.get_submodule(name).parameters(recurse=False):
            if parameter.requires_grad:
                num_trained_expert_parallel += parameter.numel()
    return ParameterCounts(
        # By the run's helper, since a quantised weight packs several elements in a byte and `numel()` would count bytes.
        num_parameters=sum(num_elements_by_name(module).values()),
        num_trained=sum(p.numel() for _, p in named_parameters(module) if p.requires_grad),
        num_trained_expert_parallel=num_trained_expert_parallel,
    )


def vocabulary_rows_of(config: ModelConfig) -> int:
    """Rows of the model's vocabulary, before any is added."""
    return int(load_model_config(config).get_text_config().vocab_size)


@contextmanager
def _truncated_run(config: RunConfig, depth: int, num_blocks: int) -> Iterator[RunConfig]:
    """A context with the run whose model has only the first `depth` of its `num_blocks` blocks."""
    if depth == num_blocks:
        yield config
        return
    with TemporaryDirectory() as directory:
        yield replace(config, model=truncated_model(config.model, depth, Path(directory)))


def build_step_parts(config: RunConfig, lengths: list[int], runtime: Runtime, *, source: object = None) -> StepParts:
    """Build all that a simulated training step of one rank needs: the model, a factory of its optimizer, and micro-batches.

    The model is on meta, without memory for its weights. `lengths`: tokens of each sequence of a micro-batch; all micro-batches
    are alike. `runtime`: the rank, real or simulated. `source`: a `ParameterSource`, from which an engine reads weights; None for
    one of tensors without values.
    """
    precision = config.precision
    # As a run chooses it, except that a GPU is taken to have bf16.
    if precision is Precision.auto:
        precision = Precision.bf16 if runtime.kind == "cuda" else Precision.fp32
    weight_source = source or ShapesOnly()
    built = _build_model_on_meta(config, runtime, precision, weight_source)
    names = [name for name, _ in named_parameters(built.step_module)]
    parts = StepParts(
        built=built,
        strategy=config.strategy,
        precision=precision,
        # An engine builds the optimizer when it has sharded the parameters.
        make_optimizer=partial(build_optimizer, config.optim, model_names=names, lr_factor=built.tuning.lr_factor),
        max_grad_norm=config.optim.max_grad_norm,
        micro_batches=[],  # filled below: a micro-batch is made by the built model's rules
        weight_source=weight_source,
    )
    accumulation = accumulation_steps(config, runtime.world_size)
    # `dp_size`: ranks that read different documents, each with `accumulation` micro-batches.
    micro_batch = _micro_batch_of(parts, lengths, accumulation * runtime.dp_size, runtime)
    return replace(parts, micro_batches=[micro_batch] * max(1, accumulation))


def _build_model_on_meta(config: RunConfig, runtime: Runtime, precision: Precision, weight_source: Any) -> BuiltModel:
    """Build the run's model, tuned but not sharded, with all that its step computes beside it: reference, teacher, rewards.

    Its weights are on meta, where they have no memory. `weight_source`: the `ParameterSource` from which frozen models, such as
    a teacher, will read theirs.
    """
    # No tokenizer is loaded: only its number of tokens counts, which decides the rows of the embedding.
    tokenizer = NoTokenizer(config.model)
    half_on_gpu = runtime.device == SIMULATED and precision is not Precision.fp32  # weights in half precision, on a GPU
    built = build_step_module(
        config.model,
        objective_config=config.objective,
        tuning_config=config.tuning,
        layout=step_layout(config),
        tokenizer=tokenizer,
        num_labels=objective_family(config.objective).num_outputs or 2,  # labels are counted in the data: the fewest
        half_on_gpu=half_on_gpu,
    )
    built.step_module.plan.ema_decay = config.optim.ema_decay
    attach_reference_model(built, config.model, config.objective, config.tuning, weight_source, tokenizer)
    attach_reward_models(built.step_module, config.objective, weight_source, half_on_gpu=half_on_gpu)
    tile_mlps_of_built_model(built, config)
    plan_expert_parallelism(built, config, runtime)
    return built


def _micro_batch_of(
    parts: StepParts, lengths: list[int], num_micro_batches_of_all_ranks: int, runtime: Runtime
) -> dict[str, Any]:
    """Make a micro-batch of placeholder tokens, with sequences of `lengths` tokens, for the simulated step to compute.

    If ranks share a row (`parallel.sequence`), it is cut to this rank's slice. `num_micro_batches_of_all_ranks`: how many of them
    a step has, since losses are divided by the tokens of the whole step.
    """
    batch = placeholder_micro_batch(parts.built, lengths, sequence_cut(runtime))
    # "totals": for each term of the loss, what its sum is divided by.
    batch["totals"] = dict.fromkeys(batch["totals"], sum(lengths) * num_micro_batches_of_all_ranks)
    return batch
