"""Rules of strategies: ranks, replicas, offloading, precision. One line a problem."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from strategies.base import ActivationCheckpointing, Fsdp2Config, Precision, StrategyConfig, StrategyName, ZeroConfig
from trainer.config.parallel import (
    EXPERT_PARALLEL_REMEDY,
    NO_EXPERT_PARALLELISM_SETTING,
    NO_EXPERTS_REASON_BY_STRATEGY,
    NO_MATRIX_OPTIMIZER_REASON,
    sequence_parallel_problems,
)
from trainer.config.run import Device, RunConfig
from trainer.data.config import Layout
from trainer.model.config import Attention, ModelKind
from trainer.objectives.registry import objective_family
from trainer.optim.support import OPTIMIZER_SUPPORT, Needs


def sharding_problems(config: RunConfig, world_size: int | None) -> Iterator[str]:
    """Check that the other settings fit the strategy (how the model is distributed over ranks); yields error messages.

    `world_size` is the number of ranks; None if it is not known, which leaves out the rules about it.
    """
    strategy = config.strategy
    if strategy.name is StrategyName.single and world_size is not None and world_size > 1:
        yield f"strategy=single: runs in one process, not {world_size}; take strategy=ddp, or launcher.processes=1"
    yield from sequence_parallel_problems(config, world_size, str(strategy.name))
    if config.parallel.sequence > 1:
        yield from _sequence_parallel_conflicts(config)
    if config.parallel.experts > 1:
        yield from _expert_parallel_problems(config, world_size)
    on_cpu = config.run.device is Device.cpu
    if config.precision is Precision.fp16 and on_cpu:
        yield "precision=fp16: not supported on CPUs; set precision=bf16 or precision=fp32"
    # Two settings are chosen by a plan of the memory, which `strategy.memory_gib` gives.
    plans_by_memory = strategy.activation_checkpointing is ActivationCheckpointing.auto
    plans_by_memory |= isinstance(strategy, Fsdp2Config) and strategy.defer_sync is None
    if strategy.memory_gib is not None and not plans_by_memory:
        yield (
            f"strategy.memory_gib={strategy.memory_gib:g}: is what strategy.activation_checkpointing=auto, and "
            "strategy.defer_sync=null under fsdp2 and hsdp, plan for; set one of them, or strategy.memory_gib=null"
        )
    yield from _long_rows_problems(strategy)
    if isinstance(strategy, Fsdp2Config):
        yield from _replicas_problems(strategy, config, world_size)
    if isinstance(strategy, ZeroConfig):
        yield from _zero_problems(strategy)


def _long_rows_problems(strategy: StrategyConfig) -> Iterator[str]:
    """Check the two options that save memory with long rows against recomputation and compiled blocks; yields error messages.

    These are the MLP computed in tiles of tokens (`strategy.mlp_tokens`), and inputs of recomputed blocks that are kept in host
    memory (`strategy.offload_activations`).
    """
    mode = strategy.activation_checkpointing
    recomputation = f"strategy.activation_checkpointing={mode}"
    if strategy.mlp_tokens is not None:
        setting = f"strategy.mlp_tokens={strategy.mlp_tokens}"
        if mode is ActivationCheckpointing.selective:
            yield (
                f"{setting} with {recomputation}: selective recomputation keeps the MLP's products, which tiles are there to "
                "let go of; set strategy.activation_checkpointing=full, or strategy.mlp_tokens=null"
            )
        if mode is ActivationCheckpointing.auto:
            yield (
                f"{setting} with {recomputation}: auto counts what blocks keep without tiles, and may choose selective; set "
                "strategy.activation_checkpointing=full, or strategy.mlp_tokens=null"
            )
    if strategy.offload_activations and mode is ActivationCheckpointing.none:
        yield (
            f"strategy.offload_activations=true with {recomputation}: the inputs of recomputed blocks wait on the host, and "
            "no block is recomputed; set strategy.activation_checkpointing=full, or strategy.offload_activations=false"
        )
    for key, is_set in (("mlp_tokens", strategy.mlp_tokens), ("offload_activations", strategy.offload_activations)):
        if strategy.compile and is_set:
            yield (
                f"strategy.{key} with strategy.compile=true: it is not proven to take the same steps compiled; set "
                "strategy.compile=false"
            )


def _sequence_parallel_conflicts(config: RunConfig) -> Iterator[str]:
    """Check what does not go with sequence parallelism, in which ranks share each row (`parallel.sequence`); yields messages.

    What depends on the model is checked when its files are read.
    """
    setting = f"parallel.sequence={config.parallel.sequence}"
    if objective_family(config.objective).kind is ModelKind.encoder_decoder:
        yield (
            f"{setting}: objective={config.objective.name} has two rows for each document, and padding in both; set "
            "parallel.sequence=1"
        )
    if config.data.layout is Layout.padded:
        yield f"{setting}: rows with padding are not cut; set data.layout=padding_free, or parallel.sequence=1"
    if config.model.attention in (Attention.sdpa, Attention.eager):
        yield (
            f"{setting}: model.attention={config.model.attention} takes rows with padding, which are not cut; set "
            "model.attention=auto, or parallel.sequence=1"
        )
    if config.strategy.compile:
        yield f"{setting}: is not proven with compiled blocks; set strategy.compile=false, or parallel.sequence=1"


def _expert_parallel_problems(config: RunConfig, world_size: int | None) -> Iterator[str]:
    """Check what does not go with expert parallelism, in which a group of ranks shares a layer's experts; yields messages.

    `parallel.experts` is the size of a group. What depends on the model is checked when its files are read. The last rule,
    that the groups divide the ranks of a replica, is only checked under FSDP2 and HSDP, and if the number of ranks is known
    and divides into replicas.
    """
    expert_ranks = config.parallel.experts
    setting = f"parallel.experts={expert_ranks}"
    strategy = config.strategy
    if strategy.name in NO_EXPERTS_REASON_BY_STRATEGY:
        reason = NO_EXPERTS_REASON_BY_STRATEGY[strategy.name]
        yield f"{setting} with strategy={strategy.name}: {reason}; use {EXPERT_PARALLEL_REMEDY}"
        return
    if OPTIMIZER_SUPPORT[config.optim.name].needs is Needs.whole_matrices:
        remedy = f"use optim=adamw, or set {NO_EXPERT_PARALLELISM_SETTING}"
        yield f"{setting} with optim={config.optim.name}: {NO_MATRIX_OPTIMIZER_REASON}; {remedy}"
    if strategy.compile:
        yield f"{setting}: is not proven with compiled blocks; set strategy.compile=false, or {NO_EXPERT_PARALLELISM_SETTING}"
    if not isinstance(strategy, Fsdp2Config):  # it is chosen later
        return

    replicas = num_replicas_of(strategy, config)
    if world_size is None or world_size % replicas:  # the latter is reported by itself
        return
    ranks_per_replica = world_size // replicas
    if ranks_per_replica % expert_ranks == 0:
        return

    # Remedies: another size of the groups, or other replicas.
    ranks_text = "the ranks of a replica" if replicas > 1 else "the number of ranks"
    legal_degrees = [str(divisor) for divisor in range(2, ranks_per_replica + 1) if ranks_per_replica % divisor == 0]
    remedy = f"set one of {', '.join(legal_degrees)}" if legal_degrees else f"set {NO_EXPERT_PARALLELISM_SETTING}"
    if world_size % expert_ranks == 0:
        fewer_replicas = world_size // expert_ranks
        remedy += f", or strategy.replicate={fewer_replicas}" if fewer_replicas > 1 else ", or strategy=fsdp2"
    yield f"{setting}: must divide {ranks_text}, {ranks_per_replica}, so that every group is whole; {remedy}"


def num_replicas_of(strategy: StrategyConfig, config: RunConfig) -> int:
    """How many replicas of the model the settings ask for; 1 unless the strategy is hsdp.

    Under hsdp it is `strategy.replicate`, or without it one for each node, and at least two.
    """
    if not isinstance(strategy, Fsdp2Config) or strategy.name is StrategyName.fsdp2:
        return 1
    return strategy.replicate or max(2, config.launcher.nodes)


def _replicas_problems(strategy: Fsdp2Config, config: RunConfig, world_size: int | None) -> Iterator[str]:
    """Check that the ranks divide into replicas of the model (hsdp), and that none are asked of fsdp2; yields messages.

    Both strategies have the class `Fsdp2Config`.
    """
    if strategy.name is StrategyName.fsdp2:
        if strategy.replicate != 1:
            yield f"strategy.replicate={strategy.replicate}: replicas need strategy=hsdp; set one of the two"
        return
    replicas = num_replicas_of(strategy, config)
    # A single rank cannot be divided into replicas, although `strategy.replicate=1` divides 1.
    if world_size is not None and (world_size == 1 or world_size % replicas):
        legal = [str(divisor) for divisor in range(2, world_size + 1) if world_size % divisor == 0]
        remedy = f"set one of {', '.join(legal)}" if legal else "choose strategy=fsdp2, or more launcher.processes"
        yield f"strategy.replicate={replicas}: must divide the number of ranks, {world_size}; {remedy}"


def _zero_problems(strategy: ZeroConfig) -> Iterator[str]:
    """Check the settings of DeepSpeed's ZeRO: its stage, and whether that stage can offload as asked; yields error messages.

    Offloading keeps the optimizer's state, or parameters, in host memory (cpu) or on a drive (nvme).
    """
    places = ("none", "cpu", "nvme")
    if strategy.name.value != f"zero{strategy.stage}":
        own_stage = strategy.name.value.removeprefix("zero")
        yield (
            f"strategy.stage={strategy.stage}: strategy={strategy.name} always uses stage {own_stage}; use "
            f"strategy=zero{strategy.stage}"
        )
    for key in ("offload_optimizer", "offload_parameters"):
        value = getattr(strategy, key)
        if value not in places:
            yield f"strategy.{key}={value}: must be one of {', '.join(places)}; none keeps it on the device"
        if value == "nvme" and strategy.nvme_path is None:
            yield f"strategy.{key}=nvme: needs strategy.nvme_path, a directory on a local NVMe drive; or use cpu"
    if strategy.offload_parameters != "none" and strategy.stage != 3:
        place = strategy.offload_parameters
        yield f"strategy.offload_parameters={place}: only stage 3 shards parameters; use strategy=zero3"
    if strategy.offload_optimizer == "nvme" and strategy.stage != 3:
        yield "strategy.offload_optimizer=nvme: only stage 3 can; use strategy=zero3, or offload_optimizer=cpu"
    if strategy.nvme_path is not None and not Path(strategy.nvme_path).expanduser().is_dir():
        yield f"strategy.nvme_path={strategy.nvme_path}: no such directory; make it on a local NVMe drive"
