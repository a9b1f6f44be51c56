"""Makes an optimizer from its settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any, cast

import torch
from torch import nn

from trainer.optim.config import (
    AdafactorConfig,
    Adamw8bitConfig,
    AdamwConfig,
    LionConfig,
    MuonConfig,
    OptimConfig,
    ScheduleFreeConfig,
    SgdConfig,
)
from trainer.optim.groups import ParameterGroup, group_parameters
from trainer.optim.support import import_package


def build_optimizer(
    config: OptimConfig,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    model_names: Sequence[str] = (),
    lr_factor: Callable[[str], float] = lambda _: 1.0,
) -> torch.optim.Optimizer:
    """Make the optimizer that `config` names, over its parameter groups. Called after sharding, alike on all ranks.

    `model_names`: plain names of all parameters, also of frozen ones. `lr_factor(name)`: the learning rate of a parameter as a
    multiple of the run's, from the tuning method. AdamW uses torch's fused kernel; SGD does not, because its fused kernel knows
    no distributed tensors. Raises ConfigError for groups that match no parameter, and for a package that is not installed.
    """
    trainable = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    groups = group_parameters(config, trainable, model_names, lr_factor)
    group_dicts = [group.as_dict() for group in groups]
    if type(config) is OptimConfig:
        # Only the common settings, without a choice of an optimizer: AdamW is the default.
        common_settings = {setting.name: getattr(config, setting.name) for setting in fields(config)}
        config = AdamwConfig(**common_settings)
    match config:
        case Adamw8bitConfig():
            bitsandbytes = import_package(config.name)
            return bitsandbytes.optim.AdamW8bit(
                group_dicts,
                lr=config.peak_lr,
                betas=_betas(config),
                eps=config.eps,
                min_8bit_size=config.min_8bit_elements,
            )
        case ScheduleFreeConfig():
            schedulefree = import_package(config.name)
            averaging = schedulefree.AdamWScheduleFree(
                group_dicts, lr=config.peak_lr, betas=_betas(config), eps=config.eps
            )
            # It holds two sets of weights, and refuses to step before it is told which one is live.
            averaging.train()
            return averaging
        case AdamwConfig():
            return torch.optim.AdamW(group_dicts, lr=config.peak_lr, betas=_betas(config), eps=config.eps, fused=True)
        case LionConfig():
            from trainer.optim.lion import Lion

            return Lion(group_dicts, lr=config.peak_lr, betas=_betas(config))
        case AdafactorConfig():
            from trainer.optim.whole import ShardedAdafactor

            default_moment_eps = None
            return ShardedAdafactor(
                group_dicts,
                lr=config.peak_lr,
                beta2_decay=-config.decay_exponent,
                eps=(default_moment_eps, config.eps_scale),
                d=config.clip_threshold,
            )
        case MuonConfig():
            return _build_muon(config, groups)
        case SgdConfig():
            return torch.optim.SGD(
                group_dicts, lr=config.peak_lr, momentum=config.momentum, nesterov=config.nesterov, foreach=True
            )
    # A settings class that nobody has added above.
    raise TypeError(f"no optimizer is known for {type(config).__name__}")


def _betas(config: AdamwConfig | LionConfig | MuonConfig) -> tuple[float, float]:
    """The two decay rates as optimizers take them. Validation has made sure that there are two."""
    first, second = config.betas
    return first, second


def _build_muon(config: MuonConfig, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
    """Make Muon for the matrices of blocks, and AdamW for the rest, as one optimizer.

    After Jordan et al. 2024, kellerjordan.github.io/posts/muon. `groups`: of all trained parameters. Muon needs whole matrices:
    `ShardedMuon` gathers each sharded one.
    """
    from trainer.optim.whole import CombinedOptimizer, ShardedMuon

    matrix_groups = [group.as_dict() for group in groups if group.are_block_matrices]
    other_groups = [group.as_dict() for group in groups if not group.are_block_matrices]
    optimizers: list[Any] = []
    if matrix_groups:
        optimizers.append(
            ShardedMuon(
                matrix_groups,
                lr=config.peak_lr,
                momentum=config.momentum,
                nesterov=config.nesterov,
                ns_steps=config.iterations,
                adjust_lr_fn=str(config.scale),
                bf16=config.bf16,
            )
        )
    if other_groups:
        optimizers.append(
            torch.optim.AdamW(other_groups, lr=config.peak_lr, betas=_betas(config), eps=config.eps, fused=True)
        )
    return cast(torch.optim.Optimizer, CombinedOptimizer(*optimizers))
