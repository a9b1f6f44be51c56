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
        """Update every parameter that has a gradient, as Lion does: by the sign of a mix of momentum and gradient.

        It is element-wise, so that each rank updates its shard without a collective. `closure` is not called.
        """
        for group in self.param_groups:
            parameters: list[torch.Tensor] = []
            gradients: list[torch.Tensor] = []
            momenta: list[torch.Tensor] = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                parameters.append(parameter)
                gradients.append(parameter.grad)
                momenta.append(state["exp_avg"])
            if not parameters:
                continue
            beta1, beta2 = group["betas"]
            lr = group["lr"]
            # The update mixes momentum and gradient with beta1. The momentum itself then decays with beta2.
            update = product_of_each(momenta, beta1)
            add_each(update, gradients, alpha=1 - beta1)
            take_sign_of_each(update)
            multiply_each(parameters, 1 - lr * group["weight_decay"])
            add_each(parameters, update, alpha=-lr)
            multiply_each(momenta, beta2)
            add_each(momenta, gradients, alpha=1 - beta2)
