"""Plans a run before it starts: memory, time and price of each way to run it, by simulating its step.

A way is a strategy with its recomputation, offloading and the storage type of its base. Each is simulated once
(`trainer/planner/simulation.py`), in processes of their own, and answers for every micro-batch
(`trainer/planner/cost_model.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from strategies.base import ActivationCheckpointing, Fsdp2Config, Precision, StrategyConfig, ZeroConfig
from strategies.errors import ConfigError
from strategies.expert_counts import ASSUMED_IMBALANCE
from strategies.mesh import replica_count
from strategies.registry import every_strategy
from trainer.build.sequence import sequence_problems
from trainer.config.parallel import dp_size_of
from trainer.config.run import RunConfig
from trainer.config.validate import config_problems
from trainer.model.config import ModelKind as ModelKind
from trainer.model.config import Quantisation
from trainer.objectives.registry import objective_family
from trainer.planner.cost_model import CostModel, MemoryPeak
from trainer.planner.dealt_experts import with_expert_parallelism
from trainer.planner.deferred_reduction import deferred_gradient_bytes, with_deferred_reduction
from trainer.planner.hardware import (
    Card,
    MemoryFit,
    available_input_bytes,
    available_tensor_bytes,
    card_memory_fit,
    needed_host_gib,
)
from trainer.planner.lengths import MAX_MICRO_BATCH, DocumentLengths, micro_batch_divisors
from trainer.planner.peer_memory import (
    LOSS_BYTES_PER_LOGIT,
    PeerMemory,
    PeerSetting,
    ShardCounts,
    estimate_peer_memory,
    peer_setting_problems,
)
from trainer.planner.round_time import GeneratorSizes, RoundLoad, RoundTime, budget_hours, estimate_round_time
from trainer.planner.speed import MicroBatchLoad, StepTime, estimate_step_time
from trainer.tuning.base import TuningName

RECOMPUTATION_MODES = (ActivationCheckpointing.none, ActivationCheckpointing.selective, ActivationCheckpointing.full)
RUN_ONLY_PROBLEMS = ("budget: not set", "data.path: not set", "run.device=cuda: no CUDA device")
"""Problems that keep a run from starting, but not a plan: how they begin."""


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """Settings of a plan."""

    exact: bool = False
    """Simulate the whole model instead of two shallow copies. The answer is the same, and slower for deep models."""
    offload: bool = False
    """Also plan with the optimizer state (zero) or the parameters (fsdp2, hsdp) in host memory."""
    quantisation: list[Quantisation] = field(default_factory=list)
    """More ways to store a frozen base, such as [none,nf4]. Empty: only `model.quantisation`."""
    theirs: list[PeerSetting] = field(default_factory=list)
    """What another trainer keeps in memory during a step, such as [stock_loss,pure_bf16]. The plan shows it beside
    shardtune's."""
    expert_imbalance: float | None = None
    """Load of the busiest rank, with `parallel.experts`: tokens that it receives over the mean of its group. null: as measured
    by the run of `from=`, else 2."""
    workers: int = 0
    """Number of processes that simulate. 0: one for each core that the job may use."""


@dataclass(frozen=True, slots=True)
class RunVariant:
    """One way to run: a strategy with its recomputation, offloading and storage of the base."""

    config: RunConfig
    overrides: tuple[str, ...]
    """The settings to add to the command line for it, such as `strategy=fsdp2`."""
    offloads_to_host: bool = False

    @property
    def name(self) -> str:
        """The name of its strategy."""
        return str(self.config.strategy.name)


