"""The plan of what is recomputed, from the run's own model, longest micro-batch and memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from strategies import runtime as processes
from strategies.activation_plan import Activations, choose, measure
from strategies.base import (
    ActivationCheckpointing,
    DdpConfig,
    Precision,
    SingleConfig,
    StrategyConfig,
)
from strategies.errors import ConfigError
from strategies.memory import Pass, estimate
from strategies.mesh import replicas
from strategies.parameters import named_parameters
from trainer.data.config import Layout
from trainer.data.objective_spec import Reading
from trainer.data.store.sequences import Sample, TokenDataset
from trainer.model.architecture import width_and_blocks
from trainer.step import Built

USABLE = 0.9
"""Share of the device's memory that is planned with: the rest is for the libraries, collectives and fragments."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What one forward pass of a rank is made of, at most."""

    train: TokenDataset
    micro_batch: int
    """Documents (packs)."""
    row_tokens: int | None = None
    """Tokens of each pack; None where documents are not packed."""


def longest_micro_batch(built: Built, work: Workload) -> dict[str, Any]:
    """A micro-batch as large as any of the run can be: the longest documents together, every token supervised."""
    return micro_batch_of(built, longest_lengths(built.reading, work))


def longest_lengths(reading: Reading, work: Workload) -> list[int]:
    """Lengths in tokens of the sequences of a micro-batch as large as any of the run can be."""
    number = work.micro_batch * reading.sequences_per_document
    if work.row_tokens is not None:
        return [work.row_tokens] * work.micro_batch
    all_of = np.asarray(work.train.lengths)
    number = min(number, len(all_of))
    longest: list[int] = np.sort(np.partition(all_of, -number)[-number:])[::-1].tolist()
    return longest


def by_rule(built: Built, work: Workload) -> Pass:
    """The longest micro-batch for the rule of thumb of `strategies/memory.py`."""
    lengths = longest_lengths(built.reading, work)
    tokens = sum(lengths) if built.layout is Layout.padding_free else len(lengths) * max(lengths, default=0)
    return Pass(tokens, *width_and_blocks(built.plain))


def micro_batch_of(built: Built, lengths: list[int]) -> dict[str, Any]:
    """A micro-batch of sequences of these lengths in tokens, all supervised, on the CPU; their values mean nothing."""
    # Shapes do not depend on the values of marks, counts and means.
    samples = [Sample(np.zeros(n, np.int32), np.ones(n, dtype=bool), built.reading.marks) for n in lengths]
    batch = built.collator(samples)
    for rows in (batch, batch.get("replay", {})):
        if "attention_mask" in rows:  # transformers would look for padding in its values; rows are as long as they get
            rows["attention_mask"] = None
    batch["totals"] = dict.fromkeys(built.reading.counts(samples[0]), 1)
    batch["ahead"] = {term: torch.zeros(()) for term in built.step_module.objective.ahead}
    return batch


def measured(built: Built, work: Workload, precision: Precision) -> Activations:
    """What the longest micro-batch keeps for its backward pass; allocates nothing.

    Raises ConfigError for a model that looks at values on its way, of which there are none.
    """
    try:
        if built.two_sides is not None:
            raise ValueError("its two sides have lengths of their own")
        return measure(built.step_module, longest_micro_batch(built, work), precision)
    except (RuntimeError, NotImplementedError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"strategy.activation_checkpointing=auto: what a {built.config.model_type} model keeps cannot be counted "
            f"({' '.join(str(error).split())[:160]}); set it to none, selective or full"
        ) from error


def expected(
    built: Built,
    work: Workload,
    mode: ActivationCheckpointing,
    precision: Precision,
    modes: list[ActivationCheckpointing] | None = None,
) -> float | None:
    """Bytes of activations at the peak of the longest micro-batch under a mode, before memory has a say in it.

    `modes`: what was planned for each block, where it was. None where they cannot be counted.
    """
    mode = ActivationCheckpointing.none if mode is ActivationCheckpointing.auto else mode
    try:
        activations = measured(built, work, precision)
    except ConfigError:
        return None
    return activations.total(modes or [mode] * len(activations.none))


def plan_checkpointing(
    built: Built, work: Workload, strategy: StrategyConfig, precision: Precision, runtime: processes.Runtime
) -> None:
    """Resolve `activation_checkpointing=auto`: note each block's part in the step module, and why in the substitutions.

    All ranks must call; they follow rank 0.
    """
    if strategy.activation_checkpointing is not ActivationCheckpointing.auto:
        return
    activations = measured(built, work, precision)
    kept = model_state(built, strategy, precision, runtime)
    budget = strategy.memory_gib or device_gib(runtime) * USABLE
    modes, fits = choose(activations, budget * 2**30 - kept)
    modes = processes.broadcast_object(modes, runtime)
    built.step_module.plan.recomputation = modes
    built.activations = activations.total(modes)
    parts = [f"{mode} in {n} of {len(modes)} blocks" for mode in ActivationCheckpointing if (n := modes.count(mode))]
    peak = (kept + built.activations) / 2**30
    verdict = "" if fits else "; more than there is: lower batch.micro or data.max_length, or shard more"
    built.substitutions["strategy.activation_checkpointing"] = (
        f"auto -> {', '.join(parts) or 'none'} (estimated peak {peak:.2f} of {budget:.2f} GiB{verdict})"
    )


def model_state(built: Built, strategy: StrategyConfig, precision: Precision, runtime: processes.Runtime) -> float:
    """Bytes of parameters, gradients and optimizer state on one rank, copies in the compute type included."""
    replicate = replicas(strategy, runtime.world_size, runtime.hosts)
    state = Pass(activations=0.0)
    world = runtime.world_size
    total = estimate(built.step_module, strategy, precision, world_size=world, replicate=replicate, load=state).total
    if isinstance(strategy, SingleConfig | DdpConfig) and precision is not Precision.fp32:
        total += 2 * sum(p.numel() for _, p in named_parameters(built.step_module) if p.requires_grad)  # autocast's
    return total


def device_gib(runtime: processes.Runtime) -> float:
    """Memory of this rank's device in GiB; on a CPU its part of what the host, or the cgroup of the job, has."""
    if runtime.device.type == "cuda":
        return torch.cuda.get_device_properties(runtime.device).total_memory / 2**30
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(total, processes.cgroup_memory() or total) / runtime.local_world_size / 2**30


def expect_memory(
    built: Built, work: Workload, strategy: StrategyConfig, precision: Precision, runtime: processes.Runtime
) -> None:
    """Note in `built` what memory a rank is expected to take. Needs the model before it is sharded; no collective."""
    activations = built.activations
    if activations is None:
        world, replicate = runtime.world_size, replicas(strategy, runtime.world_size, runtime.hosts)
        load = by_rule(built, work)
        activations = estimate(
            built.step_module, strategy, precision, world_size=world, replicate=replicate, load=load
        ).activations
    built.expected = model_state(built, strategy, precision, runtime), activations
