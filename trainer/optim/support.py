"""Which optimizer runs under which strategy, and why not: the data of validation and of `docs/optimizers.md`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from typing import Any

from strategies.base import StrategyConfig, StrategyName
from strategies.errors import ConfigError
from strategies.extras import install_command
from strategies.registry import STRATEGIES
from trainer.optim.config import OptimConfig, OptimName, SgdConfig


class Needs(StrEnum):
    """What an optimizer needs to see of a parameter in one piece."""

    elements = "any part of the flattened parameter"
    whole_matrices = "whole matrices"
    averages = "two sets of weights, swapped for evaluation"
    blocks = "whole parameters, in blocks of 256 elements"


@dataclass(frozen=True, slots=True)
class OptimizerSupport:
    """What one optimizer needs, and which strategies cannot give it that."""

    needs: Needs
    refusal_by_strategy: dict[StrategyName, str]
    """Why a strategy cannot run it. All other strategies run it, with the result of `single`."""
    strategy_instead: str = ""
    """The setting of the strategy to use in their place, such as `strategy=fsdp2`."""
    package: str | None = None
    """The import name of a package that the core does not bring."""
    extra: str | None = None
    """The extra of this project that brings `package`."""


_ZERO = (StrategyName.zero1, StrategyName.zero2, StrategyName.zero3)
_CUTS_MATRICES = "ZeRO steps on flat partitions that cut through matrices"
OPTIMIZER_SUPPORT: dict[OptimName, OptimizerSupport] = {
    OptimName.adamw: OptimizerSupport(Needs.elements, {}),
    OptimName.lion: OptimizerSupport(Needs.elements, {}),
    OptimName.sgd: OptimizerSupport(Needs.elements, {}),
    OptimName.muon: OptimizerSupport(Needs.whole_matrices, dict.fromkeys(_ZERO, _CUTS_MATRICES), "strategy=fsdp2"),
    OptimName.adafactor: OptimizerSupport(Needs.whole_matrices, dict.fromkeys(_ZERO, _CUTS_MATRICES), "strategy=fsdp2"),
    OptimName.schedule_free: OptimizerSupport(
        Needs.averages,
        dict.fromkeys(_ZERO, "ZeRO keeps the weights that evaluation would swap in flat partitions of its own"),
        "strategy=fsdp2",
        package="schedulefree",
        extra="schedule_free",
    ),
    OptimName.adamw_8bit: OptimizerSupport(
        Needs.blocks,
        dict.fromkeys(
            (*_ZERO, StrategyName.fsdp2, StrategyName.hsdp),
            "moments are rounded in blocks of 256 elements, which shards would cut elsewhere than one process does",
        ),
        "strategy=ddp",
        package="bitsandbytes",
        extra="qlora",
    ),
}
"""Every optimizer."""


def import_package(name: OptimName) -> Any:
    """Import the package that an optimizer comes from. Raises ConfigError, with the extra to install, if it is missing."""
    package = OPTIMIZER_SUPPORT[name].package
    assert package is not None
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(_missing_package(name)) from error


def _missing_package(name: OptimName) -> str:
    """What to tell a user who asked for an optimizer whose package is not installed."""
    support = OPTIMIZER_SUPPORT[name]
    assert support.extra is not None, "an optimizer without an extra needs no package"
    return (
        f"optim={name}: needs the package {support.package} ({install_command(support.extra)}); install it, or use "
        "optim=adamw"
    )


def optimizer_problems(
    config: OptimConfig, strategy: StrategyConfig, schedule: str, *, starts_here: bool
) -> Iterator[str]:
    """Yield what is wrong with an optimizer's settings, alone and with strategy and schedule, one line each.

    Called when a run is composed. `schedule`: name of the learning rate schedule. `starts_here`: whether the run will start in
    this environment, so that the optimizer's package has to be installed.
    """
    # The optimizer with the strategy, the schedule and the installed packages.
    support = OPTIMIZER_SUPPORT[config.name]
    reason = support.refusal_by_strategy.get(strategy.name)
    if reason is not None:
        yield f"optim={config.name}: needs {support.needs}, and {reason}; use {support.strategy_instead}, or optim=adamw"
    if support.needs is Needs.whole_matrices and getattr(strategy, "cpu_offload", False):
        yield (
            f"optim={config.name}: gathers whole matrices, which offloaded shards do not allow; set "
            "strategy.cpu_offload=false, or use optim=adamw"
        )
    if config.name is OptimName.schedule_free and schedule != "constant":
        yield f"optim=schedule_free: averages in place of a decaying rate; set schedule=constant, not {schedule}"
    if starts_here and support.package is not None and find_spec(support.package) is None:
        yield _missing_package(config.name)
    # The average of the weights (`ema_decay`).
    if config.ema_decay and config.name is OptimName.schedule_free:
        yield f"optim.ema_decay={config.ema_decay:g}: optim=schedule_free averages weights itself; set optim.ema_decay=0"
    if config.ema_decay and getattr(strategy, "offload_optimizer", "none") == "nvme":
        yield (
            f"optim.ema_decay={config.ema_decay:g}: the average needs the masters in memory, and "
            "strategy.offload_optimizer=nvme keeps them on a drive; set strategy.offload_optimizer=cpu, or optim.ema_decay=0"
        )
    # Its own values, and its rules for groups of parameters.
    yield from _beta_and_nesterov_problems(config)
    for name, rule in config.groups.items():
        key = f"optim.groups.{name}.match"
        if not rule.match:
            # An empty pattern would match every parameter.
            yield f"{key}: not set; give a regular expression, such as embed_tokens"
        try:
            re.compile(rule.match)
        except re.error as error:
            yield f"{key}={rule.match}: not a regular expression ({error}); a part of a name, such as embed_tokens, is one"


def _beta_and_nesterov_problems(config: OptimConfig) -> Iterator[str]:
    """Yield what is wrong with betas or Nesterov's momentum, one line each.

    The ranges of other numbers stand in the fields of their settings, and are checked with all settings.
    """
    betas = getattr(config, "betas", None)
    if betas is not None:
        usual = "[0.9,0.99]" if config.name is OptimName.lion else "[0.9,0.999]"
        if any(not 0 <= beta < 1 for beta in betas):
            yield f"optim.betas={betas}: each must be at least 0 and below 1; {usual} as a rule"
        if len(betas) != 2:
            yield f"optim.betas={betas}: must be two numbers; {usual} as a rule"
    if isinstance(config, SgdConfig) and config.nesterov and config.momentum == 0:
        yield "optim.nesterov=true: looks ahead along a momentum; set optim.momentum=0.9, or optim.nesterov=false"


def table() -> list[str]:
    """The lines of the Markdown table with a row for each optimizer and a column for each strategy."""
    header = " | ".join(f"`{name}`" for name in STRATEGIES)
    lines = [f"| optimizer | needs | {header} |", f"|{'---|' * (len(STRATEGIES) + 2)}"]
    for optim, support in OPTIMIZER_SUPPORT.items():
        cells = ["-" if name in support.refusal_by_strategy else "yes" for name in STRATEGIES]
        lines.append(f"| `{optim}` | {support.needs} | {' | '.join(cells)} |")
    return lines
