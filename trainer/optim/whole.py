"""Muon and Adafactor on shards. Both need whole matrices, so parameters are gathered one at a time.

The arithmetic is torch's own (`torch.optim.Muon`, `torch.optim.Adafactor`). Every rank computes the whole update and keeps its
rows, so the result is that of one process. Plain tensors are not gathered.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from strategies.compat.optimizers import adafactor, adjusted_rate, orthogonalised_in_bf16


def gather_full_tensor(tensor: Tensor) -> Tensor:
    """Gather the full tensor of a shard. All ranks must call. A plain tensor is returned as it is."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    return tensor.full_tensor()


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part of `full`, sharded like `like`. No collective, because every rank has all of `full`."""
    if not hasattr(like, "full_tensor"):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def orthogonalise(matrix: Tensor, coefficients: tuple[float, float, float], iterations: int, eps: float) -> Tensor:
    """An orthogonal matrix near to `matrix [n, m]` and of its type, by the Newton-Schulz iteration of Muon's authors.

    torch's own rounds to bf16, whose 8 bits would magnify the rounding of gradient sums: strategies would agree to 1e-5 at
    best. `coefficients`: a, b, c of the polynomial a X + b (X X^T) X + c (X X^T)^2 X.
    """
    a, b, c = coefficients
    # The Gram matrix should have the smaller side of the two.
    is_tall = matrix.shape[0] > matrix.shape[1]
    update = matrix.T if is_tall else matrix
    update = update / update.norm().clamp(min=eps)
    for _ in range(iterations):
        gram = update @ update.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        update = torch.addmm(update, polynomial, update, beta=a)
    return update.T if is_tall else update


class ShardedMuon(torch.optim.Muon):
    """`torch.optim.Muon`, which also works on row shards. The momentum is element-wise and stays sharded."""

    def __init__(self, params: Any, *, bf16: bool, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.orthogonalise = orthogonalised_in_bf16 if bf16 else orthogonalise

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient, as Muon does: along the orthogonalised momentum.

        The orthogonalisation needs the whole matrix, so sharded ones are gathered, one at a time: all ranks must call.
        `closure` is not called.
        """
        for group in self.param_groups:
            lr = group["lr"]
            momentum = group["momentum"]
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                # The momentum, orthogonalised as a whole matrix.
                buffer = state["momentum_buffer"]
                buffer.lerp_(gradient, 1 - momentum)
                update = buffer
                if group["nesterov"]:
                    # The update looks one step ahead along the momentum.
                    update = gradient.lerp(buffer, momentum)
                orthogonal = self.orthogonalise(
                    gather_full_tensor(update), group["ns_coefficients"], group["ns_steps"], group["eps"]
                )
                # Decay is decoupled, as in AdamW.
                parameter.mul_(1 - lr * group["weight_decay"])
                rate = adjusted_rate(lr, group["adjust_lr_fn"], parameter.shape)
                parameter.add_(shard_like(orthogonal.to(parameter.dtype), parameter), alpha=-rate)


class ShardedAdafactor(torch.optim.Adafactor):
    """`torch.optim.Adafactor`, which also works on row shards. Factored moments are small: every rank has them in full."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, by torch's Adafactor, which keeps second moments by row and by column.

        These need the whole matrix, so sharded parameters are gathered, one at a time: all ranks must call. `closure` is not
        called.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                full_parameter = gather_full_tensor(parameter)
                full_gradient = gather_full_tensor(parameter.grad)
                state = self.state[parameter]
                if not state:
                    state |= self._initial_state(full_gradient)
                adafactor(
                    [full_parameter],
                    [full_gradient],
                    [state.get("row_var")],  # type: ignore[list-item]
                    [state.get("col_var")],  # type: ignore[list-item]
                    [state.get("variance")],  # type: ignore[list-item]
                    [state["step"]],
                    foreach=False,  # one parameter at a time: only this one is gathered
                    d=group["d"],
                    lr=group["lr"],
                    beta2_decay=group["beta2_decay"],
                    weight_decay=group["weight_decay"],
                    eps1=group["eps"][0],
                    eps2=group["eps"][1],
                    maximize=False,
                )
                # A plain parameter was updated in place. Of a shard only the gathered copy was.
                if full_parameter is not parameter:
                    parameter.copy_(shard_like(full_parameter, parameter))

    @staticmethod
    def _initial_state(gradient: Tensor) -> dict[str, Tensor]:
        """Adafactor's state before the first step: zero moments, by row and by column of a matrix, by element of a vector.

        The keys are torch's own, because torch's `adafactor` and its state dicts go by them.
        """
        step = torch.tensor(0.0)
        if gradient.dim() < 2:
            return {"step": step, "variance": torch.zeros_like(gradient)}
        row_shape = [*gradient.shape[:-1], 1]
        column_shape = [*gradient.shape[:-2], 1, gradient.shape[-1]]
        return {"step": step, "row_var": gradient.new_zeros(row_shape), "col_var": gradient.new_zeros(column_shape)}


class CombinedOptimizer:
    """Several optimizers that look like one to the engine: their groups one after another, their states in one dict."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The live groups of all optimizers."""
        groups: list[dict[str, Any]] = []
        for optimizer in self.optimizers:
            groups += optimizer.param_groups
        return groups

    @property
    def state(self) -> dict[Any, Any]:
        """The live state of each parameter. The dict itself is new: writing a new key into it has no effect."""
        states: dict[Any, Any] = {}
        for optimizer in self.optimizers:
            states |= optimizer.state
        return states

    def step(self) -> None:
        """One step of every optimizer. All ranks must call."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        """Drop the gradients of all parameters."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)
