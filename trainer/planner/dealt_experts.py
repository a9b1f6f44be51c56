"""Over how many ranks a plan tries to deal the experts of a layer (`parallel.experts`)."""

from __future__ import annotations

from dataclasses import replace

from strategies.base import Fsdp2Config
from trainer.build.experts import models_on_meta, problems_of_models
from trainer.config.run import RunConfig
from trainer.tuning.expert_parts import expert_modules

DEGREES = (2, 4, 8)
"""Ranks over which a plan tries to deal the experts of a layer, beside 1."""


def with_dealt_experts(configs: list[RunConfig], world: int) -> list[list[RunConfig]]:
    """For each run, the same run with expert parallelism (`parallel.experts`) over 2, 4 and 8 ranks, as far as it is possible.

    Dealing experts means that each rank of a group holds some experts of every layer; tokens travel to them. Lists are empty
    for models without experts, and for strategies other than FSDP2 and HSDP. `configs` are variants of one run, which share
    its models: a teacher or a reward model that is a mixture of experts must be dealt likewise. Groups across hosts are left
    out, since each layer would wait for the network. `world`: ranks of the run. No weights are read.
    """
    ranks_per_host = world // configs[0].launcher.nodes
    degrees = [degree for degree in DEGREES if ranks_per_host % degree == 0]
    shards = [isinstance(config.strategy, Fsdp2Config) for config in configs]  # FSDP2 and HSDP alone can deal experts
    nothing: list[list[RunConfig]] = [[] for _ in configs]
    if not degrees or not any(shards):
        return nothing
    models = models_on_meta(configs[0])
    trained_model = next(iter(models.values()))
    if not expert_modules(trained_model):
        return nothing
    dealt = nothing
    for index, config in enumerate(configs):
        for degree in degrees if shards[index] else ():
            with_degree = replace(config, parallel=replace(config.parallel, experts=degree))
            if not problems_of_models(with_degree, models, (world, config.launcher.nodes)):
                dealt[index].append(with_degree)
    return dealt