@dataclass(frozen=True, slots=True)
class PlannedChoice:
    """A variant with a micro-batch, and what it takes."""

    variant: RunVariant
    overrides: tuple[str, ...]
    micro_batch: int
    accumulation: int
    largest_micro_batch: int
    """The largest micro-batch that fits; 0 if none does."""
    memory_peak: MemoryPeak
    memory_fit: MemoryFit
    step_time: StepTime
    tokens_per_s: float
    """Of all ranks."""
    needed_host_gib: float
    """Of one node."""
    node_memory_gib: float | None
    """Memory of a node; None if it is not known."""
    budget_hours: float | None
    """For the budget."""
    budget_dollars: float | None
    """US dollars for the budget, all cards."""
    defers_reduction: bool | None = None
    """Whether gradients are reduced only in the last micro-batch; None if the plan did not choose it."""
    round_time: RoundTime | None = None
    """Seconds of a round, if the model writes what it learns from."""
    peer_memory: PeerMemory | None = None
    """The memory of the same step in another trainer, if `plan.theirs` asks for it."""

    @property
    def fits(self) -> bool:
        """Whether the card holds it, and the host what waits there."""
        return self.memory_fit.margin_bytes >= 0 and self.fits_host

    @property
    def fits_host(self) -> bool:
        """Whether a node's memory is enough, as far as it is known."""
        return self.node_memory_gib is None or self.needed_host_gib <= self.node_memory_gib


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """The job that a plan is for: its ranks, and the lengths of its documents."""

    card: Card
    precision: Precision
    num_nodes: int
    ranks_per_node: int
    global_batch: int
    document_lengths: DocumentLengths
    node_memory_gib: float | None = None
    """Memory of a node in GiB; None if it is not known."""
    expert_imbalance: float = ASSUMED_IMBALANCE
    """With `parallel.experts`: rows that arrive at the busiest rank over the mean of its group."""
    imbalance_measured_over: int | None = None
    """Ranks of a group in the run that measured the imbalance; None if it was set or assumed, and so holds for any group."""
    round_load: RoundLoad | None = None
    """What a round asks for, if the model writes what it learns from."""

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.num_nodes * self.ranks_per_node

    def imbalance_over(self, expert_ranks: int) -> float:
        """Rows that arrive at the busiest of `expert_ranks` ranks, divided by the mean over the ranks.

        If the imbalance was measured over at least as many ranks, it is an upper bound: with fewer ranks, each holds more
        experts, whose loads even out. With more ranks than measured, the imbalance may be larger, so at least the assumed one
        is taken.
        """
        is_upper_bound = self.imbalance_measured_over is None or expert_ranks <= self.imbalance_measured_over
        if is_upper_bound:
            return self.expert_imbalance
        return max(self.expert_imbalance, ASSUMED_IMBALANCE)


@dataclass(frozen=True, slots=True)
class MeasuredImbalance:
    """How unevenly the routers of a run chose among the ranks of an expert group."""

    busiest_over_mean: float
    """Tokens of the busiest rank of a group over the mean, in the least even layer."""
    expert_ranks: int
    """Ranks of a group (`parallel.experts`)."""


def with_imbalance(job: PlannedJob, settings: PlanConfig, measured: MeasuredImbalance | None) -> PlannedJob:
    """`job` with the imbalance of its experts: as set in the plan's settings, else as a run measured it, else the assumed one."""
    if settings.expert_imbalance is not None:
        return replace(job, expert_imbalance=settings.expert_imbalance)
    if measured is None:
        return job
    return replace(job, expert_imbalance=measured.busiest_over_mean, imbalance_measured_over=measured.expert_ranks)


def run_variants(
    config: RunConfig, settings: PlanConfig, cli_keys: set[str], world_size: int | None
) -> tuple[list[RunVariant], list[tuple[RunVariant, str]]]:
    """The variants of a run that a plan compares: all combinations of strategy, recomputation and so on that the user left open.

    `cli_keys`: keys of settings on the command line, which stay. `world_size`: ranks of the run; None if not known. Returns
    (variants to simulate, variants that are ruled out and why). Raises ConfigError with the problems that every variant has, or
    if no variant is left.
    """
    variants = list(_all_variants(config, settings, cli_keys))
    if "parallel.experts" not in cli_keys and world_size is not None:
        variants += _with_expert_parallelism(variants, world_size)

    # Problems of every variant are problems of the run itself.
    problems_by_variant = [_plan_problems(variant.config, world_size) for variant in variants]
    common_problems = _peer_problems(config, settings.theirs)
    for problem in problems_by_variant[0]:
        if all(problem in problems for problems in problems_by_variant):
            common_problems.append(problem)
    if common_problems:
        raise ConfigError(common_problems)

    possible = []
    refused = []
    for variant, problems in zip(variants, problems_by_variant, strict=True):
        if problems:
            refused.append((variant, problems[0]))
        else:
            possible.append(variant)
    if not possible:
        raise ConfigError([f"{' '.join(variant.overrides)}: {problem}" for variant, problem in refused])
    return possible, refused


