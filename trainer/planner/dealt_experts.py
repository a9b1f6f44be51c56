"""Over how many ranks a plan tries to deal the experts of a layer (`parallel.experts`)."""

from __future__ import annotations

from dataclasses import replace

from strategies.base import Fsdp2Config
from trainer.build.experts import model_on_meta, model_problem
from trainer.config.run import RunConfig
from trainer.objectives.registry import family_of
from trainer.tuning.expert_parts import expert_modules

DEGREES = (2, 4, 8)
"""Ranks over which a plan tries to deal the experts of a layer, beside 1."""


def with_dealt_experts(configs: list[RunConfig], world: int) -> list[list[RunConfig]]:
    """Each run with its experts dealt over 2, 4 and 8 ranks, where its model can be; nothing for a model without experts.

    `configs` differ in what the model's experts do not depend on. Expert groups across hosts are left out: each layer would
    wait for the network. Reads the model's configuration alone.
    """
    ranks_per_host = world // configs[0].launcher.nodes
    degrees = [degree for degree in DEGREES if ranks_per_host % degree == 0]
    shards = [isinstance(config.strategy, Fsdp2Config) for config in configs]
    nothing: list[list[RunConfig]] = [[] for _ in configs]
    if not degrees or not any(shards):
        return nothing
    model = model_on_meta(configs[0].model, family_of(configs[0].objective).kind)
    if not expert_modules(model):
        return nothing
    dealt = nothing
    for index, config in enumerate(configs):
        for degree in degrees if shards[index] else ():
            with_degree = replace(config, parallel=replace(config.parallel, experts=degree))
            if model_problem(with_degree, "", model, (world, config.launcher.nodes)) is None:
                dealt[index].append(with_degree)
    return dealt
