"""How the ranks share a single row of documents and a layer's experts, and what follows for the arithmetic of batches.

Data parallelism (`strategy`) gives each rank documents of its own. With `parallel.sequence=n`, `n` neighbouring ranks form a
sequence-parallel group: they read the same documents, and each holds a slice of their tokens. Such a group counts as one
data-parallel rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from strategies.base import Fsdp2Config, StrategyConfig, StrategyName
from strategies.settings import number

ONE_PROCESS_REASON = "strategy=single is one process, and a row is shared by several"
NO_SEQUENCE_PARALLELISM_REMEDY = "parallel.sequence=1, or use strategy=fsdp2"
"""Why `strategy=single` shares no rows, and what to set instead."""
NO_EXPERTS_REASON_BY_STRATEGY = {
    StrategyName.single: "it is one process, and experts are distributed over several",
    StrategyName.ddp: "every rank holds the whole model, and so all experts",
    **dict.fromkeys(
        (StrategyName.zero1, StrategyName.zero2, StrategyName.zero3),
        "DeepSpeed shards by its own rules, which know no experts that ranks hold whole",
    ),
}
"""Why a strategy does not distribute experts over ranks; the other strategies do."""
EXPERT_PARALLEL_REMEDY = "strategy=fsdp2 or hsdp, or set parallel.experts=1"
"""What to use where a strategy does not distribute experts."""
NO_MATRIX_OPTIMIZER_REASON = (
    "it needs whole matrices, and is not proven where ranks hold other experts than their neighbours"
)
"""Why an optimizer of matrices does not train distributed experts."""
NO_EXPERT_PARALLELISM_SETTING = "parallel.experts=1"
"""What to set if experts cannot be distributed."""


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """What the ranks share besides data and parameters."""

    sequence: int = number(1, least=1, advice="1 gives each rank documents of its own; 2, 4 or 8 for long documents")
    """Number of ranks that share each row (sequence parallelism). Each holds a slice of the row's tokens, and attention
    exchanges slices for heads (DeepSpeed Ulysses). Set it if a document does not fit on one GPU. At most the number of query
    heads, and the number of ranks must be a multiple of it."""
    experts: int = number(
        1, least=1, advice="1 gathers all experts of a layer on each rank; 2, 4 or 8 for large mixtures"
    )
    """Number of ranks over which the experts of a layer are distributed (expert parallelism). Tokens are sent to the ranks of
    their experts and back. Set it for large mixtures of experts (docs/mixtures.md). Needs `strategy=fsdp2` or `hsdp`. It must
    divide the number of experts of a layer and the number of ranks of a replica."""


class BatchedRun(Protocol):
    """The part of a configuration that says how a global batch is divided."""

    batch: dict[str, Any]
    parallel: ParallelConfig


def parallel_for_evaluation(
    training_parallel: ParallelConfig, strategy: StrategyConfig, replica_size: int
) -> ParallelConfig:
    """How ranks share rows and experts when a model is evaluated that was trained with `training_parallel`.

    - Sequence parallelism is dropped: each rank generates answers for prompts of its own.
    - Expert parallelism stays under FSDP2 and HSDP (whose settings are `Fsdp2Config`), since all experts of a layer may not fit
      on one rank. `replica_size`: ranks of a replica.
    """
    if not isinstance(strategy, Fsdp2Config):
        return ParallelConfig()
    # The largest degree that divides both: what divides the degree of the training divides the number of experts, too.
    return ParallelConfig(experts=math.gcd(training_parallel.experts, replica_size))


def dp_size_of(config: BatchedRun, world_size: int) -> int:
    """How many ranks read documents of their own (data-parallel): a group of ranks that share each row counts as one."""
    return world_size // config.parallel.sequence


def accumulation_steps(config: BatchedRun, world_size: int) -> int:
    """Micro-batches of each data-parallel rank in one optimizer step, rounded up.

    Only generated answers (`objective=grpo`) need not divide evenly.
    """
    documents_per_pass = config.batch["micro"] * dp_size_of(config, world_size)
    return math.ceil(int(config.batch["global"]) / documents_per_pass)


def samples_per_dp_rank(config: BatchedRun, world_size: int) -> int:
    """How many documents (or generated answers) of a step each data-parallel rank takes, at most."""
    return math.ceil(int(config.batch["global"]) / dp_size_of(config, world_size))


def sequence_parallel_problems(config: BatchedRun, world_size: int | None, strategy_name: str) -> Iterator[str]:
    """Check that the ranks divide into groups that share rows (`parallel.sequence`); yields error messages.

    `world_size`: number of ranks; None if it is not known.
    """
    degree = config.parallel.sequence
    if degree == 1:
        return
    if strategy_name == "single":
        yield f"parallel.sequence={degree}: {ONE_PROCESS_REASON}; set {NO_SEQUENCE_PARALLELISM_REMEDY}"
    elif world_size is not None and world_size % degree:
        legal = [str(divisor) for divisor in range(1, world_size + 1) if world_size % divisor == 0]
        yield (
            f"parallel.sequence={degree}: must divide the number of ranks, {world_size}, so that every group is whole; set "
            f"one of {', '.join(legal)}"
        )
