"""All strategies, and their common properties; `strategy=auto` chooses among them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from strategies.base import DdpConfig, Fsdp2Config, SingleConfig, StrategyConfig, StrategyName, ZeroConfig

STRATEGIES = tuple(name for name in StrategyName if name is not StrategyName.auto)
"""Those that run."""


def common_settings(strategy: StrategyConfig) -> dict[str, Any]:
    """The settings that every strategy has, by name, without the strategy's own."""
    return {
        setting_field.name: getattr(strategy, setting_field.name)
        for setting_field in fields(StrategyConfig)
        if setting_field.name != "name"
    }


def every_strategy(common: StrategyConfig) -> list[StrategyConfig]:
    """All that run, in the order of `STRATEGIES`, with the settings of `common` that every strategy has."""
    common_values = common_settings(common)
    strategies: list[StrategyConfig] = [
        SingleConfig(**common_values),
        DdpConfig(**common_values),
        Fsdp2Config(**common_values),
    ]
    strategies.append(Fsdp2Config(name=StrategyName.hsdp, replicate=0, **common_values))
    return strategies + [ZeroConfig(name=StrategyName(f"zero{n}"), stage=n, **common_values) for n in (1, 2, 3)]
