"""Plans a run before it starts: memory, time and price of each variant of it, by simulating its step.

A variant is a strategy with its recomputation, offloading and the storage type of its base. Each is simulated once
(`trainer/planner/simulation.py`), in a process of its own, which gives a cost model for every micro-batch
(`trainer/planner/cost_model.py`). A variant with a micro-batch is a choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from strategies.base import Fsdp2Config, Precision, StrategyConfig, ZeroConfig
from strategies.expert_counts import ASSUMED_IMBALANCE
from strategies.mesh import replica_count
from trainer.config.parallel import dp_size_of
from trainer.config.run import RunConfig
from trainer.planner.cost_model import CostModel, MemoryPeak
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
from trainer.planner.peer_memory import PeerMemory, PeerSetting, ShardCounts, estimate_peer_memory
from trainer.planner.round_time import GeneratorSizes, RoundSizes, RoundTime, estimate_round_time, estimate_run_hours
from trainer.planner.speed import MicroBatchLoad, StepTime, estimate_step_time
from trainer.planner.variants import PlanConfig, RunVariant


@dataclass(frozen=True, slots=True)
class PlannedChoice:
    """A variant with a micro-batch, and what it takes: memory by the longest samples, time by samples of average length."""

    variant: RunVariant
    overrides: tuple[str, ...]
    """The settings to add to the command line, those of the batch included."""
    micro_batch: int
    """Samples in each forward pass of a data-parallel rank."""
    accumulation: int
    """Micro-batches of a step."""
    largest_micro_batch: int
    """The largest micro-batch that fits; 0 if none does."""
    memory_peak: MemoryPeak
    """The simulated peak: bytes of tensors, by kind."""
    memory_fit: MemoryFit
    """That peak with what the process takes beside tensors, against the memory of the card."""
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
    """Seconds of a round (answers generated, scored, trained on), if the model generates what it learns from."""
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
    """The run that a plan is for, as far as its variants have it in common: GPU, ranks, batch, lengths of its documents."""

    card: Card
    """The GPU of every rank."""
    precision: Precision
    num_nodes: int
    ranks_per_node: int
    global_batch: int
    """Samples of a step, all ranks together."""
    document_lengths: DocumentLengths
    node_memory_gib: float | None = None
    """Memory of a node in GiB; None if it is not known."""
    expert_imbalance: float = ASSUMED_IMBALANCE
    """With `parallel.experts`: rows that arrive at the busiest rank over the mean of its group."""
    imbalance_measured_over: int | None = None
    """Ranks of a group in the run that measured the imbalance; None if it was set or assumed, and so holds for any group."""
    round_sizes: RoundSizes | None = None
    """The sizes of a round (answers generated, scored, trained on), if the model generates what it learns from."""

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.num_nodes * self.ranks_per_node

    def imbalance_over(self, expert_ranks: int) -> float:
        """How uneven to take the load of experts over `expert_ranks` ranks: rows that arrive at the busiest one, over the mean.

        A row is what a token sends to one of its experts. An imbalance that was set or assumed holds for any number of ranks. A
        measured one is an upper bound for fewer ranks: each then holds more experts, whose loads even out. With more ranks than
        measured, it may be larger, so at least the assumed one is taken.
        """
        # None: the imbalance was set or assumed, not measured.
        measured_ranks = self.imbalance_measured_over
        if measured_ranks is None or expert_ranks <= measured_ranks:
            return self.expert_imbalance
        return max(self.expert_imbalance, ASSUMED_IMBALANCE)


@dataclass(frozen=True, slots=True)
class EnoughCards:
    """More cards than were planned, with which a choice fits."""

    num_nodes: int
    ranks_per_node: int
    choice: PlannedChoice

    @property
    def overrides(self) -> tuple[str, ...]:
        """The settings to add to the command line."""
        launcher = (f"launcher.nodes={self.num_nodes}", f"launcher.gpus_per_node={self.ranks_per_node}")
        return (*launcher, *self.choice.overrides)


@dataclass(frozen=True, slots=True)
class MeasuredImbalance:
    """How unevenly the routers of a run chose among the ranks of an expert group."""

    busiest_over_mean: float
    """Tokens of the busiest rank of a group over the mean, in the least even layer."""
    expert_ranks: int
    """Ranks of a group (`parallel.experts`)."""


def with_imbalance(job: PlannedJob, settings: PlanConfig, measured: MeasuredImbalance | None) -> PlannedJob:
    """Give the planned run the imbalance of its experts: as set for the plan, else as a run measured it, else the assumed one.

    `measured`: None if the plan is not made from a run, or that run has not measured it.
    """
    if settings.expert_imbalance is not None:
        return replace(job, expert_imbalance=settings.expert_imbalance)
    if measured is None:
        return job
    return replace(job, expert_imbalance=measured.busiest_over_mean, imbalance_measured_over=measured.expert_ranks)


def candidate_micro_batches(
    job: PlannedJob, requested_micro_batch: int | None, sequence_parallel_size: int = 1
) -> list[int]:
    """List the micro-batches to plan for: the requested one, or all that divide the samples of a data-parallel rank in a step.

    `requested_micro_batch`: `batch.micro`; None plans for all. `sequence_parallel_size`: ranks that share each row, which read
    the same samples, as one data-parallel rank. The list is empty if the global batch does not divide evenly, or if the
    requested micro-batch does not divide the samples of a rank.
    """
    samples_per_dp_rank, remainder = divmod(job.global_batch, job.world_size // sequence_parallel_size)
    if remainder:
        return []
    if requested_micro_batch is None:
        return micro_batch_divisors(samples_per_dp_rank)
    return [requested_micro_batch] if samples_per_dp_rank % requested_micro_batch == 0 else []


def plan_choices(
    variant: RunVariant,
    cost_model: CostModel,
    job: PlannedJob,
    micro_batches: list[int],
    peer_settings: Sequence[PeerSetting] = (),
) -> list[PlannedChoice]:
    """Plan one variant of a run with each of the micro-batches, the best first: what memory and time it takes.

    Those that fit come first, the fastest of them first; then those that do not, the smallest first. `cost_model`: the variant's
    step at any micro-batch. `job`: GPU, ranks and batch. `peer_settings`: what another trainer does differently (`plan.theirs`),
    if its memory is to be computed as well.
    """
    choices = []
    for micro_batch in micro_batches:
        choice = plan_choice(variant, cost_model, job, micro_batch)
        if peer_settings:
            choice = replace(choice, peer_memory=peer_memory_of_choice(choice, cost_model, job, peer_settings))
        choices.append(choice)
    fitting = sorted((choice for choice in choices if choice.fits), key=lambda choice: -choice.tokens_per_s)
    too_large = sorted((choice for choice in choices if not choice.fits), key=lambda choice: choice.micro_batch)
    return [*fitting, *too_large]


def plan_choice(variant: RunVariant, cost_model: CostModel, job: PlannedJob, micro_batch: int) -> PlannedChoice:
    """Plan one variant with `micro_batch` samples per forward pass: memory and time of a step, hours and price of the run.

    Under FSDP2 it also decides whether gradients are reduced only in the last micro-batch, if the run leaves that open.
    `cost_model`: the variant's step at any micro-batch. `job`: GPU, ranks, batch and lengths of documents.
    """
    card = job.card
    strategy = variant.config.strategy
    accumulation = job.global_batch // (dp_size_of(variant.config, job.world_size) * micro_batch)
    num_rows_or_tokens = job.document_lengths.size_of_longest(micro_batch, in_rows=cost_model.size_is_in_rows)
    overrides = [*variant.overrides, f"batch.global={job.global_batch}", f"batch.micro={micro_batch}"]
    # Memory, by the longest documents. The run itself would decide by an estimate whether it defers the reduction; the plan has
    # simulated it, so its choice is added to the command line.
    defers_reduction = None
    if accumulation > 1 and isinstance(strategy, Fsdp2Config) and strategy.defer_sync is None:
        deferred_model = _with_reduction_in_last_micro_batch(variant.config, strategy, cost_model, job)
        deferred_peak = deferred_model.memory_peak_at(num_rows_or_tokens)
        defers_reduction = card_memory_fit(deferred_model, deferred_peak, card).margin_bytes >= 0
        cost_model = deferred_model if defers_reduction else cost_model
        overrides.append(f"strategy.defer_sync={str(defers_reduction).lower()}")
    peak = cost_model.memory_peak_at(num_rows_or_tokens)
    # Time, by documents of average length.
    load = _average_load(cost_model, job, micro_batch, accumulation)
    step = estimate_step_time(cost_model, load, card, job.precision, ranks_per_node=job.ranks_per_node)
    tokens_per_step = job.document_lengths.mean * job.global_batch
    round_time = _round_time(variant.config, cost_model, job, step.total_s)
    step_s = step.total_s if round_time is None else round_time.seconds_per_step
    hours = estimate_run_hours(variant.config, job.document_lengths.samples_per_epoch, step_s, tokens_per_step)
    price = None
    if hours is not None and card.price_per_hour is not None:
        price = hours * job.world_size * card.price_per_hour
    return PlannedChoice(
        variant=variant,
        overrides=tuple(overrides),
        micro_batch=micro_batch,
        accumulation=accumulation,
        largest_micro_batch=_largest_micro_batch(cost_model, job),
        memory_peak=peak,
        memory_fit=card_memory_fit(cost_model, peak, card),
        step_time=step,
        tokens_per_s=tokens_per_step / step.total_s,
        needed_host_gib=needed_host_gib(cost_model, job.ranks_per_node, num_rows_or_tokens),
        node_memory_gib=job.node_memory_gib,
        budget_hours=hours,
        budget_dollars=price,
        round_time=round_time,
        defers_reduction=defers_reduction,
    )


def _with_reduction_in_last_micro_batch(
    config: RunConfig, strategy: Fsdp2Config, cost_model: CostModel, job: PlannedJob
) -> CostModel:
    """The cost model of a step in which full gradients wait on each rank until the last micro-batch, which reduces them.

    `cost_model`: of the step that was simulated, which reduces in each micro-batch.
    """
    num_shards = job.world_size // replica_count(strategy, job.world_size, job.num_nodes)
    waiting_bytes = deferred_gradient_bytes(cost_model, num_shards, num_expert_ranks=config.parallel.experts)
    return with_deferred_reduction(cost_model, waiting_bytes)


def _round_time(config: RunConfig, cost_model: CostModel, job: PlannedJob, step_s: float) -> RoundTime | None:
    """Estimate the seconds of a round, in which the model generates answers and learns from them; None for runs without rounds.

    `cost_model`: of the training step, for the sizes of the model and what stays in memory between steps. `step_s`: seconds of an
    optimizer step.
    """
    if job.round_sizes is None:
        return None
    generator = GeneratorSizes(
        num_parameters=cost_model.num_parameters,
        num_blocks=cost_model.num_blocks,
        num_vocabulary_rows=cost_model.num_vocabulary_rows,
        weight_itemsize=4 if job.precision is Precision.fp32 else 2,
    )
    return estimate_round_time(
        job.round_sizes,
        generator,
        replace(config, precision=job.precision),
        job.card,
        num_ranks=job.world_size,
        num_hosts=job.num_nodes,
        step_s=step_s,
        resting_bytes=sum(cost_model.resting_bytes_by_kind.values()),
    )


def peer_memory_of_choice(
    choice: PlannedChoice, cost_model: CostModel, job: PlannedJob, peer_settings: Sequence[PeerSetting]
) -> PeerMemory:
    """Estimate what a rank of another trainer (the peer) would hold in the same step, so that a plan can show it beside ours.

    `choice`: the planned variant with its micro-batch. `cost_model`: of its step. `peer_settings`: what the peer does differently
    (`plan.theirs`), such as the loss; it is taken to shard weights, gradients and moments as we do.
    """
    lengths = job.document_lengths
    if cost_model.size_is_in_rows:
        tokens = choice.micro_batch * float(lengths.longest[0])  # all rows are as long as the longest
    else:
        tokens = lengths.num_tokens_of_longest(choice.micro_batch)
    return estimate_peer_memory(
        cost_model,
        num_rows_or_tokens=lengths.size_of_longest(choice.micro_batch, in_rows=cost_model.size_is_in_rows),
        num_logits=tokens * cost_model.num_vocabulary_rows,
        settings=peer_settings,
        shard_counts=_shard_counts(choice.variant.config.strategy, job),
    )


def _shard_counts(strategy: StrategyConfig, job: PlannedJob) -> ShardCounts:
    """Among how many ranks a strategy shards weights, gradients and moments: FSDP2 all three, ZeRO one more with each stage.

    1 for what each rank has in full.
    """
    if isinstance(strategy, Fsdp2Config):
        shards = job.world_size // replica_count(strategy, job.world_size, job.num_nodes)
        return ShardCounts(weights=shards, gradients=shards, moments=shards)
    if isinstance(strategy, ZeroConfig):
        return ShardCounts(
            weights=job.world_size if strategy.stage >= 3 else 1,
            gradients=job.world_size if strategy.stage >= 2 else 1,
            moments=job.world_size if strategy.stage >= 1 else 1,
        )
    return ShardCounts()


def _average_load(cost_model: CostModel, job: PlannedJob, micro_batch: int, accumulation: int) -> MicroBatchLoad:
    """The work of a step on average, by which its time is estimated: `accumulation` micro-batches of `micro_batch` samples each.

    The samples are taken to have the mean length of the data.
    """
    lengths = job.document_lengths
    num_rows_or_tokens = micro_batch if cost_model.size_is_in_rows else micro_batch * lengths.mean
    return MicroBatchLoad(
        num_rows_or_tokens=float(num_rows_or_tokens),
        sum_of_squared_lengths=micro_batch * lengths.mean_square,
        num_micro_batches=accumulation,
    )


def _largest_micro_batch(cost_model: CostModel, job: PlannedJob) -> int:
    """The largest micro-batch, in samples, that the card has memory for, and the host for what is offloaded; 0 if none.

    The longest samples of the data count. At most `MAX_MICRO_BATCH`.
    """
    max_rows_or_tokens = cost_model.max_rows_or_tokens_on_device(available_tensor_bytes(cost_model, job.card))
    if job.node_memory_gib is not None:
        input_bytes = available_input_bytes(cost_model, job.ranks_per_node, job.node_memory_gib)
        max_rows_or_tokens = min(max_rows_or_tokens, cost_model.max_rows_or_tokens_on_host(input_bytes))
    if cost_model.size_is_in_rows:
        return int(min(max_rows_or_tokens, MAX_MICRO_BATCH))
    return job.document_lengths.num_samples_within(max_rows_or_tokens)
