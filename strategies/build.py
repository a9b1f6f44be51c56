"""The one place that turns a strategy's name into the class that runs it."""

from __future__ import annotations

import torch

from strategies.base import DdpConfig, Fsdp2Config, Precision, Strategy, StrategyConfig, StrategyName, ZeroConfig
from strategies.errors import ConfigError
from strategies.runtime import Runtime


def build_strategy(config: StrategyConfig, precision: Precision, runtime: Runtime) -> Strategy:
    """The strategy that `config` names; imports only what that one needs."""
    if isinstance(config, ZeroConfig):
        from strategies.zero import ZeroStrategy

        return ZeroStrategy(config, precision, runtime)
    if isinstance(config, Fsdp2Config):
        from strategies.fsdp2 import Fsdp2Strategy

        return Fsdp2Strategy(config, precision, runtime)
    if isinstance(config, DdpConfig):
        from strategies.ddp import DdpStrategy

        return DdpStrategy(config, precision, runtime)
    if config.name is StrategyName.single and runtime.world_size > 1:
        raise ConfigError(
            f"strategy=single with {runtime.world_size} processes: single is one process; use strategy=ddp or fsdp2, "
            "or launcher.processes=1"
        )
    from strategies.single import SingleStrategy

    return SingleStrategy(config, precision, runtime)


def resolve_precision(asked: Precision, runtime: Runtime) -> Precision:
    """What `auto` means on this device: bf16 on GPUs that have it, else fp32."""
    if asked is not Precision.auto:
        return asked
    on_gpu = runtime.device.type == "cuda" and torch.cuda.is_bf16_supported()
    return Precision.bf16 if on_gpu else Precision.fp32
