"""Simulates the variants of a plan in parallel processes, and ranks them."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import NamedTuple

from strategies.errors import ConfigError
from strategies.parent_death import die_with_parent
from trainer.config.parallel import dp_size_of
from trainer.config.run import RunConfig
from trainer.planner.cost_model import CostModel
from trainer.planner.fit_check import NotSimulated, strategy_for_simulation, why_not_simulated
from trainer.planner.hardware import MemoryFit
from trainer.planner.plan import (
    EnoughCards,
    PlannedChoice,
    PlannedJob,
    candidate_micro_batches,
    plan_choice,
    plan_choices,
)
from trainer.planner.variants import PlanConfig, RefusedVariant, RunVariant, RunVariants

ProgressCallback = Callable[[int, int, str], None]
"""Called with (variants done, all variants, the overrides of the one that has been simulated longest; empty if all are done)."""
PROGRESS_INTERVAL_S = 1.0
WORKER_KILLED = NotSimulated("its simulation was killed; the host may lack memory, set plan.workers=1")


@dataclass(frozen=True, slots=True)
class PlanAnswer:
    """What a plan found: the choices (a variant of the run with a micro-batch), and the variants that were refused.

    Choices are in order: those that fit, the fastest first; then those that do not, the one that lacks least memory first.
    """

    planned_run: PlannedJob
    """The run that was planned: its ranks, GPU and batch."""
    best_choices: list[PlannedChoice]
    """The best choice of each variant, in order."""
    all_choices: list[PlannedChoice]
    """Every micro-batch of every variant, in order."""
    refused_variants: list[RefusedVariant]
    """Variants that were ruled out or could not be simulated."""
    cost_model: CostModel
    """That of the first choice, for what is known of the model."""
    worst_imbalance_fit: MemoryFit | None = None
    """The memory of the first choice if all rows of a layer went to the experts of one rank; None if it does not distribute
    experts."""
    enough_cards: EnoughCards | None = None
    """If nothing fits: more cards with which a choice fits; None if something fits, or if no such number was found."""

    @property
    def fastest_fitting_choice(self) -> PlannedChoice | None:
        """The fastest that fits."""
        return next((choice for choice in self.best_choices if choice.fits), None)


def plan_variants(
    variants: RunVariants,
    job: PlannedJob,
    requested_micro_batch: int | None,
    settings: PlanConfig,
    on_progress: ProgressCallback,
) -> PlanAnswer:
    """Plan a run: simulate each of its possible variants, try every micro-batch, and order the choices by memory and speed.

    A variant is a strategy with its recomputation and offloading; with a micro-batch it is a choice. `job`: ranks, GPU and batch
    of the run. `requested_micro_batch`: that on the command line; None plans for all. `on_progress`: called at least each
    second. Raises ConfigError if no variant could be simulated.
    """
    refused = list(variants.refused)
    planned: list[_PlannedVariant] = []
    micro_batches_by_variant = []
    accumulations = []  # micro-batches of a step to simulate, by variant
    for variant in variants.possible:
        micro_batches = candidate_micro_batches(job, requested_micro_batch, variant.config.parallel.sequence)
        micro_batches_by_variant.append(micro_batches)
        # Of the smallest micro-batch, which has most of them in a step. `dp_size_of`: ranks that read different samples.
        num_micro_batches = job.global_batch // (dp_size_of(variant.config, job.world_size) * micro_batches[0])
        accumulations.append(min(2, num_micro_batches))  # two tell the last micro-batch from the others
    cost_models = simulate_variants(variants.possible, job, accumulations, settings, on_progress)
    for variant, cost_model, micro_batches in zip(
        variants.possible, cost_models, micro_batches_by_variant, strict=True
    ):
        if isinstance(cost_model, NotSimulated):
            refused.append(RefusedVariant(variant, cost_model.reason))
        else:
            # `theirs`: what another trainer does differently, to compare its memory.
            choices = plan_choices(variant, cost_model, job, micro_batches, settings.theirs)
            planned.append(_PlannedVariant(cost_model, choices))
    if not planned:
        raise ConfigError(_problems_of_refused(refused))

    all_choices = [choice for planned_variant in planned for choice in planned_variant.choices]
    planned.sort(key=lambda planned_variant: _rank_key(planned_variant.choices[0]))
    return PlanAnswer(
        planned_run=job,
        best_choices=[planned_variant.choices[0] for planned_variant in planned],
        all_choices=sorted(all_choices, key=_rank_key),
        refused_variants=refused,
        cost_model=planned[0].cost_model,
    )


class _PlannedVariant(NamedTuple):
    """What a plan found of one variant."""

    cost_model: CostModel
    choices: list[PlannedChoice]
    """Its micro-batches, the best first."""


def _problems_of_refused(refused: list[RefusedVariant]) -> list[str]:
    """The lines of the error if no variant of a run can be planned: the reason if it is that of all, else one for each variant.

    A line of the latter is `strategy=zero3 strategy.activation_checkpointing=full: <reason>`.
    """
    reasons = {reason for _, reason in refused}
    if len(reasons) == 1:
        return [*reasons]
    return [f"{' '.join(variant.overrides)}: {reason}" for variant, reason in refused]


def with_further_variants(
    answer: PlanAnswer,
    variants: RunVariants,
    job: PlannedJob,
    requested_micro_batch: int | None,
    settings: PlanConfig,
    on_progress: ProgressCallback,
) -> PlanAnswer:
    """Add further variants, which need less memory, to a plan in which nothing fits: simulate them, and order all choices.

    `answer`: the plan so far. `variants`: those to add; if none of them can be simulated, they are listed as refused. The other
    arguments are those of `plan_variants`.
    """
    try:
        further = plan_variants(variants, job, requested_micro_batch, settings, on_progress)
    except ConfigError as error:
        not_simulated = [RefusedVariant(variant, error.problems[0]) for variant in variants.possible]
        return replace(answer, refused_variants=[*answer.refused_variants, *variants.refused, *not_simulated])
    return replace(
        further,
        best_choices=sorted([*answer.best_choices, *further.best_choices], key=_rank_key),
        all_choices=sorted([*answer.all_choices, *further.all_choices], key=_rank_key),
        refused_variants=[*answer.refused_variants, *further.refused_variants],
    )


def with_worst_imbalance(answer: PlanAnswer, settings: PlanConfig) -> PlanAnswer:
    """Add to a plan how much memory its best choice needs if the routing of tokens to experts is as uneven as possible.

    In the worst case, all tokens of an expert group choose experts of one rank: the choice is simulated once more with that
    imbalance. `answer` is returned as it is without `parallel.experts`, or if the simulation fails.
    """
    choice = answer.best_choices[0]
    expert_ranks = choice.variant.config.parallel.experts
    if expert_ranks == 1:
        return answer
    job = replace(answer.planned_run, expert_imbalance=float(expert_ranks), imbalance_measured_over=None)
    variant = choice.variant
    if choice.defers_reduction is not None:
        # The choice must stay as it was planned: without the setting, `plan_choice` would decide again by memory.
        strategy = replace(variant.config.strategy, defer_sync=choice.defers_reduction)  # type: ignore[call-arg]
        variant = replace(variant, config=replace(variant.config, strategy=strategy))
    accumulation = min(2, choice.accumulation)  # more micro-batches hold no more memory
    (cost_model,) = simulate_variants([variant], job, [accumulation], settings, lambda *_: None)
    if isinstance(cost_model, NotSimulated):
        return answer
    worst_choice = plan_choice(variant, cost_model, job, choice.micro_batch)
    return replace(answer, worst_imbalance_fit=worst_choice.memory_fit)


def _rank_key(choice: PlannedChoice) -> tuple[bool, float]:
    """The key by which choices are sorted: those that fit first, the fastest first; then those that lack least memory first."""
    if choice.fits:
        return False, -choice.tokens_per_s
    return True, -choice.memory_fit.margin_bytes


def simulate_variants(
    variants: list[RunVariant],
    job: PlannedJob,
    accumulations: list[int],
    settings: PlanConfig,
    on_progress: ProgressCallback,
) -> list[CostModel | NotSimulated]:
    """Simulate each variant of a run in a worker process: returns its cost model, or why it cannot be simulated, in their order.

    `job`: ranks, GPU and batch. `accumulations`: how many micro-batches of a step to simulate, for each variant. `settings`: how
    many workers, and whether the whole model is simulated. `on_progress`: called at least each second.
    """
    # Import and build once here, before the workers are forked: otherwise each of them would do it.
    import trainer.planner.simulation  # noqa: F401
    from trainer.planner.model_blocks import block_pattern

    for variant in variants:
        block_pattern(variant.config.model)
    gc.freeze()  # the workers collect garbage often, and need not search the objects that exist now
    workers = settings.workers or len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(
        max_workers=min(workers, max(1, len(variants))),
        mp_context=multiprocessing.get_context("fork"),
        initializer=_start_worker,
        initargs=(os.getpid(),),
    ) as pool:
        # The slowest simulations first, so that no worker is busy alone at the end.
        slowest_first = sorted(range(len(variants)), key=lambda index: -_duration_rank(variants[index]))
        index_by_future: dict[Future[CostModel | NotSimulated], int] = {}
        for index in slowest_first:
            future = pool.submit(_simulate, variants[index].config, accumulations[index], job, exact=settings.exact)
            index_by_future[future] = index
        try:
            return _collect_cost_models(variants, index_by_future, on_progress)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _collect_cost_models(
    variants: list[RunVariant],
    index_by_future: dict[Future[CostModel | NotSimulated], int],
    on_progress: ProgressCallback,
) -> list[CostModel | NotSimulated]:
    """Wait for the worker processes to simulate all variants; returns the results in the order of `variants`.

    `index_by_future`: for each task of the pool, in the order in which workers take them, the index of the variant that it
    simulates. `on_progress`: called each second, and when a simulation is done. If a worker was killed, which stops all others,
    the variants that were not done get that as a reason instead of a cost model.
    """
    results: dict[int, CostModel | NotSimulated] = {}
    pending = set(index_by_future)
    while pending:
        # One simulation may take a minute: the user is to see that something is done.
        done, pending = wait(pending, timeout=PROGRESS_INTERVAL_S, return_when=FIRST_COMPLETED)
        for future in done:
            try:
                results[index_by_future[future]] = future.result()
            except BrokenProcessPool:  # a worker was killed, and the pool stops all others
                results[index_by_future[future]] = WORKER_KILLED
        running = [index for future, index in index_by_future.items() if future in pending]
        on_progress(len(results), len(variants), " ".join(variants[running[0]].overrides) if running else "")
    return [results[index] for index in range(len(variants))]


def _duration_rank(variant: RunVariant) -> int:
    """A number that is larger for variants whose simulation takes longer: ZeRO-3, then other stages of ZeRO, then the rest."""
    if variant.name == "zero3":
        return 2
    return 1 if variant.name.startswith("zero") else 0


def _start_worker(parent_pid: int) -> None:
    """Prepare a new worker process for simulations: it ends with its parent, computes on one core, drops what libraries print.

    `parent_pid`: process id of the planner.
    """
    import torch

    die_with_parent(parent_pid)
    torch.set_num_threads(1)
    sys.stdout.flush()
    # The answer may be JSON on standard output, and the progress is a line on standard error.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _simulate(config: RunConfig, accumulation: int, job: PlannedJob, *, exact: bool) -> CostModel | NotSimulated:
    """Simulate one variant of a run, in a worker process: returns its cost model, or why it cannot be simulated.

    `accumulation`: micro-batches of a step to simulate. `exact`: simulate the whole model, not two with few of its blocks.
    """
    from trainer.planner.simulation import simulate_cost_model_of_run

    # Objects that earlier variants imported and cached stay. Frozen, they cost the next garbage collections no time.
    gc.collect()
    gc.freeze()
    # Reductions in the last micro-batch alone are computed afterwards from this cost model (`with_deferred_reduction`).
    config = replace(config, strategy=strategy_for_simulation(config.strategy), precision=job.precision)
    lengths = job.document_lengths
    try:
        return simulate_cost_model_of_run(
            config,
            length=int(lengths.longest[0]) // lengths.sequences_per_sample,
            accumulation=accumulation,
            world_size=job.world_size,
            local_world_size=job.ranks_per_node,
            exact=exact,
            expert_imbalance=job.imbalance_over(config.parallel.experts),
        )
    except ConfigError as error:
        return NotSimulated(error.problems[0])
    except Exception as error:  # noqa: BLE001 - whatever an architecture does that cannot be simulated is told, not raised
        return NotSimulated(why_not_simulated(error))
