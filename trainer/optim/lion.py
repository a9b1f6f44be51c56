"""Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675, algorithm 2)."""

from __future__ import annotations

from typing import Any

import torch

from strategies.compat.optimizers import add_each, multiply_each, product_of_each, take_sign_of_each


class Lion(torch.optim.Optimizer):
    """Moves each element by the learning rate, in the direction of the sign of an interpolated momentum. Decay is decoupled.

    Its state is one element-wise moment, `exp_avg`.
    """

    def __init__(self, params: Any, *, lr: float, betas: tuple[float, float], weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. No collective, also on distributed tensors."""
        for group in self.param_groups:
            params: list[torch.Tensor] = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params if p.grad is not None]
            for p in params:
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            moments = [self.state[p]["exp_avg"] for p in params]
            beta1, beta2 = group["betas"]
            lr = group["lr"]
            # The update mixes momentum and gradient with beta1. The momentum itself then decays with beta2.
            update = product_of_each(moments, beta1)
            add_each(update, grads, alpha=1 - beta1)
            take_sign_of_each(update)
            multiply_each(params, 1 - lr * group["weight_decay"])
            add_each(params, update, alpha=-lr)
            multiply_each(moments, beta2)
            add_each(moments, grads, alpha=1 - beta2)
