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

from strategies.base import (
    ActivationCheckpointing,
    Fsdp2Config,
    Precision,
    StrategyConfig,
    ZeroConfig,
)
from strategies.errors import ConfigError
from strategies.expert_counts import ASSUMED_IMBALANCE
from strategies.mesh import replica_count
from strategies.registry import every_strategy
from trainer.build.rounds import documents_per_step
from trainer.build.sequence import sequence_problems
from trainer.config.parallel import readers_of
from trainer.config.run import RunConfig
from trainer.config.validate import problems_of
from trainer.model.config import ModelKind as ModelKind
from trainer.model.config import Quantisation
from trainer.objectives.registry import family_of
from trainer.planner.cost_model import CostModel, MemoryPeak
from trainer.planner.dealt_experts import with_dealt_experts
from trainer.planner.deferred_reduction import deferred_gradient_bytes, with_deferred_reduction
from trainer.planner.hardware import Card, MemoryFit, host_gib, memory_fit, room_for_inputs, room_for_tensors
from trainer.planner.lengths import LARGEST_MICRO, DocumentLengths, divisors
from trainer.planner.peer_memory import LOSS_BYTES_PER_LOGIT, PeerMemory, PeerSetting, ShardCounts, peer_memory
from trainer.planner.peer_memory import problems_of as problems_of_theirs
from trainer.planner.round_time import RoundLoad, RoundTime, WritingModel, round_time
from trainer.planner.speed import MicroBatchLoad, StepTime, step_time
from trainer.tuning.base import TuningName

RECOMPUTATION_MODES = (ActivationCheckpointing.none, ActivationCheckpointing.selective, ActivationCheckpointing.full)
RUN_ONLY_PROBLEMS = ("budget: not set", "data.path: not set", "run.device=cuda: no CUDA device")
"""Problems that keep a run from starting, but not a plan: how they begin."""


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """Settings of a plan."""

    exact: bool = False
    """Simulate whole models in place of two shallow ones: the same answer, as slow as the model is deep."""
    offload: bool = False
    """Look at optimizer state (zero) or parameters (fsdp2, hsdp) in host memory too."""
    quantisation: list[Quantisation] = field(default_factory=list)
    """Further ways to store a frozen base, as in [none,nf4]; empty takes model.quantisation."""
    theirs: list[PeerSetting] = field(default_factory=list)
    """What another trainer holds in its step, as in [stock_loss,pure_bf16], told beside what this one does."""
    expert_imbalance: float | None = None
    """With parallel.experts: rows that arrive at the busiest rank over the mean of its group; null takes what the run of from=
    measured, else 2."""
    workers: int = 0
    """Processes that simulate; 0 takes one for each core that this job may use."""


@dataclass(frozen=True, slots=True)
class RunVariant:
    """One way to run: a strategy with its recomputation, offloading and storage of the base."""

    config: RunConfig
    words: tuple[str, ...]
    """The words to type for it, beside those that were typed."""
    offload: bool = False

    @property
    def name(self) -> str:
        """The name of its strategy."""
        return str(self.config.strategy.name)


