"""All strategies, and their common properties; `strategy=auto` chooses among them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from strategies.base import DdpConfig, Fsdp2Config, SingleConfig, StrategyConfig, StrategyName, ZeroConfig

STRATEGIES = tuple(name for name in StrategyName if name is not StrategyName.auto)
"""Those that run."""


def common_settings(strategy: StrategyConfig) -> dict[str, Any]:
    """The settings that every strategy has, by name, without the strategy's own."""
    return {each.name: getattr(strategy, each.name) for each in fields(StrategyConfig) if each.name != "name"}


def every_strategy(common: StrategyConfig) -> list[StrategyConfig]:
    """All that run, in the order of `STRATEGIES`, with the settings of `common` that every strategy has."""
    kept = common_settings(common)
    made: list[StrategyConfig] = [SingleConfig(**kept), DdpConfig(**kept), Fsdp2Config(**kept)]
    made.append(Fsdp2Config(name=StrategyName.hsdp, replicate=0, **kept))
    return made + [ZeroConfig(name=StrategyName(f"zero{n}"), stage=n, **kept) for n in (1, 2, 3)]
