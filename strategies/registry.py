"""All strategies, and their common properties; `strategy=auto` chooses among them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from strategies.base import DdpConfig, Fsdp2Config, SingleConfig, StrategyConfig, StrategyName, ZeroConfig

STRATEGIES = tuple(name for name in StrategyName if name is not StrategyName.auto)
"""Every strategy that can run: all names but `auto`."""


def common_settings(strategy: StrategyConfig) -> dict[str, Any]:
    """The settings that every strategy has, by name, without the strategy's own."""
    names = [setting.name for setting in fields(StrategyConfig) if setting.name != "name"]
    return {name: getattr(strategy, name) for name in names}


def every_strategy(common: StrategyConfig) -> list[StrategyConfig]:
    """List one configuration of each strategy that can run, for plans and `strategy=auto` to compare; in order of `STRATEGIES`.

    `common`: whose settings that every strategy has (such as `activation_checkpointing`) all of them get.
    """
    common_values = common_settings(common)
    return [
        SingleConfig(**common_values),
        DdpConfig(**common_values),
        Fsdp2Config(**common_values),
        # hsdp is fsdp2 with replicas; 0: one a host, or 2 on a single host.
        Fsdp2Config(name=StrategyName.hsdp, replicate=0, **common_values),
        ZeroConfig(name=StrategyName.zero1, stage=1, **common_values),
        ZeroConfig(name=StrategyName.zero2, stage=2, **common_values),
        ZeroConfig(name=StrategyName.zero3, stage=3, **common_values),
    ]
