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

from strategies.base import Precision
from strategies.errors import ConfigError
from strategies.mesh import replica_count
from strategies.parameters import BESIDE, meta_context
from strategies.runtime import Runtime
from trainer.build.reward_models import reward_model_settings, reward_models_of
from trainer.config.run import RunConfig
from trainer.model import experts
from trainer.model.architecture import auto_class, build_options, experts_per_token, text_settings
from trainer.model.config import ModelConfig, ModelKind
from trainer.model.loading import load_model_config
from trainer.objectives.frozen_model import teacher_model
from trainer.objectives.registry import family_of
from trainer.step import Built, TrainStep
from trainer.tuning.expert_parts import expert_modules, unsupported_experts


def plan_experts(built: Built, config: RunConfig, runtime: Runtime) -> None:
    """Let the plan of the step name the modules whose experts are dealt, those of frozen models beside it too.

    Raises ConfigError if they cannot be dealt over the ranks of `runtime`.
    """
    if config.parallel.experts == 1:
        return
    ranks = (runtime.world_size, runtime.hosts)
    problems = problems_of_models(config, _models_of_step(built.step_module, config), ranks)
    if problems:
        raise ConfigError(problems)
    built.step_module.plan.dealt_experts = tuple(expert_modules(built.step_module))
    built.step_module.plan.expert_ranks = config.parallel.experts
    if runtime.local_world_size % config.parallel.experts and runtime.hosts > 1:
        # Groups are neighbouring ranks, so all of them lie within hosts if the degree divides the ranks of a host.
        built.substitutions["parallel.experts"] = (
            f"groups of {config.parallel.experts} ranks cross hosts of {runtime.local_world_size}: tokens go to their experts "
            "over the network and back, in every layer"
        )


def dealing_lines(built: Built, precision: Precision, sharded_over: int) -> list[str]:
    """What a run says of experts that are dealt over ranks: who holds which, and what a token exchanges. Else no line.

    `plan_experts` must have been called. `sharded_over`: ranks of a replica.
    """
    step = built.step_module
    expert_ranks = step.plan.expert_ranks
    own_names = [name for name in step.plan.dealt_experts if not name.startswith(BESIDE)]
    if expert_ranks == 1 or not own_names:
        return []
    own_modules: list[Any] = [step.get_submodule(name) for name in own_names]
    counts = sorted({module.num_experts for module in own_modules})
    in_layer = " or ".join(str(count) for count in counts)
    of_rank = " or ".join(str(count // expert_ranks) for count in counts)
    frozen = ", those of frozen models beside it too" if len(step.plan.dealt_experts) > len(own_modules) else ""
    sharers = sharded_over // expert_ranks
    shared = f", which {sharers} ranks shard" if sharers > 1 else ""
    per_token = experts_per_token(built.config)
    row_bytes = text_settings(built.config).hidden_size * (4 if precision is Precision.fp32 else 2)
    # There and back, for outputs and for gradients. What goes to this rank's own experts leaves no rank.
    pass_bytes = 2 * per_token * row_bytes * (expert_ranks - 1) / expert_ranks
    return [
        f"experts: {len(own_modules)} layers of {in_layer} are dealt over {expert_ranks} ranks (parallel.experts){frozen}; each "
        f"rank holds {of_rank} of a layer{shared}",
        f"each token goes to its {per_token} experts and back: about {2 * pass_bytes / 1000:,.1f} kB to and from other ranks in "
        f"each layer of a micro-batch, {3 * pass_bytes / 1000:,.1f} kB if the layer is recomputed",
    ]


def _models_of_step(step: TrainStep, config: RunConfig) -> dict[str, nn.Module]:
    """The models of a step module, the trained one first, each by what names it to the user."""
    models: dict[str, nn.Module] = {f"model.path={config.model.path}": step.model}
    if step.teacher is not None:
        teacher = teacher_model(config.model, config.objective)
        named = "the frozen copy of the model" if teacher is None else f"objective.teacher.path={teacher.path}"
        models[named] = step.teacher
    for name, reward in reward_models_of(config.objective).items():
        if name in step.reward_models:
            models[f"objective.rewards.{name}.path={reward.path}"] = step.reward_models[name]
    return models


def expert_problems(config: RunConfig, *, scores_answers: bool = True) -> list[str]:
    """Why the experts of the run's models cannot be dealt, a line each. Reads configurations alone.

    `scores_answers`: whether its reward models are needed, too.
    """
    if config.parallel.experts == 1:
        return []
    nodes = config.launcher.nodes
    models = models_on_meta(config, scores_answers=scores_answers)
    return problems_of_models(config, models, (nodes * config.launcher.per_node, nodes))


def models_on_meta(config: RunConfig, *, scores_answers: bool = True) -> dict[str, nn.Module]:
    """The architectures of a run's models without values, the trained one first, each by what names it to the user.

    `scores_answers`: whether its reward models are needed, too.
    """
    kind = family_of(config.objective).kind
    models = {f"model.path={config.model.path}": model_on_meta(config.model, kind)}
    teacher = teacher_model(config.model, config.objective)
    if teacher is not None:
        models[f"objective.teacher.path={teacher.path}"] = model_on_meta(teacher, kind)
    if scores_answers:
        for named, settings in reward_model_settings(config.objective).items():
            models[named] = model_on_meta(settings, ModelKind.classifier)
    return models


def problems_of_models(config: RunConfig, models: dict[str, nn.Module], ranks: tuple[int, int]) -> list[str]:
    """Why the experts of these models cannot be dealt, a line each; `models` has the trained one first.

    A frozen model without experts is no problem: all of it is gathered as always.
    """
    problems = []
    for number, (named, model) in enumerate(models.items()):
        if number > 0 and not expert_modules(model):
            continue
        problem = model_problem(config, named, model, ranks)
        if problem is not None:
            problems.append(problem)
    return problems


def model_on_meta(model: ModelConfig, kind: ModelKind) -> nn.Module:
    """The architecture of one model, without values."""
    experts.register()
    settings = load_model_config(model)
    with meta_context(), torch.device("meta"):
        plain: nn.Module = auto_class(kind, settings).from_config(settings, **build_options(model))
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
        computed_by = getattr(module.config, "_experts_implementation", experts.NAME)
        if computed_by != experts.NAME:  # code of its own need not know the function that sends tokens
            return (
                f"{typed}: {named} is loaded with trust_remote_code=true, and so its experts are computed by {computed_by}, "
                "which sends no tokens; leave trust_remote_code out, or set parallel.experts=1"
            )
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