@dataclass(frozen=True, slots=True)
class Choice:
    """A variant with a micro-batch, and what it takes."""

    variant: RunVariant
    words: tuple[str, ...]
    micro: int
    accumulation: int
    largest_micro: int
    """The largest micro-batch that fits; 0 if none does."""
    peak: MemoryPeak
    fit: MemoryFit
    step: StepTime
    tokens_per_s: float
    """Of all ranks."""
    host_gib: float
    """Of one node."""
    node_gib: float | None
    """Memory of a node; None if it is not known."""
    hours: float | None
    """For the budget."""
    price: float | None
    """US dollars for the budget, all cards."""
    defers: bool | None = None
    """Whether gradients wait unreduced for the last micro-batch; None if the plan did not choose it."""
    round: RoundTime | None = None
    """Seconds of a round, if the model writes what it learns from."""
    peer_memory: PeerMemory | None = None
    """The memory of the same step in another trainer, if `plan.theirs` asks for it."""

    @property
    def fits(self) -> bool:
        """Whether the card holds it, and the host what waits there."""
        return self.fit.margin >= 0 and self.fits_host

    @property
    def fits_host(self) -> bool:
        """Whether a node's memory is enough, as far as it is known."""
        return self.node_gib is None or self.host_gib <= self.node_gib


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """The job that a plan is for: its ranks, and the lengths of its documents."""

    card: Card
    precision: Precision
    nodes: int
    ranks_per_node: int
    global_batch: int
    lengths: DocumentLengths
    node_gib: float | None = None
    """Memory of a node in GiB; None if it is not known."""
    expert_imbalance: float = ASSUMED_IMBALANCE
    """With `parallel.experts`: rows that arrive at the busiest rank over the mean of its group."""
    imbalance_measured_over: int | None = None
    """Ranks of a group in the run that measured the imbalance; None if it is typed or assumed, and so of every group."""
    round: RoundLoad | None = None
    """What a round asks for, if the model writes what it learns from."""

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.nodes * self.ranks_per_node

    def imbalance_over(self, expert_ranks: int) -> float:
        """Rows that arrive at the busiest of `expert_ranks` ranks over the mean of its group.

        Of fewer ranks than measured, each holds the experts of several, so that at most as much is to be expected. Of more, a
        rank has fewer experts, which even out less: then nothing below the assumed imbalance is taken.
        """
        if self.imbalance_measured_over is None or expert_ranks <= self.imbalance_measured_over:
            return self.expert_imbalance
        return max(self.expert_imbalance, ASSUMED_IMBALANCE)


@dataclass(frozen=True, slots=True)
class MeasuredImbalance:
    """How unevenly the routers of a run chose among the ranks of an expert group."""

    busiest_over_mean: float
    """Tokens of the busiest rank of a group over the mean, in the least even layer."""
    expert_ranks: int
    """Ranks of a group (`parallel.experts`)."""


def with_imbalance(job: PlannedRun, settings: PlanConfig, measured: MeasuredImbalance | None) -> PlannedRun:
    """`job` with the imbalance of its experts' load: the one that was typed, else what a run has measured, else the assumed."""
    if settings.expert_imbalance is not None:
        return replace(job, expert_imbalance=settings.expert_imbalance)
    if measured is None:
        return job
    return replace(job, expert_imbalance=measured.busiest_over_mean, imbalance_measured_over=measured.expert_ranks)


def run_variants(
    config: RunConfig, settings: PlanConfig, typed: set[str], world: int | None
) -> tuple[list[RunVariant], list[tuple[RunVariant, str]]]:
    """The ways to run that a plan compares: each combination of strategy, recomputation and so on that the user left open.

    `typed`: keys of settings that the user typed, which stay. `world`: ranks of the run; None if not known. Returns (variants
    to simulate, variants that are ruled out and why). Raises ConfigError with the problems that every variant has, or if no
    variant is left.
    """
    variants = list(_every_variant(config, settings, typed))
    if "parallel.experts" not in typed and world is not None:
        variants += _with_dealt_experts(variants, world)
    problems_by_variant = [_problems(variant.config, world) for variant in variants]
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
        raise ConfigError([f"{' '.join(variant.words)}: {problem}" for variant, problem in refused])
    return possible, refused


def _with_dealt_experts(variants: list[RunVariant], world: int) -> list[RunVariant]:
    """The variants once more for each possible degree of expert parallelism (ranks among which a layer's experts are dealt)."""
    dealt = []
    configs = with_dealt_experts([variant.config for variant in variants], world)
    for variant, configs_of_variant in zip(variants, configs, strict=True):
        for config in configs_of_variant:
            # Those that cannot run are no news: nobody asked for them.
            if not _problems(config, world):
                words = (*variant.words, f"parallel.experts={config.parallel.experts}")
                dealt.append(replace(variant, config=config, words=words))
    return dealt


FURTHER_DEGREES = (2, 4, 8)
"""Numbers of ranks that a plan lets share a row, if nothing fits otherwise."""
FURTHER_SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"mlp_tokens": 8192},
    {"mlp_tokens": 8192, "offload_activations": True},
)
"""Settings of `strategy` for long rows that a plan tries beside, one after the other until something fits."""


