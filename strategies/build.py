"""Makes the engine of a strategy from its name."""

from __future__ import annotations

import torch.distributed as dist

from strategies.base import DdpConfig, Fsdp2Config, Precision, Strategy, StrategyConfig, StrategyName, ZeroConfig
from strategies.errors import ConfigError
from strategies.hardware import best_precision, gpu_of_device
from strategies.runtime import FAKE_BACKEND, Runtime, gather_objects


def build_strategy(config: StrategyConfig, precision: Precision, runtime: Runtime) -> Strategy:
    """Make the strategy that `config` names, which turns a model on meta into an engine that trains.

    Only its own library is imported, since DeepSpeed takes seconds. Raises ConfigError in these cases: a strategy of several
    ranks on a host without a network; `auto`, which only a training run resolves; `single` with several processes.
    """
    communicates = config.name not in (StrategyName.single, StrategyName.auto)
    # The fake backend is that of a job of one rank which found no network; a simulation has it on purpose.
    if communicates and not runtime.simulated and dist.get_backend(runtime.control_group) == FAKE_BACKEND:
        raise ConfigError(
            f"strategy={config.name}: this host has no network, not even a loopback interface, and the process group needs one; "
            "set strategy=single, or bring the interface up (`ip link set lo up`)"
        )
    if isinstance(config, ZeroConfig):
        from strategies.zero import ZeroStrategy

        return ZeroStrategy(config, precision, runtime)
    if isinstance(config, Fsdp2Config):
        from strategies.fsdp2 import Fsdp2Strategy

        return Fsdp2Strategy(config, precision, runtime)
    if isinstance(config, DdpConfig):
        from strategies.ddp import DdpStrategy

        return DdpStrategy(config, precision, runtime)
    if config.name is StrategyName.auto:
        raise ConfigError("strategy=auto: is chosen by a training run as it starts; name one of the others here")
    if config.name is StrategyName.single and runtime.world_size > 1:
        raise ConfigError(
            f"strategy=single with {runtime.world_size} processes: single is one process; use strategy=ddp or fsdp2, "
            "or launcher.processes=1"
        )
    from strategies.single import SingleStrategy

    return SingleStrategy(config, precision, runtime)


def resolve_precision(requested: Precision, runtime: Runtime) -> Precision:
    """Resolve `precision=auto` to the best precision that the GPUs of all ranks have; any other setting stays.

    All ranks must call.
    """
    if requested is not Precision.auto:
        return requested
    best_by_rank = gather_objects(best_precision(gpu_of_device(runtime.device)), runtime)
    # A job with several kinds of GPU takes what the weakest of them has.
    weakest_first = (Precision.fp32, Precision.fp16, Precision.bf16)
    return next(precision for precision in weakest_first if precision in best_by_rank)
