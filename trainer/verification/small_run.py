"""The configuration of a run, on a small copy of its model: what stays as it is, and what must be another."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from strategies.base import ActivationCheckpointing, Fsdp2Config, Precision, SingleConfig, StrategyConfig, StrategyName
from strategies.errors import ConfigError
from trainer.config.parallel import ParallelConfig, accumulation_steps
from trainer.config.run import AUTO, LauncherConfig, RunConfig
from trainer.objectives.base import ObjectiveConfig
from trainer.objectives.registry import objective_family
from trainer.optim.config import SgdConfig
from trainer.optim.schedule import ScheduleConfig, ScheduleName
from trainer.tuning.base import TuningConfig
from trainer.verification.documents import MAX_LENGTH

NUM_DP_RANKS = 2
"""Ranks, or groups of ranks that share a row, with documents of their own."""
NUM_REPLICAS = 2
"""Replicas with hsdp."""
NUM_SHARDS_OF_REPLICA = 2
RANKS_WITH_SAME_EXPERTS = 2
GRADIENT_READING_LR = 2.0**20
"""Learning rate of the one step. The gradient is computed as the difference of the weights divided by this rate. With a high
rate, rounding the weights loses nothing of it; a power of two adds no rounding error."""
MAX_MICRO_BATCH = 3
MAX_ADAPTER_RANK = 16
"""Rank of an adapter at most: matrices of a small copy have no more than a few dozen rows."""
MAX_TILE_TOKENS = 16
"""Tokens of a tile of the MLP at most: drawn documents have a few dozen each."""
MAX_PERSISTENCE_THRESHOLD = 100
"""Elements from which ZeRO-3 shards a parameter: with the usual threshold it would shard nothing of a small copy."""


@dataclass(slots=True)
class SmallRun:
    """A run as a verification compares it: the user's settings on a small copy of the model, with the ranks that it takes."""

    config: RunConfig
    ranks: int
    accumulation: int
    changes: list[str] = field(default_factory=list)
    """Settings that are not as the user has them, a line each."""

    def single_process_config(self, precision: Precision) -> RunConfig:
        """The configuration of the same step by one process: `strategy=single`, one micro-batch, nothing recomputed."""
        global_batch = self.config.batch["global"]
        return replace(
            self.config,
            # Its defaults recompute nothing, shard nothing and move nothing to the host.
            strategy=SingleConfig(),
            parallel=ParallelConfig(),
            batch={"global": global_batch, "micro": global_batch},
            precision=precision,
        )


def fewest_ranks_of_group(num_ranks: int) -> int:
    """How many ranks share a row, or a layer's experts, in the comparison, if `num_ranks` do so in the user's run.

    The fewest above 1 by which that number can be divided: 2 for 8, 3 for 9; 1 if it is 1.
    """
    return next((divisor for divisor in range(2, num_ranks + 1) if num_ranks % divisor == 0), 1)


def num_ranks_for_verification(config: RunConfig) -> int:
    """The fewest ranks that exercise every kind of communication of the run; the verification starts so many processes.

    There are two data-parallel ranks, each of which is one process or a group of processes that share rows. With hsdp there are
    two replicas of two shards. With expert parallelism, two ranks have each expert, in one replica or in two.
    """
    ranks = NUM_DP_RANKS * fewest_ranks_of_group(config.parallel.sequence)
    if config.strategy.name is StrategyName.hsdp:
        ranks = max(ranks, NUM_SHARDS_OF_REPLICA * NUM_REPLICAS)
    if config.parallel.experts > 1:
        ranks = math.lcm(ranks, RANKS_WITH_SAME_EXPERTS * fewest_ranks_of_group(config.parallel.experts))
    return ranks


