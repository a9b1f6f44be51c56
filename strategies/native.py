"""The engine of the strategies that use torch's own optimizers: single, ddp, fsdp2 and hsdp.

One place for clipping, skipping steps that are not finite, loss scaling and training state. A subclass says how
gradients are synchronised and which runs of the parameters this rank holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from strategies.base import FullParameters, OptimizerFactory, Precision, Progress, StepResult, UpdateFilter, plan_of
from strategies.compat.optimizers import copy_each, multiply_each
from strategies.ema import EMA_KEY, WeightAverage
from strategies.grad_norm import squared_norm
from strategies.host_memory import HostMemory
from strategies.parameters import COMPUTE_DTYPE, named_parameters, trainable_parameters
from strategies.runtime import Runtime
from strategies.saving import FlatRange, RankState
from strategies.state import StateHeader, load_state

_GROWTH_INTERVAL = 2000
"""fp16: steps without overflow after which the loss scale doubles (the interval of mixed-precision training's authors)."""

_GROUP_STATE = ("k", "weight_sum", "lr_max")
"""What an optimizer counts per group rather than per parameter (schedule-free AdamW): saved beside the tensors."""


class NativeEngine:
    """A step module, its optimizer, and the arithmetic between backward and update."""

    host_memory: HostMemory | None = None
    full_parameters = FullParameters()

    casts_parameters = False
    """Whether the wrapper itself runs in the compute type; otherwise the forward pass runs under autocast."""
    replicated = True
    """Whether every rank holds every parameter whole."""

    def __init__(
        self,
        step_module: nn.Module,
        wrapped: nn.Module,
        *,
        make_optimizer: OptimizerFactory,
        max_grad_norm: float,
        precision: Precision,
        runtime: Runtime,
        strategy: str,
    ) -> None:
        self.step_module, self.wrapped, self.runtime, self.strategy = step_module, wrapped, runtime, strategy
        self.dp_rank, self.dp_size = runtime.rank, runtime.world_size
        self.trainable = trainable_parameters(step_module)
        self.optimizer = make_optimizer(self.trainable)
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.max_grad_norm = max_grad_norm
        self.precision = precision
        device = runtime.device
        self.scale = torch.full((), 2.0**16, device=device) if precision is Precision.fp16 else None
        self._steps_since_overflow = torch.zeros((), device=device)
        self._updates = torch.zeros((), device=device)
        self._steps = 0
        plan = plan_of(step_module)
        self.hooks = plan.optimizer_hooks
        assert self.hooks is None or self.replicated, "refused when a run is composed"
        self.average: WeightAverage | None = None
        if plan.ema_decay:
            self.average = WeightAverage(plan.ema_decay, [self._local(p.detach()) for _, p in self.trainable])

    def close(self) -> None:
        """Let go of gradients and optimizer state. See `Engine.close`."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()

    # -- forward and backward ------------------------------------------------------------------------------------

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.casts_parameters or self.precision is Precision.fp32:
            return nullcontext()
        return torch.autocast(self.runtime.device.type, COMPUTE_DTYPE[self.precision])

    def forward(self, batch: dict[str, Any], *, last: bool) -> dict[str, Tensor]:
        with self._autocast():
            return self.wrapped(batch)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        (loss if self.scale is None else loss * self.scale).backward()

    @contextmanager
    def inference(self, *, averaged: bool = True) -> Iterator[nn.Module]:
        """The step module in eval mode, without gradients. All ranks enter."""
        self.step_module.eval()
        try:
            with torch.no_grad(), self._autocast(), self._averaged() if averaged else nullcontext():
                yield self.step_module
        finally:
            self.step_module.train()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights, ours or those of an optimizer that trains others (schedule-free); afterwards the very others."""
        if self.average is not None:
            with self._swapped(self.average):
                yield
            return
        if not hasattr(self.optimizer, "eval"):
            yield
            return
        trained = [self._local(p.detach()) for _, p in self.trainable]
        trained_copies = [weight.clone() for weight in trained]  # swapping back by arithmetic would round
        self.optimizer.eval()
        try:
            yield
        finally:
            self.optimizer.train()  # type: ignore[attr-defined]
            copy_each(trained, trained_copies)
            self._weights_changed()

    @contextmanager
    def _swapped(self, average: WeightAverage) -> Iterator[None]:
        average.swap()
        self._weights_changed()
        try:
            yield
        finally:
            average.swap()
            self._weights_changed()

    def _weights_changed(self) -> None:
        """The weights were changed outside a step: drop what was gathered of them."""

    # -- update --------------------------------------------------------------------------------------------------

    def _local(self, tensor: Tensor) -> Tensor:
        """The part of a parameter or gradient that lies on this rank, as a plain tensor."""
        return tensor

    def _reduce_norm(self, squared: Tensor) -> Tensor:
        """Sum the squared norms of what each rank holds; the identity where every rank holds everything."""
        return squared

    def _grad_norm(self, grads: list[Tensor]) -> Tensor:
        if not grads:
            return self._reduce_norm(torch.zeros((), device=self.runtime.device)).sqrt()
        return self._reduce_norm(squared_norm(grads).to(self.runtime.device)).sqrt()

    @torch.no_grad()
    def step(self, lr_factor: float, update_filter: UpdateFilter | None = None) -> StepResult:
        """Clip to the global norm and update, unless a gradient is not finite or `update_filter` leaves the update out.

        With torch's fused optimizers nothing here waits for the device; the others must know first whether to step.
        """
        if self.hooks is not None:
            self.hooks.before_clip(self.scale)
        grads = [self._local(p.grad) for _, p in self.trainable if p.grad is not None]
        norm = self._grad_norm(grads)
        if self.scale is not None:
            norm = norm / self.scale
        finite = torch.isfinite(norm)
        if self.max_grad_norm > 0:
            factor = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        else:
            factor = torch.ones_like(norm)
        if self.scale is not None:
            factor = factor / self.scale
        if grads and (self.max_grad_norm > 0 or self.scale is not None):
            factor_beside = factor.to(grads[0].device)
            multiply_each(grads, factor_beside)
        applied = finite if update_filter is None else finite & ~update_filter(norm)
        self._update(applied, lr_factor)
        self._steps += 1
        if self.hooks is not None:
            self.hooks.after_update(self._steps, finite=bool(applied))
        self.optimizer.zero_grad(set_to_none=True)
        self._updates += applied
        if self.average is not None:
            self.average.update(self._updates, applied)
        if self.scale is not None:
            self._adjust_scale(finite)
        return StepResult(grad_norm=norm.float(), skipped=(~applied).float())

    def _update(self, applied: Tensor, lr_factor: float) -> None:
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * lr_factor
        if self._skips_on_device():
            # The fused kernels look at `found_inf` and leave parameters and moments alone: no host sync.
            self.optimizer.found_inf = self._beside_parameters((~applied).float())  # type: ignore[attr-defined]
            self.optimizer.step()
        elif bool(applied):
            self.optimizer.step()

    def _beside_parameters(self, flag: Tensor) -> Tensor:
        """Where they are, on the host where they are offloaded: torch's optimizers would copy it there and not wait for that."""
        return flag.to(self._local(self.trainable[0][1]).device)

    def _skips_on_device(self) -> bool:
        return bool(getattr(self.optimizer, "_step_supports_amp_scaling", False))

    def _adjust_scale(self, finite: Tensor) -> None:
        """Halve the loss scale on overflow, double it after a long run without (Micikevicius et al. 2017)."""
        assert self.scale is not None
        self._steps_since_overflow = torch.where(finite, self._steps_since_overflow + 1, 0.0)
        grow = self._steps_since_overflow >= _GROWTH_INTERVAL
        self.scale = torch.where(finite, torch.where(grow, self.scale * 2, self.scale), self.scale / 2)
        self._steps_since_overflow = torch.where(grow, 0.0, self._steps_since_overflow)

    # -- training state ------------------------------------------------------------------------------------------

    def _local_range(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        """This rank's part of a parameter (or moment of it), flattened, and where it starts in the whole."""
        return parameter.view(-1), 0

    def _flat_ranges(self, *, writing: bool) -> Iterator[FlatRange]:
        for number, (name, parameter) in enumerate(self.trainable):
            flat, start = self._local_range(parameter)
            tensors, whole_states = {"weight": flat.detach()}, dict[str, Tensor]()
            for key, moment in self.optimizer.state.get(parameter, {}).items():
                if not torch.is_tensor(moment) or moment.dim() == 0:
                    continue
                if moment.shape == parameter.shape and isinstance(moment, DTensor) == isinstance(parameter, DTensor):
                    tensors[key] = self._local(moment).view(-1)
                else:
                    whole_states[key] = moment.view(-1)
            if self.average is not None:
                tensors[EMA_KEY] = self.average.averages[number].reshape(-1)
            if self.hooks is not None:
                tensors |= {key: moment.view(-1) for key, moment in self.hooks.state_of(name).items()}
            if writing and self.replicated:  # each rank writes its share, so that no rank writes everything
                low, high = (flat.numel() * (self.dp_rank + i) // self.dp_size for i in (0, 1))
                tensors = {key: moment[low:high] for key, moment in tensors.items()}
                start = low
            yield FlatRange(name, parameter.numel(), start, tensors, write=self._writes_checkpoint())
            for (
                key,
                moment,
            ) in whole_states.items():  # factored moments and the like: whole, and the same, on every rank
                yield FlatRange(name, moment.numel(), 0, {key: moment}, write=self.runtime.is_main)

    def _writes_checkpoint(self) -> bool:
        return True

    def _ensure_moments(self) -> None:
        """Create the optimizer's state: a step with zero gradients at rate 0, which moves nothing and counts for nothing."""
        if any(self.optimizer.state.values()):
            return
        groups = self.optimizer.param_groups
        settings_before = [dict(group) for group in groups]
        for group in groups:
            group["lr"] = 0.0
        for _, parameter in self.trainable:
            parameter.grad = torch.zeros_like(parameter)
        if self._skips_on_device():
            self.optimizer.found_inf = self._beside_parameters(torch.zeros(()))  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for group, settings in zip(groups, settings_before, strict=True):
            group.update(settings)
        self._set_step(0)

    def _set_step(self, updates: int) -> None:
        """Tell the optimizer how many updates were applied, which bias correction counts."""
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"].fill_(updates)
            elif "step" in state:
                state["step"] = updates

    def state(self, progress: Progress) -> RankState:
        """The training state as it is now, to be written. All ranks must call. See `Engine.state`."""
        self._ensure_moments()
        header = StateHeader(
            progress=progress,
            optimizer_steps=int(self._updates),
            world_size=self.runtime.world_size,
            strategy=str(self.strategy),
            loss_scale=None if self.scale is None else float(self.scale),
            groups=[{key: g[key] for key in _GROUP_STATE if key in g} for g in self.optimizer.param_groups],
        )
        return RankState(self._flat_ranges(writing=True), header.json(), self.runtime)

    @torch.no_grad()
    def load(self, path: Path) -> Progress:
        """Read the training state written by any strategy at any world size, between two steps. All ranks must call."""
        self._ensure_moments()
        header = load_state(path, self._flat_ranges(writing=False), self.runtime)
        self._updates.fill_(header.optimizer_steps)
        self._set_step(header.optimizer_steps)
        self._steps = header.progress.step
        if self.hooks is not None:
            self.hooks.restored()
        for group, saved_group in zip(self.optimizer.param_groups, header.groups, strict=False):
            group.update({key: saved_group[key] for key in _GROUP_STATE if key in saved_group})
        if self.scale is not None and header.loss_scale is not None:
            self.scale.fill_(header.loss_scale)
            self._steps_since_overflow.zero_()
        self._weights_changed()
        return header.progress

    def gather(self, *, trainable_only: bool) -> Iterator[tuple[str, Tensor | None]]:
        """Full parameters one by one, on the CPU, under plain names; None on all ranks but 0."""
        parameters = self.trainable if trainable_only else list(named_parameters(self.step_module))
        with self._averaged():
            for name, parameter in parameters:
                full = self._full_parameter(parameter)
                # A copy where the live weights are about to change back.
                yield name, full.detach().to("cpu", copy=True) if self.runtime.is_main else None

    def _full_parameter(self, parameter: nn.Parameter) -> Tensor:
        """The full parameter. All ranks must call."""
        return parameter
