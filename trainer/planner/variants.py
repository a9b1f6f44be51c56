"""The variants of a run that a plan compares: each combination of strategy, recomputation and so on that the user left open."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, NamedTuple

from strategies.base import ActivationCheckpointing, Fsdp2Config, StrategyConfig, ZeroConfig
from strategies.errors import ConfigError
from strategies.registry import every_strategy
from trainer.build.sequence import sequence_parallel_problems
from trainer.config.run import RunConfig
from trainer.config.validate import config_problems
from trainer.model.config import ModelKind, Quantisation
from trainer.objectives.registry import objective_family
from trainer.planner.dealt_experts import configs_with_expert_parallelism
from trainer.planner.peer_memory import LOSS_BYTES_PER_LOGIT, PeerSetting, peer_setting_problems
from trainer.tuning.base import TuningName

RECOMPUTATION_MODES = (ActivationCheckpointing.none, ActivationCheckpointing.selective, ActivationCheckpointing.full)
RUN_ONLY_PROBLEMS = ("budget: not set", "data.path: not set", "run.device=cuda: no CUDA device")
"""Problems that keep a run from starting, but not a plan: how they begin."""


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """Settings of a plan."""

    exact: bool = False
    """Simulate the whole model instead of two shallow copies. The answer is the same, and slower for deep models."""
    offload: bool = False
    """Also plan with the optimizer state (zero) or the parameters (fsdp2, hsdp) in host memory."""
    quantisation: list[Quantisation] = field(default_factory=list)
    """More ways to store a frozen base, such as [none,nf4]. Empty: only `model.quantisation`."""
    theirs: list[PeerSetting] = field(default_factory=list)
    """What another trainer keeps in memory during a step, such as [stock_loss,pure_bf16]. The plan shows it beside
    shardtune's."""
    expert_imbalance: float | None = None
    """Load of the busiest rank, with `parallel.experts`: tokens that it receives over the mean of its group. null: as measured
    by the run of `from=`, else 2."""
    workers: int = 0
    """Number of processes that simulate. 0: one for each core that the job may use."""


@dataclass(frozen=True, slots=True)
class RunVariant:
    """One variant of a run: a strategy with its recomputation, offloading and storage of the base."""

    config: RunConfig
    overrides: tuple[str, ...]
    """The settings to add to the command line for it, such as `strategy=fsdp2`."""
    offloads_to_host: bool = False

    @property
    def name(self) -> str:
        """The name of its strategy."""
        return str(self.config.strategy.name)


class RefusedVariant(NamedTuple):
    """A variant that is ruled out or could not be simulated."""

    variant: RunVariant
    reason: str
    """A sentence without a full stop."""


class RunVariants(NamedTuple):
    """The variants of a run that a plan compares."""

    possible: list[RunVariant]
    """To be simulated."""
    refused: list[RefusedVariant]


def list_variants(config: RunConfig, settings: PlanConfig, cli_keys: set[str], world_size: int | None) -> RunVariants:
    """List the variants of a run that a plan compares: every combination of strategy, recomputation, ... that the user left open.

    `settings`: of the plan, which may ask for more (offloading, storage types of the base). `cli_keys`: keys of settings on the
    command line, which stay. `world_size`: ranks of the run; None if not known. Variants that cannot run are returned as refused,
    with the reason.

    Raises ConfigError with the problems that every variant has, or if no variant is left.
    """
    variants = list(_combinations_of_open_settings(config, settings, cli_keys))  # at least one: the user's own settings
    if "parallel.experts" not in cli_keys and world_size is not None:
        variants += _expert_parallel_variants(variants, world_size)

    # Problems of every variant are problems of the run itself.
    problems_by_variant = [_plan_problems(variant.config, world_size) for variant in variants]
    common_problems = _peer_problems(config, settings.theirs)
    for problem in problems_by_variant[0]:
        if all(problem in problems for problems in problems_by_variant):
            common_problems.append(problem)
    if common_problems:
        raise ConfigError(common_problems)

    divided = _divide_by_problems(variants, problems_by_variant)
    if not divided.possible:
        raise ConfigError([f"{' '.join(variant.overrides)}: {problem}" for variant, problem in divided.refused])
    return divided


def _divide_by_problems(variants: list[RunVariant], problems_by_variant: list[list[str]]) -> RunVariants:
    """Divide variants into those that a plan simulates, and those that are refused, with the first of their problems.

    `problems_by_variant`: for each variant why it cannot run; empty if it can.
    """
    possible = []
    refused = []
    for variant, problems in zip(variants, problems_by_variant, strict=True):
        if problems:
            refused.append(RefusedVariant(variant, problems[0]))
        else:
            possible.append(variant)
    return RunVariants(possible, refused)


def _expert_parallel_variants(variants: list[RunVariant], world_size: int) -> list[RunVariant]:
    """Make further variants of a mixture of experts: each of `variants` with the experts of a layer over 2, 4 or 8 ranks.

    Those that cannot run are left out without a reason, since nobody asked for them. `world_size`: ranks of the run.
    """
    expert_parallel_variants = []
    configs_by_variant = configs_with_expert_parallelism([variant.config for variant in variants], world_size)
    for variant, expert_parallel_configs in zip(variants, configs_by_variant, strict=True):
        for config in expert_parallel_configs:
            if not _plan_problems(config, world_size):
                overrides = (*variant.overrides, f"parallel.experts={config.parallel.experts}")
                expert_parallel_variants.append(replace(variant, config=config, overrides=overrides))
    return expert_parallel_variants


