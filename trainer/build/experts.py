"""Whether the experts of a run's models can be dealt over ranks (`parallel.experts`), and the plan of the step that says so.

`expert_problems` needs the models' configurations alone, so a run is refused before its data is prepared. What the settings
rule out by themselves is refused earlier still (`trainer/config/sharding.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from strategies.errors import ConfigError
from strategies.mesh import replica_count
from strategies.parameters import meta_context
from strategies.runtime import Runtime
from trainer.config.run import RunConfig
from trainer.model import experts
from trainer.model.architecture import auto_class, build_options
from trainer.model.config import ModelConfig
from trainer.model.loading import load_model_config
from trainer.objectives.frozen_model import teacher_model
from trainer.objectives.registry import family_of
from trainer.step import Built
from trainer.tuning.expert_parts import expert_modules, unsupported_experts


def plan_experts(built: Built, config: RunConfig, runtime: Runtime) -> None:
    """Let the plan of the step name the modules whose experts are dealt, a teacher's too.

    Raises ConfigError if they cannot be dealt over the ranks of `runtime`.
    """
    if config.parallel.experts == 1:
        return
    ranks = (runtime.world_size, runtime.hosts)
    problem = model_problem(config, f"model.path={config.model.path}", built.step_module, ranks)
    if problem is not None:
        raise ConfigError(problem)
    built.step_module.plan.dealt_experts = tuple(expert_modules(built.step_module))
    built.step_module.plan.expert_ranks = config.parallel.experts
    if runtime.local_world_size % config.parallel.experts and runtime.hosts > 1:
        # Groups are neighbouring ranks, so all of them lie within hosts if the degree divides the ranks of a host.
        built.substitutions["parallel.experts"] = (
            f"groups of {config.parallel.experts} ranks cross hosts of {runtime.local_world_size}: tokens go to their experts "
            "over the network and back, in every layer"
        )


def expert_problems(config: RunConfig) -> list[str]:
    """Why the experts of the run's model, or of its teacher, cannot be dealt, a line each. Reads configurations alone.

    A teacher without experts is no problem: all of it is gathered as always.
    """
    if config.parallel.experts == 1:
        return []
    nodes = config.launcher.nodes
    ranks = (nodes * config.launcher.per_node, nodes)
    models = {"model.path": config.model}
    teacher = teacher_model(config.model, config.objective)
    if teacher is not None:
        models["objective.teacher.path"] = teacher
    problems = []
    for key, model in models.items():
        plain = model_on_meta(config, model)
        if key != "model.path" and not expert_modules(plain):
            continue
        problem = model_problem(config, f"{key}={model.path}", plain, ranks)
        if problem is not None:
            problems.append(problem)
    return problems


def model_on_meta(config: RunConfig, model: ModelConfig) -> nn.Module:
    """The architecture of one model, without values."""
    experts.register()
    settings = load_model_config(model)
    with meta_context(), torch.device("meta"):
        plain: nn.Module = auto_class(family_of(config.objective).kind, settings).from_config(
            settings, **build_options(model)
        )
    return plain


def model_problem(config: RunConfig, named: str, model: nn.Module, ranks: tuple[int, int]) -> str | None:
    """Why the experts of one model cannot be dealt; None if they can.

    `named`: the setting that names it. `ranks`: their number, and that of their hosts; 0 if it is not known yet.
    """
    typed = f"parallel.experts={config.parallel.experts}"
    own_code = unsupported_experts(model)
    if own_code:
        return (
            f"{typed}: {named} computes its experts ({own_code[0]}) in a way of its own, to which no tokens can be sent; set "
            "parallel.experts=1"
        )
    modules: dict[str, Any] = dict(expert_modules(model))
    if not modules:
        return f"{typed}: {named} has no experts that transformers' experts functions compute; set parallel.experts=1"
    for name, module in modules.items():
        if getattr(module, "has_post_expert_norm", False):
            return (
                f"{typed}: {named} normalises what each expert makes ({name}), which is not proven over ranks; set "
                "parallel.experts=1"
            )
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 0 or len(parameter) % module.num_experts:
                return (
                    f"{typed}: {named} has a parameter for all experts together ({name}.{key}); set parallel.experts=1"
                )
    return _division_problem(config, named, [module.num_experts for module in modules.values()], *ranks)


def _division_problem(config: RunConfig, named: str, expert_counts: list[int], world: int, hosts: int) -> str | None:
    """Why experts, `expert_counts` in each layer, cannot be dealt evenly and sharded whole; None if they can."""
    expert_ranks = config.parallel.experts
    common = math.gcd(*expert_counts)
    sharded_over = world // replica_count(config.strategy, world, hosts) if world else 1
    fewest = min(expert_counts)
    if common % expert_ranks == 0 and fewest >= sharded_over:
        return None
    ways = list(_ways(common, fewest, world or expert_ranks))
    remedy = "set parallel.experts=1"
    if ways:
        remedy = f"set {', or '.join(ways)}"
    if common % expert_ranks:
        counted = (
            f"{fewest} experts" if len(set(expert_counts)) == 1 else f"layers of {sorted(set(expert_counts))} experts"
        )
        return (
            f"parallel.experts={expert_ranks}: must divide the experts of a layer, and {named} has {counted}; {remedy}"
        )
    return (
        f"parallel.experts={expert_ranks}: {sharded_over} ranks would share the {fewest} experts of a layer of {named}, and some "
        f"would hold none; {remedy}"
    )


def _ways(common: int, fewest: int, world: int) -> Iterator[str]:
    """Settings under which experts can be dealt over `world` ranks: for each number of replicas, the fewest first.

    `common`: the greatest number that divides the experts of all layers; `fewest`: those of the smallest layer.
    """
    for replicas in range(1, world + 1):
        if world % replicas or fewest < world // replicas:
            continue
        shared = math.gcd(common, world // replicas)
        degrees = [str(degree) for degree in range(2, shared + 1) if shared % degree == 0]
        if not degrees:
            continue
        strategy = "" if replicas == 1 else f" with strategy=hsdp strategy.replicate={replicas}"
        yield f"parallel.experts={' or '.join(degrees)}{strategy}"
        return
