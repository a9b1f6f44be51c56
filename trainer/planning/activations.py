"""The plan of what is recomputed, from the run's own model, longest micro-batch and memory."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from strategies import runtime as processes
from strategies.activation_plan import Activations, choose, measure
from strategies.base import ActivationCheckpointing, DdpConfig, Fsdp2Config, Precision, SingleConfig, StrategyName
from strategies.errors import ConfigError
from strategies.memory import estimate
from strategies.mesh import replicate_degree
from strategies.parameters import named_parameters
from trainer.config.run import RunConfig
from trainer.data.batches.collate import collate
from trainer.data.prepare import Prepared
from trainer.data.store.sequences import DESIRABLE, REPLAY, UNDESIRABLE, Sample
from trainer.model.loading import Built
from trainer.objectives.build import holds

USABLE = 0.9
"""Share of the device's memory that is planned with: the rest is for the libraries, collectives and fragments."""


def longest_micro_batch(config: RunConfig, built: Built, data: Prepared) -> dict[str, Any]:
    """A micro-batch as large as any of the run can be: the longest documents together, every token supervised."""
    per = built.step_module.objective.sequences_per_document
    number = config.batch["micro"] * per
    lengths = np.sort(np.asarray(data.train.lengths))[::-1][:number].tolist()
    if config.data.packing:
        lengths = [config.data.max_length] * config.batch["micro"]
    rated, replays = built.step_module.objective.looks_ahead, holds(config.objective)
    marks: dict[str, Any] = {"label": None if data.train.labels is None else 0, "replay": True if replays else None}
    marks |= {"reference": 0.0 if per > 1 or rated else None, "desirable": True if rated else None}
    samples = [Sample(np.zeros(n, np.int32), np.ones(n, dtype=bool), **marks) for n in lengths]
    batch = collate(samples, built.layout, 0)
    for rows in (batch, batch.get("replay", {})):
        if "attention_mask" in rows:  # transformers would look for padding in its values; rows are as long as they get
            rows["attention_mask"] = None
    # Shapes do not depend on these numbers.
    batch["totals"] = dict.fromkeys(("loss", DESIRABLE, UNDESIRABLE, REPLAY), 1)
    if rated:
        batch["ahead"] = {"kl": torch.zeros(())}
    return batch


def measured(config: RunConfig, built: Built, data: Prepared, precision: Precision) -> Activations:
    """What the longest micro-batch keeps for its backward pass; allocates nothing.

    Raises ConfigError for a model that looks at values on its way, of which there are none.
    """
    try:
        if built.two_sides is not None:
            raise ValueError("its two sides have lengths of their own")
        return measure(built.step_module, longest_micro_batch(config, built, data), precision)
    except (RuntimeError, NotImplementedError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"strategy.activation_checkpointing=auto: what a {built.config.model_type} model keeps cannot be counted "
            f"({' '.join(str(error).split())[:160]}); set it to none, selective or full"
        ) from error


def expected(config: RunConfig, built: Built, data: Prepared, precision: Precision) -> float | None:
    """Bytes of activations at the peak of the longest micro-batch under the setting, before memory has a say in it.

    None where they cannot be counted.
    """
    mode = config.strategy.activation_checkpointing
    mode = ActivationCheckpointing.none if mode is ActivationCheckpointing.auto else mode
    try:
        activations = measured(config, built, data, precision)
    except ConfigError:
        return None
    return activations.total([mode] * len(activations.none))


def plan_checkpointing(
    config: RunConfig, built: Built, data: Prepared, precision: Precision, runtime: processes.Runtime
) -> None:
    """Resolve `activation_checkpointing=auto`: note each block's part in the step module, and why in the substitutions.

    All ranks must call; they follow rank 0.
    """
    if config.strategy.activation_checkpointing is not ActivationCheckpointing.auto:
        return
    activations = measured(config, built, data, precision)
    kept = model_state(config, built, precision, runtime)
    budget = config.strategy.memory_gib or device_gib(runtime) * USABLE
    modes, fits = choose(activations, budget * 2**30 - kept)
    modes = processes.broadcast_object(modes, runtime)
    built.step_module.checkpointing = modes
    parts = [f"{mode} in {n} of {len(modes)} blocks" for mode in ActivationCheckpointing if (n := modes.count(mode))]
    peak = (kept + activations.total(modes)) / 2**30
    verdict = "" if fits else "; more than there is: lower batch.micro or data.max_length, or shard more"
    built.substitutions["strategy.activation_checkpointing"] = (
        f"auto -> {', '.join(parts) or 'none'} (estimated peak {peak:.2f} of {budget:.2f} GiB{verdict})"
    )


def model_state(config: RunConfig, built: Built, precision: Precision, runtime: processes.Runtime) -> float:
    """Bytes of parameters, gradients and optimizer state on one rank, copies in the compute type included."""
    replicate = 1
    strategy = config.strategy
    if isinstance(strategy, Fsdp2Config) and (strategy.name is StrategyName.hsdp or strategy.replicate != 1):
        replicate = replicate_degree(0 if strategy.replicate == 1 else strategy.replicate, runtime)
    world = runtime.world_size
    total = estimate(
        built.step_module,
        config.strategy,
        precision,
        world_size=world,
        replicate=replicate,
        micro_tokens=0,
        width=0,
        blocks=0,
        activations=0.0,
    ).total
    if isinstance(config.strategy, SingleConfig | DdpConfig) and precision is not Precision.fp32:
        total += 2 * sum(p.numel() for _, p in named_parameters(built.step_module) if p.requires_grad)  # autocast's
    return total


def device_gib(runtime: processes.Runtime) -> float:
    """Memory of this rank's device in GiB; on a CPU its part of what the host, or the cgroup of the job, has."""
    if runtime.device.type == "cuda":
        return torch.cuda.get_device_properties(runtime.device).total_memory / 2**30
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(total, processes.cgroup_memory() or total) / runtime.local_world_size / 2**30