FURTHER_SEQUENCE_PARALLEL_DEGREES = (2, 4, 8)
"""Numbers of ranks that a plan lets share a row, if nothing fits otherwise."""
FURTHER_LONG_ROW_SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"mlp_tokens": 8192},
    {"mlp_tokens": 8192, "offload_activations": True},
)
"""Settings of `strategy` for long rows that a plan tries beside, one after the other until something fits."""


def list_long_row_variants(
    config: RunConfig, settings: PlanConfig, cli_keys: set[str], world_size: int, long_row_settings: dict[str, Any]
) -> RunVariants:
    """List further variants for a run of which nothing fits: 2, 4 or 8 ranks share each row, with settings for long rows.

    `long_row_settings`: settings of the strategy, such as {"mlp_tokens": 8192}; one of `FURTHER_LONG_ROW_SETTINGS`. `cli_keys`:
    keys of settings on the command line. All blocks are recomputed, unless the command line sets the recomputation. No variants
    if ranks share rows already, or if the command line sets `parallel.sequence` or one of `long_row_settings`.
    """
    shares_rows = config.parallel.sequence > 1 or "parallel.sequence" in cli_keys
    if shares_rows or any(f"strategy.{key}" in cli_keys for key in long_row_settings):
        return RunVariants(possible=[], refused=[])
    strategy = replace(config.strategy, **long_row_settings)
    if "strategy.activation_checkpointing" not in cli_keys:
        strategy = replace(strategy, activation_checkpointing=ActivationCheckpointing.full)
    overrides = [f"strategy.{key}={str(value).lower()}" for key, value in long_row_settings.items()]
    fixed_keys = cli_keys | {"strategy.activation_checkpointing"}  # it is set above: no variants with other modes
    variants = []
    problems_by_variant = []
    for degree in FURTHER_SEQUENCE_PARALLEL_DEGREES:
        if world_size % degree:
            continue
        sharing_config = replace(config, strategy=strategy, parallel=replace(config.parallel, sequence=degree))
        model_problems = sequence_parallel_problems(sharing_config)
        for base_variant in _combinations_of_open_settings(sharing_config, settings, fixed_keys):
            variant_overrides = (*base_variant.overrides, f"parallel.sequence={degree}", *overrides)
            variants.append(replace(base_variant, overrides=variant_overrides))
            problems_by_variant.append([*_plan_problems(base_variant.config, world_size), *model_problems])
    return _divide_by_problems(variants, problems_by_variant)


def _plan_problems(config: RunConfig, world_size: int | None) -> list[str]:
    """The problems of a run that rule it out in a plan as well; those that only keep it from starting here are left out."""
    return [
        problem
        for problem in config_problems(config, world_size=world_size)
        if not problem.startswith(RUN_ONLY_PROBLEMS)
    ]


def _combinations_of_open_settings(config: RunConfig, settings: PlanConfig, cli_keys: set[str]) -> Iterator[RunVariant]:
    """Yield a variant of the run for each combination of strategy, storage of the base, recomputation and offloading to try.

    What the user typed stays (`cli_keys`: the keys on the command line). A strategy that cannot offload has no variant that does.
    """
    requested_mode = config.strategy.activation_checkpointing
    mode_is_open = requested_mode is ActivationCheckpointing.auto or "strategy.activation_checkpointing" not in cli_keys
    modes = RECOMPUTATION_MODES if mode_is_open else (requested_mode,)
    quantisations = settings.quantisation or [config.model.quantisation]
    offloads = (False, True) if settings.offload else (False,)
    # The strategy on the command line, or else all strategies with the settings that they have in common.
    strategies = [config.strategy] if "strategy" in cli_keys else every_strategy(config.strategy)
    for strategy, quantisation, mode, offload in product(strategies, quantisations, modes, offloads):
        overrides = [f"strategy={strategy.name}", f"strategy.activation_checkpointing={mode}"]
        variant_strategy = _with_offload(strategy) if offload else strategy
        if variant_strategy is None:
            continue
        if offload:
            overrides.append(
                "strategy.offload_optimizer=cpu" if isinstance(strategy, ZeroConfig) else "strategy.cpu_offload=true"
            )
        if settings.quantisation:
            overrides.append(f"model.quantisation={quantisation}")
        variant_config = replace(
            config,
            strategy=replace(variant_strategy, activation_checkpointing=mode),
            model=replace(config.model, quantisation=quantisation),
        )
        yield RunVariant(variant_config, tuple(overrides), offload)


def _with_offload(strategy: StrategyConfig) -> StrategyConfig | None:
    """The strategy with its state in host memory; None if it cannot offload."""
    if isinstance(strategy, Fsdp2Config):
        return replace(strategy, cpu_offload=True)
    if isinstance(strategy, ZeroConfig):
        return replace(strategy, offload_optimizer="cpu")
    return None


def _peer_problems(config: RunConfig, peer_settings: Sequence[PeerSetting]) -> list[str]:
    """Say why another trainer (`plan.theirs`) cannot be compared with this run, a line for each problem; empty if it can.

    `peer_settings`: the setting, what that trainer does differently.
    """
    problems = peer_setting_problems(peer_settings, full_tuning=config.tuning.name is TuningName.full)
    losses = [setting for setting in peer_settings if setting in LOSS_BYTES_PER_LOGIT]
    if losses and objective_family(config.objective).kind is ModelKind.classifier:
        problems.append(
            f"plan.theirs=[{','.join(losses)}]: is of a loss over words; objective={config.objective.name} has none"
        )
    return problems
