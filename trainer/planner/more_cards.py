"""If nothing fits: how many cards would do, for a strategy that shards the model among all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from strategies.base import StrategyName
from strategies.tensor_inventory import MemoryKind
from trainer.config.parallel import dp_size_of
from trainer.planner.fit_check import NotSimulated
from trainer.planner.plan import EnoughCards, PlannedChoice, PlannedJob, plan_choice
from trainer.planner.sweep import PlanAnswer, ProgressCallback, simulate_variants
from trainer.planner.variants import PlanConfig

SHARDING_STRATEGIES = (StrategyName.fsdp2, StrategyName.zero3)
SHARDED_KINDS = (MemoryKind.parameters, MemoryKind.gradients, MemoryKind.optimizer)
"""What FSDP2 and ZeRO-3 divide by the number of cards."""
MAX_TIMES_AS_MANY_CARDS = 64
MAX_SIMULATIONS = 2
"""Each takes as long as one option of the plan."""


def find_enough_cards(
    answer: PlanAnswer, settings: PlanConfig, on_progress: ProgressCallback, *, max_ranks_per_node: int
) -> EnoughCards | None:
    """Find how many cards would do for the run of `answer`, in which nothing fits; None if no number is found.

    Tried is the choice that lacks least memory among those that shard the whole model (FSDP2, ZeRO-3). Doubles the cards: first
    those of a node, up to `max_ranks_per_node`, then the nodes. A number of cards is simulated only if it could do: if the card
    lacks no more than what would go to the further cards. None also if no such choice was planned, or if the host lacks memory.
    """
    smallest = next((choice for choice in answer.best_choices if choice.variant.name in SHARDING_STRATEGIES), None)
    if smallest is None or not smallest.fits_host:
        return None
    sharded_bytes = sum(smallest.memory_peak.bytes_by_kind.get(kind, 0) for kind in SHARDED_KINDS)
    num_simulations = 0
    for job in _jobs_with_more_cards(answer.planned_run, smallest, max_ranks_per_node):
        moved_bytes = sharded_bytes * (1 - answer.planned_run.world_size / job.world_size)
        if smallest.memory_fit.margin_bytes + moved_bytes < 0:
            continue
        if num_simulations == MAX_SIMULATIONS:
            break
        num_simulations += 1
        accumulation = job.global_batch // (dp_size_of(smallest.variant.config, job.world_size) * smallest.micro_batch)
        (cost_model,) = simulate_variants([smallest.variant], job, [min(2, accumulation)], settings, on_progress)
        if isinstance(cost_model, NotSimulated):
            break
        choice = plan_choice(smallest.variant, cost_model, job, smallest.micro_batch)
        if choice.fits:
            return EnoughCards(job.num_nodes, job.ranks_per_node, choice)
    return None


def _jobs_with_more_cards(job: PlannedJob, choice: PlannedChoice, max_ranks_per_node: int) -> Iterator[PlannedJob]:
    """`job` with twice as many cards, four times as many, and so on; the global batch is rounded up to what they can share."""
    num_nodes = job.num_nodes
    ranks_per_node = job.ranks_per_node
    while num_nodes * ranks_per_node < MAX_TIMES_AS_MANY_CARDS * job.world_size:
        if 2 * ranks_per_node <= max_ranks_per_node:
            ranks_per_node *= 2
        else:
            num_nodes *= 2
        num_documents = choice.micro_batch * dp_size_of(choice.variant.config, num_nodes * ranks_per_node)
        yield replace(
            job,
            num_nodes=num_nodes,
            ranks_per_node=ranks_per_node,
            global_batch=math.ceil(job.global_batch / num_documents) * num_documents,
        )
