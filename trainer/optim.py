"""The optimizer's settings and its construction."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101)."""

    name: str = "adamw"
    """Which optimizer runs; set by the group choice `optim=<name>`."""
    lr: float = 2e-5
    """Peak learning rate; about 1e-5 to 5e-5 for full tuning, 1e-4 to 5e-4 for LoRA."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices; norms, biases and other vectors never decay."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay rates of the first and second moment, each in [0, 1)."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm; 0 switches clipping off."""
    max_skipped_steps: int = 10
    """The run stops after this many steps in a row whose gradients are not finite."""


def build_optimizer(
    config: OptimConfig, named: Iterable[tuple[str, nn.Parameter]], *, rate_of: Callable[[str], float] = lambda _: 1.0
) -> torch.optim.Optimizer:
    """AdamW over groups: matrices decay, vectors (norms, biases) do not; `rate_of(name)` multiplies the learning rate.

    Called after sharding. The kernel is torch's fused one where every parameter is a floating-point tensor on CPU or CUDA.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, p in named:
        if p.requires_grad:
            # ZeRO-3 shows partitioned parameters as empty: their real shape is in ds_shape.
            is_matrix = len(getattr(p, "ds_shape", p.shape)) >= 2
            groups.setdefault((is_matrix, rate_of(name)), []).append(p)
    settings = [
        {"params": groups[key], "weight_decay": config.weight_decay if key[0] else 0.0, "lr": config.lr * key[1]}
        for key in sorted(groups, key=lambda key: (not key[0], key[1]))
    ]
    return torch.optim.AdamW(
        settings, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True
    )