def further_variants(
    config: RunConfig, settings: PlanConfig, typed: set[str], world: int, long_rows: dict[str, Any]
) -> tuple[list[RunVariant], list[tuple[RunVariant, str]]]:
    """Further ways to run, for when nothing fits: several ranks share each row, and the strategy gets settings for long rows.

    `long_rows`: one of FURTHER_SETTINGS. `typed`: keys of settings that the user typed. Returns (variants to simulate,
    variants that are ruled out and why). Blocks are recomputed whole, unless the recomputation was typed. No variants if
    ranks share rows already, or if `parallel.sequence` or one of the settings was typed.
    """
    shares_rows = config.parallel.sequence > 1 or "parallel.sequence" in typed
    if shares_rows or any(f"strategy.{key}" in typed for key in long_rows):
        return [], []
    strategy = replace(config.strategy, **long_rows)
    if "strategy.activation_checkpointing" not in typed:
        strategy = replace(strategy, activation_checkpointing=ActivationCheckpointing.full)
    words = [f"strategy.{key}={str(value).lower()}" for key, value in long_rows.items()]
    possible = []
    refused = []
    for degree in FURTHER_DEGREES:
        if world % degree:
            continue
        shared = replace(config, strategy=strategy, parallel=replace(config.parallel, sequence=degree))
        of_model = sequence_problems(shared)
        for variant in _every_variant(shared, settings, typed | {"strategy.activation_checkpointing"}):
            variant = replace(variant, words=(*variant.words, f"parallel.sequence={degree}", *words))
            problems = [*_problems(variant.config, world), *of_model]
            if problems:
                refused.append((variant, problems[0]))
            else:
                possible.append(variant)
    return possible, refused


def _problems(config: RunConfig, world: int | None) -> list[str]:
    return [problem for problem in problems_of(config, world_size=world) if not problem.startswith(RUN_ONLY_PROBLEMS)]


def _every_variant(config: RunConfig, settings: PlanConfig, typed: set[str]) -> Iterator[RunVariant]:
    """Each combination of strategy, base quantisation, recomputation and offload that the user left open.

    `typed`: keys of settings that the user typed. A strategy that cannot offload has no variant that does.
    """
    requested_mode = config.strategy.activation_checkpointing
    modes: Sequence[ActivationCheckpointing] = (requested_mode,)
    if requested_mode is ActivationCheckpointing.auto or "strategy.activation_checkpointing" not in typed:
        modes = RECOMPUTATION_MODES
    quantisations = settings.quantisation or [config.model.quantisation]
    offloads = (False, True) if settings.offload else (False,)
    strategies = _strategies(config.strategy, typed)
    for strategy, quantisation, mode, offload in product(strategies, quantisations, modes, offloads):
        words = [f"strategy={strategy.name}", f"strategy.activation_checkpointing={mode}"]
        variant_strategy = _with_offload(strategy) if offload else strategy
        if variant_strategy is None:
            continue
        if offload:
            words += _OFFLOAD_WORDS[isinstance(strategy, ZeroConfig)]
        if settings.quantisation:
            words.append(f"model.quantisation={quantisation}")
        variant_config = replace(
            config,
            strategy=replace(variant_strategy, activation_checkpointing=mode),
            model=replace(config.model, quantisation=quantisation),
        )
        yield RunVariant(variant_config, tuple(words), offload)


_OFFLOAD_WORDS = (["strategy.cpu_offload=true"], ["strategy.offload_optimizer=cpu"])


def _with_offload(strategy: StrategyConfig) -> StrategyConfig | None:
    """The strategy with its state in host memory; None if it cannot offload."""
    if isinstance(strategy, Fsdp2Config):
        return replace(strategy, cpu_offload=True)
    if isinstance(strategy, ZeroConfig):
        return replace(strategy, offload_optimizer="cpu")
    return None


