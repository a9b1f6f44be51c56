"""Over how many ranks a plan tries to distribute the experts of a layer (`parallel.experts`)."""

from __future__ import annotations

from dataclasses import replace

from strategies.base import Fsdp2Config
from trainer.build.experts import expert_parallelism_problems_of_models, models_on_meta_by_setting
from trainer.config.run import RunConfig
from trainer.tuning.expert_parts import expert_modules_by_name

EXPERT_PARALLEL_DEGREES = (2, 4, 8)
"""Numbers of ranks over which a plan tries to shard the experts of a layer, beside 1."""


def _can_distribute_experts(config: RunConfig) -> bool:
    """Whether the run's strategy can distribute experts: FSDP2, and HSDP, which has the same settings class."""
    return isinstance(config.strategy, Fsdp2Config)


def configs_with_expert_parallelism(configs: list[RunConfig], world_size: int) -> list[list[RunConfig]]:
    """Make further variants of a run for a plan: with the experts of each layer distributed over 2, 4 and 8 ranks.

    `configs`: variants of one run, with the same models; for each, a list is returned. It is empty if the model has no experts,
    or its strategy is not FSDP2 or HSDP. Expert parallelism must be possible for the run's teacher and reward models as well.
    Expert groups that cross hosts are left out, since each layer would wait for the network. `world_size`: ranks of the run.
    Reads no weights.
    """
    ranks_per_host = world_size // configs[0].launcher.nodes
    degrees = [degree for degree in EXPERT_PARALLEL_DEGREES if ranks_per_host % degree == 0]
    variants: list[list[RunConfig]] = [[] for _ in configs]
    if not degrees or not any(map(_can_distribute_experts, configs)):
        return variants
    models = models_on_meta_by_setting(configs[0])
    trained_model = next(iter(models.values()))  # the trained model comes first, then the frozen ones
    if not expert_modules_by_name(trained_model):
        return variants
    for config, variants_of_config in zip(configs, variants, strict=True):
        if not _can_distribute_experts(config):
            continue
        for degree in degrees:
            variant = replace(config, parallel=replace(config.parallel, experts=degree))
            if not expert_parallelism_problems_of_models(
                variant, models, num_ranks=world_size, num_hosts=config.launcher.nodes
            ):
                variants_of_config.append(variant)
    return variants
