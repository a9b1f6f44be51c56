"""Simulates the variants of a plan in parallel processes, and ranks them."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace

from strategies.errors import ConfigError
from strategies.parent_death import die_with_parent
from trainer.config.parallel import dp_size_of
from trainer.config.run import RunConfig
from trainer.planner.cost_model import CostModel
from trainer.planner.fit_check import strategy_for_simulation, why_not_simulated
from trainer.planner.hardware import MemoryFit
from trainer.planner.plan import (
    PlanConfig,
    PlannedChoice,
    PlannedJob,
    RunVariant,
    micro_batches,
    order_choices,
    plan_choice,
)

ProgressCallback = Callable[[int, int, str], None]
"""Called with (variants done, all variants, the overrides of the one that is done)."""
WORKER_KILLED = "its simulation was killed; the host may lack memory, set plan.workers=1"


@dataclass(frozen=True, slots=True)
class PlanAnswer:
    """Every variant with its best micro-batch, in order: those that fit, the fastest first; then those that do not."""

    planned_run: PlannedJob
    best_choices: list[PlannedChoice]
    """The best choice of each variant."""
    all_choices: list[PlannedChoice]
    """Every micro-batch of every variant."""
    unsupported_variants: list[tuple[RunVariant, str]]
    """Ways that were ruled out or could not be simulated, and why."""
    cost_model: CostModel
    """That of the first in order, for what is known of the model."""
    worst_imbalance_fit: MemoryFit | None = None
    """The memory of the best way, or of the smallest one if none fits, where all rows of a layer go to the experts of one rank;
    None if it does not distribute experts."""

    @property
    def fastest_fitting_choice(self) -> PlannedChoice | None:
        """The fastest that fits."""
        return next((choice for choice in self.best_choices if choice.fits), None)


def plan_variants(
    variants: list[RunVariant],
    refused: list[tuple[RunVariant, str]],
    job: PlannedJob,
    micro: int | None,
    settings: PlanConfig,
    on_progress: ProgressCallback,
) -> PlanAnswer:
    """Simulate each of `variants`, and order them by memory and speed.

    `refused`: variants that were ruled out before, and why. `job`: ranks, card and batch of the run. `micro`: the micro-batch on
    the command line; None plans for all. Raises ConfigError if no variant could be simulated.
    """
    # How many micro-batches of a step to simulate. Two are enough to tell the last one from the others.
    micros_by_variant = [micro_batches(job, micro, variant.config.parallel.sequence) for variant in variants]
    accumulations = []
    for variant, micros in zip(variants, micros_by_variant, strict=True):
        dp_size = dp_size_of(variant.config, job.world_size)
        accumulations.append(2 if job.global_batch // (dp_size * micros[0]) > 1 else 1)
    cost_models = simulate_variants(variants, job, accumulations, settings, on_progress)

    # Rank the micro-batches of each variant; a variant that cannot be simulated is refused.
    all_refused = list(refused)
    planned: list[tuple[CostModel, list[PlannedChoice]]] = []
    for variant, cost_model, micros in zip(variants, cost_models, micros_by_variant, strict=True):
        if isinstance(cost_model, str):
            all_refused.append((variant, cost_model))
        else:
            planned.append((cost_model, order_choices(variant, cost_model, job, micros, settings.theirs)))
    if not planned:
        reasons = {reason for _, reason in all_refused}
        if len(reasons) == 1:
            raise ConfigError([*reasons])
        raise ConfigError([f"{' '.join(variant.overrides)}: {reason}" for variant, reason in all_refused])

    # Order the variants by their best choices.
    all_choices = [choice for _, choices in planned for choice in choices]
    planned.sort(key=lambda model_and_choices: _rank_key(model_and_choices[1][0]))
    return PlanAnswer(
        planned_run=job,
        best_choices=[choices[0] for _, choices in planned],
        all_choices=sorted(all_choices, key=_rank_key),
        unsupported_variants=all_refused,
        cost_model=planned[0][0],
    )


def with_further_variants(
    answer: PlanAnswer,
    variants: list[RunVariant],
    refused: list[tuple[RunVariant, str]],
    job: PlannedJob,
    micro: int | None,
    settings: PlanConfig,
    on_progress: ProgressCallback,
) -> PlanAnswer:
    """`answer`, in which nothing fits, with further `variants` simulated and added; other arguments: see `plan_variants`.

    If none of the further variants can be simulated, they are listed as refused.
    """
    try:
        further = plan_variants(variants, refused, job, micro, settings, on_progress)
    except ConfigError as error:
        not_simulated = [(variant, error.problems[0]) for variant in variants]
        return replace(answer, unsupported_variants=[*answer.unsupported_variants, *refused, *not_simulated])
    return replace(
        further,
        best_choices=sorted([*answer.best_choices, *further.best_choices], key=_rank_key),
        all_choices=sorted([*answer.all_choices, *further.all_choices], key=_rank_key),
        unsupported_variants=[*answer.unsupported_variants, *further.unsupported_variants],
    )


def with_worst_imbalance(answer: PlanAnswer, settings: PlanConfig) -> PlanAnswer:
    """`answer` with the memory that its first choice needs if routing is as uneven as possible.

    In the worst case, all tokens of an expert group choose experts of one rank: the choice is simulated once more with that
    imbalance. `answer` stays as it is without `parallel.experts`, or if the simulation fails.
    """
    choice = answer.best_choices[0]
    expert_ranks = choice.variant.config.parallel.experts
    if expert_ranks == 1:
        return answer
    job = replace(answer.planned_run, expert_imbalance=float(expert_ranks), imbalance_measured_over=None)
    accumulation = min(2, choice.accumulation)
    variant = choice.variant
    if choice.defers_reduction is not None:
        strategy = replace(variant.config.strategy, defer_sync=choice.defers_reduction)  # type: ignore[call-arg]
        variant = replace(variant, config=replace(variant.config, strategy=strategy))
    (cost_model,) = simulate_variants([variant], job, [accumulation], settings, lambda *_: None)
    if isinstance(cost_model, str):
        return answer
    worst = plan_choice(variant, cost_model, job, choice.micro_batch)
    return replace(answer, worst_imbalance_fit=worst.memory_fit)


def _rank_key(choice: PlannedChoice) -> tuple[bool, float]:
    """Those that fit first, the fastest first; then those that do not, the one that lacks least memory first."""
    if choice.fits:
        return False, -choice.tokens_per_s
    return True, -choice.memory_fit.margin_bytes


def simulate_variants(
    variants: list[RunVariant],
    job: PlannedJob,
    accumulations: list[int],
    settings: PlanConfig,
    on_progress: ProgressCallback,
) -> list[CostModel | str]:
    """The cost model of each variant, or a text that says why it cannot be simulated. Each is simulated in a worker process.

    `accumulations`: how many micro-batches of a step to simulate, for each variant. `on_progress` is called after each variant.
    """
    length = int(job.document_lengths.longest[0])
    cost_models: list[CostModel | str] = [""] * len(variants)
    workers = settings.workers or len(os.sched_getaffinity(0))
    # Import and build once here, before the workers are forked: otherwise each of them would do it.
    import trainer.planner.simulation  # noqa: F401
    from trainer.planner.model_blocks import block_pattern

    for variant in variants:
        block_pattern(variant.config.model)
    gc.freeze()  # the workers collect garbage often, and need not search the objects that exist now
    context = multiprocessing.get_context("fork")
    process_count = min(workers, max(1, len(variants)))
    with ProcessPoolExecutor(
        process_count, mp_context=context, initializer=_start_worker, initargs=(os.getpid(),)
    ) as pool:
        # The slowest simulations first, so that no worker is busy alone at the end.
        slowest_first = sorted(range(len(variants)), key=lambda index: -_duration_rank(variants[index]))
        index_by_future: dict[Future[CostModel | str], int] = {}
        for index in slowest_first:
            config = variants[index].config
            future = pool.submit(_simulate, config, length, accumulations[index], job, settings.exact)
            index_by_future[future] = index
        try:
            for done, future in enumerate(as_completed(index_by_future), 1):
                index = index_by_future[future]
                try:
                    cost_models[index] = future.result()
                except BrokenProcessPool:  # a worker was killed, and the pool stops all others
                    cost_models[index] = WORKER_KILLED
                on_progress(done, len(variants), " ".join(variants[index].overrides))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return cost_models


def _duration_rank(variant: RunVariant) -> int:
    """A number that is larger for variants whose simulation takes longer: ZeRO-3, then other stages of ZeRO, then the rest."""
    if variant.name == "zero3":
        return 2
    return 1 if variant.name.startswith("zero") else 0


def _start_worker(parent: int) -> None:
    """Prepare a new worker process: it ends with its parent, computes on one core, and drops what libraries print."""
    import torch

    die_with_parent(parent)
    torch.set_num_threads(1)
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _simulate(config: RunConfig, length: int, accumulation: int, job: PlannedJob, exact: bool) -> CostModel | str:
    """The cost model of a variant, or a text that says why it cannot be simulated. Runs in a worker process.

    `length`: tokens of the longest unit (a document, or both of a pair). `accumulation`: micro-batches to simulate.
    """
    from trainer.planner.simulation import simulate_cost_model_of_run

    # Objects that earlier variants imported and cached stay. Frozen, they cost the next garbage collections no time.
    gc.collect()
    gc.freeze()
    # Reductions in the last micro-batch alone are computed afterwards from this cost model (`with_deferred_reduction`).
    config = replace(config, strategy=strategy_for_simulation(config.strategy), precision=job.precision)
    sequences_per_unit = job.document_lengths.sequences_per_unit
    try:
        return simulate_cost_model_of_run(
            config,
            length // sequences_per_unit,
            accumulation=accumulation,
            world_size=job.world_size,
            local_world_size=job.ranks_per_node,
            exact=exact,
            expert_imbalance=job.imbalance_over(config.parallel.experts),
        )
    except ConfigError as error:
        return error.problems[0]
    except Exception as error:  # noqa: BLE001 - whatever an architecture does that cannot be simulated is told, not raised
        return why_not_simulated(error)