def _strategies(requested: StrategyConfig, typed: set[str]) -> list[StrategyConfig]:
    """The strategy that was typed, or all of them with the common settings that were."""
    return [requested] if "strategy" in typed else every_strategy(requested)


def micro_batches(job: PlannedRun, typed: int | None, sequence: int = 1) -> list[int]:
    """Micro-batches to plan for: the one typed, or all that divide a reader's part of the global batch.

    A reader is a rank, or the `sequence` ranks that share a row and so read the same samples. The list is empty if the global
    batch does not divide evenly, or the one typed does not divide a reader's part.
    """
    samples_per_reader, remainder = divmod(job.global_batch, job.ranks // sequence)
    if remainder:
        return []
    if typed is not None:
        return [typed] if samples_per_reader % typed == 0 else []
    return divisors(samples_per_reader)


def rank_choices(
    variant: RunVariant,
    cost_model: CostModel,
    job: PlannedRun,
    micros: list[int],
    peer_settings: Sequence[PeerSetting] = (),
) -> list[Choice]:
    """A variant with each micro-batch of `micros`: those that fit, the fastest first; then those that do not, smallest first.

    `peer_settings`: what another trainer does differently (`plan.theirs`), to tell its memory beside.
    """
    choices = []
    for micro in micros:
        choice = choice_of(variant, cost_model, job, micro)
        if peer_settings:
            choice = replace(choice, peer_memory=peer_memory_of(choice, cost_model, job, peer_settings))
        choices.append(choice)
    fitting = sorted((choice for choice in choices if choice.fits), key=lambda choice: -choice.tokens_per_s)
    too_large = sorted((choice for choice in choices if not choice.fits), key=lambda choice: choice.micro)
    return [*fitting, *too_large]


def choice_of(variant: RunVariant, cost_model: CostModel, job: PlannedRun, micro: int) -> Choice:
    """What a step of this variant takes with `micro` documents per forward pass: memory, seconds, and hours and price of the run.

    Under FSDP2 it also decides whether gradients wait unreduced for the last micro-batch, unless that is set.
    """
    card = job.card
    strategy = variant.config.strategy
    accumulation = job.global_batch // (readers_of(variant.config, job.ranks) * micro)
    units = float(micro) if cost_model.rows else job.lengths.tokens_of_longest(micro)
    words = [*variant.words, f"batch.global={job.global_batch}", f"batch.micro={micro}"]
    peak = cost_model.peak_at(units)
    defers = None
    if accumulation > 1 and isinstance(strategy, Fsdp2Config) and strategy.defer_sync is None:
        # The run would decide by an estimate; the plan knows, and says it.
        shards = job.ranks // replica_count(strategy, job.ranks, job.nodes)
        waiting = deferred_gradient_bytes(cost_model, shards, variant.config.parallel.experts)
        deferred_model = with_deferred_reduction(cost_model, waiting)
        deferred_peak = deferred_model.peak_at(units)
        defers = memory_fit(deferred_model, deferred_peak, card).margin >= 0
        if defers:
            cost_model = deferred_model
            peak = deferred_peak
        words.append(f"strategy.defer_sync={str(defers).lower()}")
    # Memory is judged by the longest documents, time by the average ones.
    load = _average_load(cost_model, job, micro, accumulation)
    step = step_time(cost_model, load, card, job.precision, ranks_per_node=job.ranks_per_node)
    tokens = job.lengths.mean * job.global_batch
    of_round = _round_time(variant.config, cost_model, job, step)
    step_s = step.total_s if of_round is None else of_round.seconds_per_step
    hours = _budget_hours(variant.config, job, step_s, tokens)
    price = None
    if hours is not None and card.price_per_hour is not None:
        price = hours * job.ranks * card.price_per_hour
    return Choice(
        variant=variant,
        words=tuple(words),
        micro=micro,
        accumulation=accumulation,
        largest_micro=_largest_micro(cost_model, job),
        peak=peak,
        fit=memory_fit(cost_model, peak, card),
        step=step,
        tokens_per_s=tokens / step.total_s,
        host_gib=host_gib(cost_model, job.ranks_per_node, units),
        node_gib=job.node_gib,
        hours=hours,
        price=price,
        round=of_round,
        defers=defers,
    )


def _round_time(config: RunConfig, cost_model: CostModel, job: PlannedRun, step: StepTime) -> RoundTime | None:
    """Seconds of a round, in which the model writes answers and learns from them; None for objectives without rounds."""
    if job.round is None:
        return None
    model = WritingModel(
        cost_model.parameters,
        cost_model.blocks,
        cost_model.vocabulary,
        itemsize=4 if job.precision is Precision.fp32 else 2,
    )
    return round_time(
        job.round,
        model,
        replace(config, precision=job.precision),
        job.card,
        ranks=job.ranks,
        nodes=job.nodes,
        step_s=step.total_s,
        other_bytes=sum(cost_model.resting.values()),
    )


def peer_memory_of(
    choice: Choice, cost_model: CostModel, job: PlannedRun, peer_settings: Sequence[PeerSetting]
) -> PeerMemory:
    """What a rank of another trainer would hold in the step of `choice`, if it shards weights, gradients and moments alike."""
    if cost_model.rows:
        units = float(choice.micro)
        tokens = choice.micro * float(job.lengths.longest[0])
    else:
        units = tokens = job.lengths.tokens_of_longest(choice.micro)
    strategy = choice.variant.config.strategy
    shard_counts = ShardCounts()
    if isinstance(strategy, Fsdp2Config):
        shards = job.ranks // replica_count(strategy, job.ranks, job.nodes)
        shard_counts = ShardCounts(weights=shards, gradients=shards, moments=shards)
    elif isinstance(strategy, ZeroConfig):
        shard_counts = ShardCounts(
            weights=job.ranks if strategy.stage >= 3 else 1,
            gradients=job.ranks if strategy.stage >= 2 else 1,
            moments=job.ranks if strategy.stage >= 1 else 1,
        )
    return peer_memory(cost_model, units, tokens * cost_model.vocabulary, peer_settings, shard_counts)


def _peer_problems(config: RunConfig, peer_settings: Sequence[PeerSetting]) -> list[str]:
    """Sentences that say why `plan.theirs` does not go with this run; empty if it does."""
    problems = problems_of_theirs(peer_settings, full_tuning=config.tuning.name is TuningName.full)
    losses = [setting for setting in peer_settings if setting in LOSS_BYTES_PER_LOGIT]
    if losses and family_of(config.objective).kind is ModelKind.classifier:
        problems.append(
            f"plan.theirs=[{','.join(losses)}]: is of a loss over words; objective={config.objective.name} has none"
        )
    return problems


def _average_load(cost_model: CostModel, job: PlannedRun, micro: int, accumulation: int) -> MicroBatchLoad:
    units = float(micro) if cost_model.rows else micro * job.lengths.mean
    return MicroBatchLoad(units, micro * job.lengths.mean_square, accumulation)


def _largest_micro(cost_model: CostModel, job: PlannedRun) -> int:
    """The most documents in a forward pass that the card has memory for, and the host for what is offloaded; 0 if none."""
    units = cost_model.largest_units(room_for_tensors(cost_model, job.card))
    if job.node_gib is not None:
        units = min(
            units, cost_model.units_in_host_memory(room_for_inputs(cost_model, job.ranks_per_node, job.node_gib))
        )
    return int(min(units, LARGEST_MICRO)) if cost_model.rows else job.lengths.units_within(units)


def _budget_hours(config: RunConfig, job: PlannedRun, step_s: float, tokens: float) -> float | None:
    """How many hours the whole run takes, with steps of `step_s` seconds and `tokens` tokens each.

    None without a budget, or if the budget is in epochs and no data was given to count them by.
    """
    budget = config.budget
    if budget.steps is not None:
        steps = float(budget.steps)
    elif budget.tokens is not None:
        steps = budget.tokens / tokens
    elif budget.epochs is not None and job.lengths.units_per_epoch is not None:
        steps = budget.epochs * job.lengths.units_per_epoch / documents_per_step(config)
    else:
        return None
    return steps * step_s / 3600