def small_run_config(config: RunConfig, model: Path, teacher: Path | None, *, user_ranks: int | None) -> SmallRun:
    """The run on the small copies in `model` and `teacher`, with every setting that a small copy or few ranks need changed.

    What the user may notice is listed in `changes` of the result. `user_ranks`: ranks of the run itself; None if not known.
    Raises ConfigError for an objective whose model writes the answers that it learns from, since a random model writes nothing
    worth comparing.
    """
    if objective_family(config.objective).rollout is not None:
        raise ConfigError(
            f"objective={config.objective.name}: the model writes what it learns from, and a random small copy writes nothing "
            "worth comparing; verify the same strategy and tuning with objective=sft"
        )
    changes: list[str] = []
    ranks = num_ranks_for_verification(config)
    degree = fewest_ranks_of_group(config.parallel.sequence)
    if degree != config.parallel.sequence:
        changes.append(f"parallel.sequence={config.parallel.sequence} -> {degree}: the fewest ranks that share a row")
    expert_degree = fewest_ranks_of_group(config.parallel.experts)
    if expert_degree != config.parallel.experts:
        changes.append(
            f"parallel.experts={config.parallel.experts} -> {expert_degree}: the fewest ranks over which they go"
        )
    user_micro = config.batch["micro"]
    micro = 2 if user_micro == AUTO else min(int(user_micro), MAX_MICRO_BATCH)
    accumulation = _accumulation_steps(config, user_ranks)
    # The next two also append to `changes`.
    strategy = _small_strategy(config.strategy, changes)
    small = replace(
        config,
        run=replace(config.run, dir=None, resume="never", timeout_s=min(config.run.timeout_s, 300)),
        model=replace(
            config.model,
            path=str(model),
            tokenizer=None,
            revision=None,
            download=False,
            chat_template=None,
            dropout=0.0,
            adapters=[],
            keep_packed=False,
        ),
        data=replace(config.data, path=None, sources={}, max_length=MAX_LENGTH, max_documents=None),
        parallel=replace(config.parallel, sequence=degree, experts=expert_degree),
        batch={"global": micro * (ranks // degree) * accumulation, "micro": micro},
        tuning=_small_tuning(config.tuning, changes),
        objective=_objective_with_small_teacher(config.objective, teacher),
        strategy=strategy,
        optim=SgdConfig(lr=GRADIENT_READING_LR, momentum=0.0, max_grad_norm=0.0),
        schedule=ScheduleConfig(name=ScheduleName.constant, warmup_share=0.0),
        export=replace(config.export, at_end=False),
        launcher=LauncherConfig(processes=ranks),
    )
    if config.model.dropout:
        changes.append(f"model.dropout={config.model.dropout:g} -> 0, since it draws by rank")
    if config.model.adapters:
        changes.append("model.adapters are left out: they fit the model, not its copy")
    return SmallRun(small, ranks, accumulation, changes)


def _accumulation_steps(config: RunConfig, user_ranks: int | None) -> int:
    """How many micro-batches the compared step has: 2 if the run accumulates gradients, or if that is not known; else 1."""
    # 1 is the default on a machine without GPUs, which says nothing about the ranks of the run.
    ranks_known = user_ranks is not None and user_ranks > 1 and user_ranks >= config.parallel.sequence
    if not ranks_known or user_ranks is None or config.batch["micro"] == AUTO:
        return 2
    return min(2, max(1, accumulation_steps(config, user_ranks)))


def _small_strategy(strategy: StrategyConfig, changes: list[str]) -> StrategyConfig:
    """Adapt the strategy to a small copy on one host; appends a line to `changes` for each setting that the user may notice.

    Replicas and ZeRO-3's threshold give no line: with these numbers, the copy is sharded in the way that the model is.
    """
    changed: dict[str, Any] = {}
    if strategy.activation_checkpointing is ActivationCheckpointing.auto:
        changed["activation_checkpointing"] = ActivationCheckpointing.full
        changes.append("strategy.activation_checkpointing=auto -> full, since a small copy would need none")
    if strategy.mlp_tokens is not None and strategy.mlp_tokens > MAX_TILE_TOKENS:
        changed["mlp_tokens"] = MAX_TILE_TOKENS
        changes.append(
            f"strategy.mlp_tokens={strategy.mlp_tokens} -> {MAX_TILE_TOKENS}, so that a slice has several tiles"
        )
    if isinstance(strategy, Fsdp2Config) and strategy.name is StrategyName.hsdp:
        changed["replicate"] = NUM_REPLICAS
    if hasattr(strategy, "persistence_threshold"):
        changed["persistence_threshold"] = min(strategy.persistence_threshold, MAX_PERSISTENCE_THRESHOLD)
    for name in ("offload_optimizer", "offload_parameters"):
        if getattr(strategy, name, None) == "nvme":
            changed[name] = "cpu"
            changes.append(f"strategy.{name}=nvme -> cpu")
    return replace(strategy, **changed)


def _objective_with_small_teacher(objective: ObjectiveConfig, teacher: Path | None) -> ObjectiveConfig:
    """The objective with the small copy of its teacher, if it has one."""
    if teacher is None:
        return objective
    settings: Any = objective
    return replace(settings, teacher=replace(settings.teacher, path=str(teacher), revision=None))


def _small_tuning(tuning: TuningConfig, changes: list[str]) -> TuningConfig:
    """Adapt the tuning method to a small copy: no dropout, which differs by rank; ranks and layers that the copy has.

    Appends a line to `changes` for each setting that the user may notice.
    """
    names = {declared.name for declared in fields(tuning)}
    settings: Any = tuning
    changed: dict[str, Any] = {}
    if getattr(tuning, "dropout", 0.0):
        changed["dropout"] = 0.0
        changes.append(f"tuning.dropout={settings.dropout:g} -> 0, since it draws by rank")
    if getattr(tuning, "from_", None):
        changed["from_"] = None
        changes.append("tuning.from is left out: it fits the model, not its copy")
    for name in ("rank", "init_rank"):
        if name in names and getattr(tuning, name) > MAX_ADAPTER_RANK:
            changed[name] = MAX_ADAPTER_RANK
            changes.append(f"tuning.{name}={getattr(tuning, name)} -> {MAX_ADAPTER_RANK}")
    if "target_rank" in names:
        # At most half, so that AdaLoRA has ranks to take away.
        changed["target_rank"] = min(settings.target_rank, changed.get("init_rank", settings.init_rank) // 2)
    if getattr(tuning, "rank_pattern", None):
        changed["rank_pattern"] = {name: min(rank, MAX_ADAPTER_RANK) for name, rank in settings.rank_pattern.items()}
    if getattr(tuning, "layers", None):
        changed["layers"] = "last-1"
        changes.append(f"tuning.layers={settings.layers} -> last-1")
    if getattr(tuning, "options", None):
        changed["options"] = {name: 0.0 if "dropout" in name else option for name, option in settings.options.items()}
    return replace(tuning, **changed)
