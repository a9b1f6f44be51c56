"""Whether the experts of a run's models can be distributed over ranks (`parallel.experts`), and the plan that says so.

`expert_parallelism_problems` needs the models' configurations alone, so a run is refused before its data is prepared. What the
settings rule out by themselves is refused earlier still (`trainer/config/sharding.py`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from strategies.base import Precision
from strategies.errors import ConfigError
from strategies.mesh import replica_count
from strategies.parameters import FROZEN_MODEL_PREFIXES, meta_context
from strategies.runtime import Runtime
from trainer.build.reward_models import reward_entries_with_models, reward_model_configs_by_setting
from trainer.config.run import RunConfig
from trainer.model import experts
from trainer.model.architecture import experts_per_token, from_config_options, text_model_config, transformers_class
from trainer.model.config import ModelConfig, ModelKind
from trainer.model.loading import load_model_config
from trainer.objectives.frozen_model import teacher_model
from trainer.objectives.registry import objective_family
from trainer.step import BuiltModel, TrainStep
from trainer.tuning.expert_parts import expert_modules_by_name, names_of_unsupported_experts


def plan_expert_parallelism(built: BuiltModel, config: RunConfig, runtime: Runtime) -> None:
    """Set up expert parallelism (`parallel.experts`) in the plan of the step module, by which the engine distributes experts.

    The plan then names all modules of experts, also those of frozen models, and over how many ranks a layer's experts are
    distributed. A warning goes into `built.substitutions`, which the start screen shows. Raises ConfigError if it is not
    possible with the ranks of `runtime`.
    """
    if config.parallel.experts == 1:
        return
    models = _models_of_step(built.step_module, config)
    problems = expert_parallelism_problems_of_models(
        config, models, num_ranks=runtime.world_size, num_hosts=runtime.num_hosts
    )
    if problems:
        raise ConfigError(problems)
    built.step_module.plan.expert_parallel_modules = tuple(expert_modules_by_name(built.step_module))
    built.step_module.plan.expert_ranks = config.parallel.experts
    note = expert_groups_across_hosts_note(config.parallel.experts, runtime.local_world_size, runtime.num_hosts)
    if note is not None:
        built.substitutions["parallel.experts"] = note


def expert_groups_across_hosts_note(expert_ranks: int, ranks_per_host: int, hosts: int) -> str | None:
    """A warning for the user if groups of `expert_ranks` ranks cross hosts, so that tokens go over the network; else None.

    A layer's experts are distributed over the ranks of a group. Groups are neighbouring ranks, so all of them lie within hosts
    if their size divides the ranks of a host.
    """
    if hosts == 1 or ranks_per_host % expert_ranks == 0:
        return None
    return (
        f"groups of {expert_ranks} ranks cross hosts of {ranks_per_host}: tokens go to their experts over the network and back, "
        "in every layer"
    )


def expert_parallelism_lines(built: BuiltModel, precision: Precision, ranks_per_replica: int) -> list[str]:
    """Lines for the start screen on expert parallelism: what a rank holds, and the traffic of a token; [] without it.

    The plan of the step module must be set up already. `ranks_per_replica`: ranks over which one copy of the model is sharded.
    """
    step = built.step_module
    expert_ranks = step.plan.expert_ranks
    trained_names = [name for name in step.plan.expert_parallel_modules if not name.startswith(FROZEN_MODEL_PREFIXES)]
    if expert_ranks == 1 or not trained_names:
        return []
    per_token = experts_per_token(built.config)
    pass_bytes = _bytes_of_token_to_experts(built, precision)
    # A forward and a backward pass are 2 passes. Recomputing the layer repeats the forward pass: 3.
    return [
        _line_on_held_experts(step, trained_names, ranks_per_replica),
        f"each token goes to its {per_token} experts and back: about {2 * pass_bytes / 1000:,.1f} kB to and from other ranks in "
        f"each layer of a micro-batch, {3 * pass_bytes / 1000:,.1f} kB if the layer is recomputed",
    ]


def _line_on_held_experts(step: TrainStep, trained_names: list[str], ranks_per_replica: int) -> str:
    """The line on how many experts of each layer a rank holds.

    `trained_names`: the modules of experts of the trained model, one a layer. Such as "experts: 24 layers of 8 are distributed
    over 4 ranks (parallel.experts); each rank holds 2 of a layer".
    """
    expert_ranks = step.plan.expert_ranks
    modules: list[Any] = [step.get_submodule(name) for name in trained_names]
    expert_counts = sorted({module.num_experts for module in modules})
    counts_of_layer = " or ".join(str(count) for count in expert_counts)
    counts_of_rank = " or ".join(str(count // expert_ranks) for count in expert_counts)
    has_frozen_models = len(step.plan.expert_parallel_modules) > len(modules)
    frozen = ", those of frozen models beside it too" if has_frozen_models else ""
    ranks_per_expert = ranks_per_replica // expert_ranks
    shared = f", which {ranks_per_expert} ranks shard" if ranks_per_expert > 1 else ""
    return (
        f"experts: {len(modules)} layers of {counts_of_layer} are distributed over {expert_ranks} ranks "
        f"(parallel.experts){frozen}; "
        f"each rank holds {counts_of_rank} of a layer{shared}"
    )


def _bytes_of_token_to_experts(built: BuiltModel, precision: Precision) -> float:
    """Bytes that a token sends to other ranks in one pass of a layer: its hidden state goes to each of its experts and back."""
    expert_ranks = built.step_module.plan.expert_ranks
    row_bytes = text_model_config(built.config).hidden_size * (4 if precision is Precision.fp32 else 2)
    # The part for the rank's own experts stays there.
    return 2 * experts_per_token(built.config) * row_bytes * (expert_ranks - 1) / expert_ranks


def _models_of_step(step: TrainStep, config: RunConfig) -> dict[str, nn.Module]:
    """The models in a step module, the trained one first, each by the setting that names it, such as `model.path=<path>`."""
    models: dict[str, nn.Module] = {f"model.path={config.model.path}": step.model}
    if step.teacher is not None:  # a teacher, or a frozen copy of the model if the objective names none
        teacher = teacher_model(config.model, config.objective)
        setting = "the frozen copy of the model" if teacher is None else f"objective.teacher.path={teacher.path}"
        models[setting] = step.teacher
    for name, reward in reward_entries_with_models(config.objective).items():
        if name in step.reward_models:
            models[f"objective.rewards.{name}.path={reward.path}"] = step.reward_models[name]
    return models


def expert_parallelism_problems(config: RunConfig, *, scores_answers: bool = True) -> list[str]:
    """Why the experts of the run's models cannot be distributed over ranks, one line for each model; empty if they can.

    Called before data is prepared, so it reads only configurations. `scores_answers`: whether the run needs its reward models,
    which are then checked too.
    """
    if config.parallel.experts == 1:
        return []
    num_hosts = config.launcher.nodes
    num_ranks = num_hosts * config.launcher.per_node
    models = models_on_meta_by_setting(config, scores_answers=scores_answers)
    return expert_parallelism_problems_of_models(config, models, num_ranks=num_ranks, num_hosts=num_hosts)


def models_on_meta_by_setting(config: RunConfig, *, scores_answers: bool = True) -> dict[str, nn.Module]:
    """Build the architectures of a run's models without values, the trained one first, each by the setting that names it.

    Such as {"model.path=<path>": model}. `scores_answers`: whether its reward models are included.
    """
    kind = objective_family(config.objective).kind
    models = {f"model.path={config.model.path}": build_model_on_meta(config.model, kind)}
    teacher = teacher_model(config.model, config.objective)
    if teacher is not None:
        models[f"objective.teacher.path={teacher.path}"] = build_model_on_meta(teacher, kind)
    if scores_answers:
        for setting, model_config in reward_model_configs_by_setting(config.objective).items():
            models[setting] = build_model_on_meta(model_config, ModelKind.classifier)
    return models


def expert_parallelism_problems_of_models(
    config: RunConfig, models: dict[str, nn.Module], *, num_ranks: int, num_hosts: int
) -> list[str]:
    """Why the experts of these models cannot be distributed over ranks, one line for each such model; empty if they can.

    `models`: the trained one first, each by the setting that names it, such as `model.path=<path>`. A frozen model without
    experts is no problem. `num_ranks`, `num_hosts`: of the whole run; 0 if not known yet.
    """
    problems = []
    for index, (setting, model) in enumerate(models.items()):
        is_frozen = index > 0
        if is_frozen and not expert_modules_by_name(model):
            continue
        problem = _model_problem(config, setting, model, num_ranks, num_hosts)
        if problem is not None:
            problems.append(problem)
    return problems


def build_model_on_meta(model: ModelConfig, kind: ModelKind) -> nn.Module:
    """The architecture of one model, without values."""
    experts.register()
    hf_config = load_model_config(model)
    with meta_context(), torch.device("meta"):
        model_on_meta: nn.Module = transformers_class(kind, hf_config).from_config(
            hf_config, **from_config_options(model)
        )
    return model_on_meta


def _model_problem(config: RunConfig, setting: str, model: nn.Module, num_ranks: int, num_hosts: int) -> str | None:
    """Why the experts of one model cannot be distributed over ranks, as a line for the user; None if they can.

    The first that applies:

    - the model's class computes its experts with code of its own, which cannot send tokens to other ranks;
    - it has no experts, or they are computed by another function than ours, which sends tokens (remote code);
    - it normalises the output of each expert, which has not been tested over ranks;
    - experts share a parameter, so that it cannot be divided among ranks: its rows are not a multiple of the experts;
    - the experts cannot be divided evenly.

    `setting`: names the model in messages, such as `model.path=<path>`. `num_ranks`, `num_hosts`: 0 if not known yet.
    """
    degree = f"parallel.experts={config.parallel.experts}"
    unsupported = names_of_unsupported_experts(model)
    if unsupported:
        return (
            f"{degree}: {setting} computes its experts ({unsupported[0]}) in a way of its own, to which no tokens can be sent; "
            "set parallel.experts=1"
        )
    modules: dict[str, Any] = dict(expert_modules_by_name(model))
    if not modules:
        return (
            f"{degree}: {setting} has no experts that transformers' experts functions compute; set parallel.experts=1"
        )
    for name, module in modules.items():
        problem = _module_problem(degree, setting, name, module)
        if problem is not None:
            return problem
    expert_counts = [module.num_experts for module in modules.values()]
    return _division_problem(config, setting, expert_counts, num_ranks, num_hosts)


def _module_problem(degree: str, setting: str, name: str, module: Any) -> str | None:
    """Why the experts of one module cannot be distributed over ranks, as a line for the user; None if they can.

    `degree`: such as `parallel.experts=4`. `setting`: names the model. `name`: of the module in it.
    """
    # A configuration without the attribute was not loaded with another function, so ours computes the experts.
    computed_by = getattr(module.config, "_experts_implementation", experts.EXPERTS_FUNCTION)
    if computed_by != experts.EXPERTS_FUNCTION:
        return (
            f"{degree}: {setting} is loaded with trust_remote_code=true, and so its experts are computed by {computed_by}, "
            "which sends no tokens; leave trust_remote_code out, or set parallel.experts=1"
        )
    if getattr(module, "has_post_expert_norm", False):
        return (
            f"{degree}: {setting} normalises what each expert makes ({name}), which is not proven over ranks; set "
            "parallel.experts=1"
        )
    for key, parameter in module.named_parameters(recurse=False):
        # Each expert must have equally many rows of it.
        has_rows_per_expert = parameter.dim() > 0 and len(parameter) % module.num_experts == 0
        if not has_rows_per_expert:
            return (
                f"{degree}: {setting} has a parameter for all experts together ({name}.{key}); set parallel.experts=1"
            )
    return None


def _division_problem(
    config: RunConfig, setting: str, expert_counts: list[int], num_ranks: int, num_hosts: int
) -> str | None:
    """Why the experts of a model cannot be divided evenly among ranks, as a line that proposes a setting; None if they can.

    Each rank must get equally many experts of a layer. Ranks that share the same experts shard them as whole experts, so a
    layer must have at least one expert for each rank of a replica (a copy of the model).

    `expert_counts`: number of experts of each layer. `num_ranks`: all ranks of the run; 0 if not known, and then only the first
    rule is checked.
    """
    expert_ranks = config.parallel.experts
    common_divisor = math.gcd(*expert_counts)
    fewest_experts = min(expert_counts)
    ranks_per_replica = 1
    if num_ranks:
        ranks_per_replica = num_ranks // replica_count(config.strategy, num_ranks, num_hosts)
    divides_evenly = common_divisor % expert_ranks == 0
    has_expert_for_each = fewest_experts >= ranks_per_replica
    if divides_evenly and has_expert_for_each:
        return None

    possible_settings = _possible_settings(common_divisor, fewest_experts, num_ranks or expert_ranks)
    remedy = f"set {possible_settings or 'parallel.experts=1'}"
    if not divides_evenly:
        layers = f"layers of {sorted(set(expert_counts))} experts"
        if len(set(expert_counts)) == 1:
            layers = f"{fewest_experts} experts"
        return (
            f"parallel.experts={expert_ranks}: must divide the experts of a layer, and {setting} has {layers}; {remedy}"
        )
    return (
        f"parallel.experts={expert_ranks}: {ranks_per_replica} ranks would share the {fewest_experts} experts of a layer of "
        f"{setting}, and some would hold none; {remedy}"
    )


def _possible_settings(common_divisor: int, fewest_experts: int, world_size: int) -> str | None:
    """Settings under which `world_size` ranks can divide the experts, with as few replicas as possible; None without any.

    For example "parallel.experts=2 or 4": a divisor of the experts of each layer and of the ranks of a replica.
    `common_divisor`: the greatest number that divides the experts of all layers. `fewest_experts`: those of the smallest layer.
    """
    for replicas in range(1, world_size + 1):
        ranks_per_replica = world_size // replicas
        if world_size % replicas or fewest_experts < ranks_per_replica:
            continue
        largest_degree = math.gcd(common_divisor, ranks_per_replica)
        degrees = [str(degree) for degree in range(2, largest_degree + 1) if largest_degree % degree == 0]
        if degrees:
            strategy = "" if replicas == 1 else f" with strategy=hsdp strategy.replicate={replicas}"
            return f"parallel.experts={' or '.join(degrees)}{strategy}"
    return None