def _with_expert_parallelism(variants: list[RunVariant], world_size: int) -> list[RunVariant]:
    """Further variants: each of `variants` with each degree of expert parallelism (ranks that share a layer's experts).

    Those that cannot run are left out without a reason, since nobody asked for them.
    """
    expert_parallel_variants = []
    configs_by_variant = with_expert_parallelism([variant.config for variant in variants], world_size)
    for variant, expert_parallel_configs in zip(variants, configs_by_variant, strict=True):
        for config in expert_parallel_configs:
            if not _plan_problems(config, world_size):
                overrides = (*variant.overrides, f"parallel.experts={config.parallel.experts}")
                expert_parallel_variants.append(replace(variant, config=config, overrides=overrides))
    return expert_parallel_variants


FURTHER_SEQUENCE_DEGREES = (2, 4, 8)
"""Numbers of ranks that a plan lets share a row, if nothing fits otherwise."""
FURTHER_LONG_ROW_SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"mlp_tokens": 8192},
    {"mlp_tokens": 8192, "offload_activations": True},
)
"""Settings of `strategy` for long rows that a plan tries beside, one after the other until something fits."""


def further_variants(
    config: RunConfig, settings: PlanConfig, cli_keys: set[str], world_size: int, long_rows: dict[str, Any]
) -> tuple[list[RunVariant], list[tuple[RunVariant, str]]]:
    """Variants for a run of which nothing fits: several ranks share each row, and the strategy gets settings for long rows.

    `long_rows`: one of `FURTHER_LONG_ROW_SETTINGS`. `cli_keys`: keys of settings on the command line. Returns (variants to
    simulate, variants that are ruled out and why). All blocks are recomputed, unless the command line sets the recomputation. No
    variants if ranks share rows already, or if the command line sets `parallel.sequence` or a setting of `long_rows`.
    """
    shares_rows = config.parallel.sequence > 1 or "parallel.sequence" in cli_keys
    if shares_rows or any(f"strategy.{key}" in cli_keys for key in long_rows):
        return [], []
    strategy = replace(config.strategy, **long_rows)
    if "strategy.activation_checkpointing" not in cli_keys:
        strategy = replace(strategy, activation_checkpointing=ActivationCheckpointing.full)
    overrides = [f"strategy.{key}={str(value).lower()}" for key, value in long_rows.items()]
    possible = []
    refused = []
    for degree in FURTHER_SEQUENCE_DEGREES:
        if world_size % degree:
            continue
        sharing_config = replace(config, strategy=strategy, parallel=replace(config.parallel, sequence=degree))
        model_problems = sequence_problems(sharing_config)
        fixed_keys = cli_keys | {"strategy.activation_checkpointing"}
        for base_variant in _all_variants(sharing_config, settings, fixed_keys):
            variant = replace(
                base_variant, overrides=(*base_variant.overrides, f"parallel.sequence={degree}", *overrides)
            )
            problems = [*_plan_problems(variant.config, world_size), *model_problems]
            if problems:
                refused.append((variant, problems[0]))
            else:
                possible.append(variant)
    return possible, refused


def _plan_problems(config: RunConfig, world_size: int | None) -> list[str]:
    """The problems of a run that rule it out in a plan as well; those that only keep it from starting here are left out."""
    return [
        problem
        for problem in config_problems(config, world_size=world_size)
        if not problem.startswith(RUN_ONLY_PROBLEMS)
    ]


def _all_variants(config: RunConfig, settings: PlanConfig, cli_keys: set[str]) -> Iterator[RunVariant]:
    """Each combination of strategy, base quantisation, recomputation and offload that the user left open.

    `cli_keys`: keys of settings on the command line. A strategy that cannot offload has no variant that does.
    """
    requested_mode = config.strategy.activation_checkpointing
    mode_is_open = requested_mode is ActivationCheckpointing.auto or "strategy.activation_checkpointing" not in cli_keys
    modes = RECOMPUTATION_MODES if mode_is_open else (requested_mode,)
    quantisations = settings.quantisation or [config.model.quantisation]
    offloads = (False, True) if settings.offload else (False,)
    # The strategy on the command line, or else all strategies with the settings that they have in common.
    strategies = [config.strategy] if "strategy" in cli_keys else every_strategy(config.strategy)
    for strategy, quantisation, mode, offload in product(strategies, quantisations, modes, offloads):
        overrides = [f"strategy={strategy.name}", f"strategy.activation_checkpointing={mode}"]
        variant_strategy = _with_offload(strategy) if offload else strategy
        if variant_strategy is None:
            continue
        if offload:
            overrides.append(
                "strategy.offload_optimizer=cpu" if isinstance(strategy, ZeroConfig) else "strategy.cpu_offload=true"
            )
        if settings.quantisation:
            overrides.append(f"model.quantisation={quantisation}")
        variant_config = replace(
            config,
            strategy=replace(variant_strategy, activation_checkpointing=mode),
            model=replace(config.model, quantisation=quantisation),
        )
        yield RunVariant(variant_config, tuple(overrides), offload)


def _with_offload(strategy: StrategyConfig) -> StrategyConfig | None:
    """The strategy with its state in host memory; None if it cannot offload."""
    if isinstance(strategy, Fsdp2Config):
        return replace(strategy, cpu_offload=True)
    if isinstance(strategy, ZeroConfig):
        return replace(strategy, offload_optimizer="cpu")
    return None


def micro_batches(job: PlannedJob, given: int | None, sequence: int = 1) -> list[int]:
    """Micro-batches to plan for: the `given` one, or all that divide a reader's part of the global batch.

    A reader is a rank, or the `sequence` ranks that share a row and so read the same samples. The list is empty if the global
    batch does not divide evenly, or if `given` does not divide a reader's part.
    """
    samples_per_reader, remainder = divmod(job.global_batch, job.world_size // sequence)
    if remainder:
        return []
    if given is None:
        return micro_batch_divisors(samples_per_reader)
    return [given] if samples_per_reader % given == 0 else []


def order_choices(
    variant: RunVariant,
    cost_model: CostModel,
    job: PlannedJob,
    micros: list[int],
    peer_settings: Sequence[PeerSetting] = (),
) -> list[PlannedChoice]:
    """The variant with each micro-batch of `micros`: those that fit, the fastest first; then those that do not, smallest first.

    `peer_settings`: what another trainer does differently (`plan.theirs`), if its memory is to be computed as well.
    """
    choices = []
    for micro in micros:
        choice = plan_choice(variant, cost_model, job, micro)
        if peer_settings:
            choice = replace(choice, peer_memory=peer_memory_of_choice(choice, cost_model, job, peer_settings))
        choices.append(choice)
    fitting = sorted((choice for choice in choices if choice.fits), key=lambda choice: -choice.tokens_per_s)
    too_large = sorted((choice for choice in choices if not choice.fits), key=lambda choice: choice.micro_batch)
    return [*fitting, *too_large]


def plan_choice(variant: RunVariant, cost_model: CostModel, job: PlannedJob, micro: int) -> PlannedChoice:
    """The cost of a variant with `micro` documents per forward pass: memory and seconds of a step, hours and price of the run.

    Under FSDP2 it also decides whether gradients are reduced only in the last micro-batch, if the run leaves that open.
    """
    card = job.card
    strategy = variant.config.strategy
    accumulation = job.global_batch // (dp_size_of(variant.config, job.world_size) * micro)
    units = float(micro) if cost_model.units_are_rows else job.document_lengths.num_tokens_of_longest(micro)
    overrides = [*variant.overrides, f"batch.global={job.global_batch}", f"batch.micro={micro}"]
    # Memory, by the longest documents.
    peak = cost_model.memory_peak_at(units)
    defers = None
    if accumulation > 1 and isinstance(strategy, Fsdp2Config) and strategy.defer_sync is None:
        # Reduce gradients only in the last micro-batch if full ones fit. The run itself would decide by an estimate; the plan has
        # simulated it, so its choice is added to the command line.
        shards = job.world_size // replica_count(strategy, job.world_size, job.num_nodes)
        waiting = deferred_gradient_bytes(cost_model, shards, variant.config.parallel.experts)
        deferred_model = with_deferred_reduction(cost_model, waiting)
        deferred_peak = deferred_model.memory_peak_at(units)
        defers = card_memory_fit(deferred_model, deferred_peak, card).margin_bytes >= 0
        if defers:
            cost_model = deferred_model
            peak = deferred_peak
        overrides.append(f"strategy.defer_sync={str(defers).lower()}")
    # Time, by documents of average length.
    load = _average_load(cost_model, job, micro, accumulation)
    step = estimate_step_time(cost_model, load, card, job.precision, ranks_per_node=job.ranks_per_node)
    tokens = job.document_lengths.mean * job.global_batch
    seconds_of_round = _round_time(variant.config, cost_model, job, step)
    step_s = step.total_s if seconds_of_round is None else seconds_of_round.seconds_per_step
    hours = budget_hours(variant.config, job.document_lengths.units_per_epoch, step_s, tokens)
    price = None
    if hours is not None and card.price_per_hour is not None:
        price = hours * job.world_size * card.price_per_hour
    return PlannedChoice(
        variant=variant,
        overrides=tuple(overrides),
        micro_batch=micro,
        accumulation=accumulation,
        largest_micro_batch=_largest_micro(cost_model, job),
        memory_peak=peak,
        memory_fit=card_memory_fit(cost_model, peak, card),
        step_time=step,
        tokens_per_s=tokens / step.total_s,
        needed_host_gib=needed_host_gib(cost_model, job.ranks_per_node, units),
        node_memory_gib=job.node_memory_gib,
        budget_hours=hours,
        budget_dollars=price,
        round_time=seconds_of_round,
        defers_reduction=defers,
    )


def _round_time(config: RunConfig, cost_model: CostModel, job: PlannedJob, step: StepTime) -> RoundTime | None:
    """Seconds of a round, in which the model writes answers and learns from them; None for objectives without rounds."""
    if job.round_load is None:
        return None
    model = GeneratorSizes(
        cost_model.num_parameters,
        cost_model.num_blocks,
        cost_model.num_vocabulary_rows,
        weight_itemsize=4 if job.precision is Precision.fp32 else 2,
    )
    return estimate_round_time(
        job.round_load,
        model,
        replace(config, precision=job.precision),
        job.card,
        ranks=job.world_size,
        nodes=job.num_nodes,
        step_s=step.total_s,
        other_bytes=sum(cost_model.resting_bytes_by_kind.values()),
    )


def peer_memory_of_choice(
    choice: PlannedChoice, cost_model: CostModel, job: PlannedJob, peer_settings: Sequence[PeerSetting]
) -> PeerMemory:
    """What a rank of another trainer would hold in the step of `choice`, if it shards weights, gradients and moments alike."""
    if cost_model.units_are_rows:
        units = float(choice.micro_batch)
        tokens = choice.micro_batch * float(job.document_lengths.longest[0])
    else:
        units = tokens = job.document_lengths.num_tokens_of_longest(choice.micro_batch)
    strategy = choice.variant.config.strategy
    shard_counts = ShardCounts()
    if isinstance(strategy, Fsdp2Config):
        shards = job.world_size // replica_count(strategy, job.world_size, job.num_nodes)
        shard_counts = ShardCounts(weights=shards, gradients=shards, moments=shards)
    elif isinstance(strategy, ZeroConfig):
        shard_counts = ShardCounts(
            weights=job.world_size if strategy.stage >= 3 else 1,
            gradients=job.world_size if strategy.stage >= 2 else 1,
            moments=job.world_size if strategy.stage >= 1 else 1,
        )
    return estimate_peer_memory(cost_model, units, tokens * cost_model.num_vocabulary_rows, peer_settings, shard_counts)


def _peer_problems(config: RunConfig, peer_settings: Sequence[PeerSetting]) -> list[str]:
    """Sentences that say why `plan.theirs` does not go with this run; empty if it does."""
    problems = peer_setting_problems(peer_settings, full_tuning=config.tuning.name is TuningName.full)
    losses = [setting for setting in peer_settings if setting in LOSS_BYTES_PER_LOGIT]
    if losses and objective_family(config.objective).kind is ModelKind.classifier:
        problems.append(
            f"plan.theirs=[{','.join(losses)}]: is of a loss over words; objective={config.objective.name} has none"
        )
    return problems


def _average_load(cost_model: CostModel, job: PlannedJob, micro: int, accumulation: int) -> MicroBatchLoad:
    """The size of a micro-batch of `micro` documents of average length, and how many of them a step has (`accumulation`)."""
    units = float(micro) if cost_model.units_are_rows else micro * job.document_lengths.mean
    return MicroBatchLoad(units, micro * job.document_lengths.mean_square, accumulation)


def _largest_micro(cost_model: CostModel, job: PlannedJob) -> int:
    """The most documents in a forward pass that the card has memory for, and the host for what is offloaded; 0 if none."""
    units = cost_model.largest_units(available_tensor_bytes(cost_model, job.card))
    if job.node_memory_gib is not None:
        units = min(
            units,
            cost_model.units_in_host_memory(available_input_bytes(cost_model, job.ranks_per_node, job.node_memory_gib)),
        )
    return int(min(units, MAX_MICRO_BATCH)) if cost_model.units_are_rows else job.document_lengths.units_within(units)
