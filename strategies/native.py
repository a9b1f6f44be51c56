"""The engine of the strategies that use torch's own optimizers: single, ddp, fsdp2 and hsdp.

One place for clipping, skipping steps that are not finite, loss scaling and training state. A subclass says how
gradients are synchronised and which runs of the parameters this rank holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from strategies.base import (
    FullParameters,
    OptimizerFactory,
    Precision,
    Progress,
    StepResult,
    UpdateFilter,
    plan_of,
)
from strategies.compat.optimizers import copy_each, multiply_each
from strategies.ema import EMA_KEY, WeightAverage
from strategies.grad_norm import squared_norm
from strategies.host_memory import HostMemory
from strategies.inference import InferencePasses
from strategies.parameters import COMPUTE_DTYPE, named_parameters, trainable_parameters
from strategies.runtime import Runtime
from strategies.saving import FlatRange, RankState
from strategies.state import StateHeader, load_state

_GROWTH_INTERVAL = 2000
"""fp16: steps without overflow after which the loss scale doubles (the interval of mixed-precision training's authors)."""

_SAVED_GROUP_KEYS = ("k", "weight_sum", "lr_max")
"""What an optimizer counts per group rather than per parameter (schedule-free AdamW): saved beside the tensors."""


class LocalRange(NamedTuple):
    """This rank's part of a parameter: a contiguous range of the flattened full parameter."""

    values: Tensor
    """1-d, a view of the live parameter."""
    start: int
    """Index of the first of these values in the flattened full parameter."""
    full_numel: int
    """Elements of the full parameter."""


class SavedTensorsOfParameter(NamedTuple):
    """What a checkpoint has of one parameter, as 1-d tensors by key: `weight`, moments such as `exp_avg`, the average."""

    elementwise_by_key: dict[str, Tensor]
    """Tensors with one value for each element that this rank holds of the parameter."""
    moments_of_other_shape: dict[str, Tensor]
    """Moments of another shape than the parameter, such as factored ones: equal on every rank."""


class NativeEngine(InferencePasses):
    """A step module with its optimizer: gradient clipping, loss scaling, skipped updates, averages and checkpoints."""

    host_memory: HostMemory | None = None
    full_parameters = FullParameters()

    casts_parameters = False
    """Whether the wrapper itself runs in the compute type; otherwise the forward pass runs under autocast."""
    is_replicated = True
    """Whether every rank holds every parameter in full (single, ddp)."""

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
        """Build the optimizer for a model that a strategy has loaded and wrapped.

        `wrapped`: `step_module` as the strategy has wrapped it. `strategy`: its name, which saved states record.
        """
        self.step_module = step_module
        self.wrapped = wrapped
        self.runtime = runtime
        self.strategy = strategy
        self.rank = runtime.rank
        self.world_size = runtime.world_size
        self.trainable = trainable_parameters(step_module)
        self.optimizer = make_optimizer(self.trainable)
        self.base_learning_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.max_grad_norm = max_grad_norm
        self.precision = precision
        device = runtime.device
        # All of these stay on the device: reading one would make the host wait for the step.
        self.loss_scale = torch.full((), 2.0**16, device=device) if precision is Precision.fp16 else None
        """The loss scale; None except in fp16."""
        self._steps_since_overflow = torch.zeros((), device=device)
        self._num_updates = torch.zeros((), device=device)
        """Updates that were applied, of the whole run, 0-d: fewer than `_num_steps` if some were skipped."""
        self._num_steps = 0
        """Steps of the whole run, those whose update was skipped too."""
        plan = plan_of(step_module)
        self.optimizer_hooks = plan.optimizer_hooks
        """What the tuning method does around each step, such as AdaLoRA's pruning of ranks; None for most methods."""
        assert self.optimizer_hooks is None or self.is_replicated, "refused when a run is composed"
        self.weight_average = None
        if plan.ema_decay:
            weights = [self._local_part(parameter.detach()) for _, parameter in self.trainable]
            self.weight_average = WeightAverage(plan.ema_decay, weights)
        self.initial_weights = None
        if plan.keeps_initial_weights:
            weights = [self._local_part(parameter.detach()) for _, parameter in self.trainable]
            self.initial_weights = WeightAverage(1.0, weights)

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
        if self.loss_scale is not None:
            loss = loss * self.loss_scale
        loss.backward()

    @contextmanager
    def _averaged_weights_in_model(self) -> Iterator[None]:
        """A context with the averaged weights in the model, which are what a run evaluates and exports. All ranks enter.

        The average is our own (`optim.ema_decay`), or that of a schedule-free optimizer. Afterwards the trained weights are
        restored bit for bit. Without an average, the trained weights stay.
        """
        is_schedule_free = hasattr(self.optimizer, "eval")
        if self.weight_average is not None or not is_schedule_free:
            with super()._averaged_weights_in_model():
                yield
            return
        trained = [self._local_part(parameter.detach()) for _, parameter in self.trainable]
        # `eval` of a schedule-free optimizer puts its averages into the parameters. It could compute the trained weights from
        # them, but with rounding errors: keep copies.
        trained_copies = [weight.clone() for weight in trained]
        self.optimizer.eval()  # type: ignore[attr-defined]
        try:
            yield
        finally:
            self.optimizer.train()  # type: ignore[attr-defined]
            copy_each(trained, trained_copies)
            self._after_weight_change()

    # -- update --------------------------------------------------------------------------------------------------

    def _local_part(self, tensor: Tensor) -> Tensor:
        """This rank's part of a parameter or gradient, as a plain tensor."""
        return tensor

    def _sum_squared_norm_over_ranks(self, squared_norm_of_rank: Tensor) -> Tensor:
        """Sum the ranks' squared norms. Here the identity, because every rank holds everything."""
        return squared_norm_of_rank

    def _grad_norm(self, grads: list[Tensor]) -> Tensor:
        """The global L2 norm. A rank without gradients takes part as well, since the sum may be a collective."""
        if not grads:
            return self._sum_squared_norm_over_ranks(torch.zeros((), device=self.runtime.device)).sqrt()
        return self._sum_squared_norm_over_ranks(squared_norm(grads).to(self.runtime.device)).sqrt()

    @torch.no_grad()
    def step(self, lr_factor: float, update_filter: UpdateFilter | None = None) -> StepResult:
        """Clip the gradients to a global norm of `max_grad_norm`, update the weights, and clear the gradients.

        `lr_factor`: by which each parameter group's own rate is multiplied. The update is skipped if a gradient is not finite or
        `update_filter`, called with the norm, says so. With torch's fused optimizers and without `optimizer_hooks`, this is
        decided on the device, and the host does not wait for it. Otherwise the host reads the decision. All ranks must call.
        """
        if self.optimizer_hooks is not None:
            self.optimizer_hooks.before_clip(self.loss_scale)
        grads = [self._local_part(p.grad) for _, p in self.trainable if p.grad is not None]
        norm = self._grad_norm(grads)
        if self.loss_scale is not None:
            norm = norm / self.loss_scale
        # One gradient that is not finite makes the whole norm so, on all ranks alike.
        is_finite = torch.isfinite(norm)

        # Clipping and undoing the loss scale are one multiplication.
        if self.max_grad_norm > 0:
            grad_factor = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        else:
            grad_factor = torch.ones_like(norm)
        if self.loss_scale is not None:
            grad_factor = grad_factor / self.loss_scale
        if grads and (self.max_grad_norm > 0 or self.loss_scale is not None):
            multiply_each(grads, grad_factor.to(grads[0].device))

        is_applied = is_finite if update_filter is None else is_finite & ~update_filter(norm)
        self._update(is_applied, lr_factor)
        self._num_steps += 1
        if self.optimizer_hooks is not None:
            # The hooks, unlike the optimizer, decide on the host: it waits for the device here.
            self.optimizer_hooks.after_update(self._num_steps, is_applied=bool(is_applied))
        self.optimizer.zero_grad(set_to_none=True)

        self._num_updates += is_applied
        if self.weight_average is not None:
            self.weight_average.update(self._num_updates, is_applied)
        if self.loss_scale is not None:
            self._adjust_loss_scale(is_finite)
        return StepResult(grad_norm=norm.float(), skipped=(~is_applied).float())

    def _update(self, is_applied: Tensor, lr_factor: float) -> None:
        """Let the optimizer step with each group's base rate times `lr_factor`, if `is_applied`, a 0-d bool tensor, is true."""
        for group, base_lr in zip(self.optimizer.param_groups, self.base_learning_rates, strict=True):
            group["lr"] = base_lr * lr_factor
        if self._optimizer_skips_on_device():
            # The fused kernels look at `found_inf`, and change nothing if it is 1: the host does not wait for the device.
            self.optimizer.found_inf = self._on_parameter_device((~is_applied).float())  # type: ignore[attr-defined]
            self.optimizer.step()
        elif bool(is_applied):
            self.optimizer.step()

    def _on_parameter_device(self, flag: Tensor) -> Tensor:
        """Copy `flag`, a 0-d tensor, to the device of the parameters, which is the CPU if they are offloaded.

        torch's optimizers would copy it themselves, but without waiting for the copy.
        """
        _, first_parameter = self.trainable[0]
        return flag.to(self._local_part(first_parameter).device)

    def _optimizer_skips_on_device(self) -> bool:
        """Whether the optimizer's kernels read `found_inf` and skip the update themselves, as torch's fused ones do."""
        return bool(getattr(self.optimizer, "_step_supports_amp_scaling", False))

    def _adjust_loss_scale(self, is_finite: Tensor) -> None:
        """Adapt the factor by which the loss is multiplied in fp16, so that small gradients do not become 0.

        Halved on overflow, doubled after many steps without one (Micikevicius et al. 2017), on the device, without waiting.
        `is_finite`: whether the gradients of this step were finite, a 0-d bool tensor.
        """
        assert self.loss_scale is not None
        self._steps_since_overflow = torch.where(is_finite, self._steps_since_overflow + 1, 0.0)
        should_grow = self._steps_since_overflow >= _GROWTH_INTERVAL
        scale_without_overflow = torch.where(should_grow, self.loss_scale * 2, self.loss_scale)
        self.loss_scale = torch.where(is_finite, scale_without_overflow, self.loss_scale / 2)
        self._steps_since_overflow = torch.where(should_grow, 0.0, self._steps_since_overflow)

    # -- training state ------------------------------------------------------------------------------------------

    def _local_range(self, name: str, parameter: nn.Parameter) -> LocalRange:
        """The range of the flattened full parameter that this rank holds. Here all of it; sharding engines override it."""
        return LocalRange(parameter.view(-1), start=0, full_numel=parameter.numel())

    def _flat_ranges(self, *, for_writing: bool) -> Iterator[FlatRange]:
        """List the parts of the training state that this rank writes into a checkpoint (`for_writing`) or reads from one.

        Their tensors are views of the live ones. Each parameter has one FlatRange with its weights, moments and averages, whose
        range counts in the flattened full parameter. A moment of another shape has one of its own, which rank 0 writes whole.
        Replicated parameters are read in full by every rank and written in equal shares; sharded ones are read and written by the
        rank that holds the shard.
        """
        for index, (name, parameter) in enumerate(self.trainable):
            local_range = self._local_range(name, parameter)
            saved = self._saved_tensors_of_parameter(index, local_range)
            start = local_range.start
            elementwise_by_key = saved.elementwise_by_key
            if for_writing and self.is_replicated:
                # Every rank has all elements: each writes an equal share of them, so that `start` is no longer 0.
                start = local_range.full_numel * self.rank // self.world_size
                stop = local_range.full_numel * (self.rank + 1) // self.world_size
                elementwise_by_key = {key: tensor[start:stop] for key, tensor in elementwise_by_key.items()}
            # Under hsdp, the ranks of one replica write for all.
            yield FlatRange(
                name, local_range.full_numel, start, elementwise_by_key, is_written=self._writes_its_ranges()
            )
            for key, moment in saved.moments_of_other_shape.items():
                yield FlatRange(
                    name, moment.numel(), start=0, tensors_by_key={key: moment}, is_written=self.runtime.is_main
                )

    def _saved_tensors_of_parameter(self, index: int, local_range: LocalRange) -> SavedTensorsOfParameter:
        """Collect what a checkpoint has of one trainable parameter: weight, optimizer moments and average, as views.

        `index`: in `self.trainable`. `local_range`: this rank's range of the parameter. Counts that an optimizer keeps as numbers
        or 0-d tensors are left out.
        """
        name, parameter = self.trainable[index]
        elementwise = {"weight": local_range.values.detach()}
        moments_of_other_shape: dict[str, Tensor] = {}
        for key, moment in self.optimizer.state.get(parameter, {}).items():
            if not torch.is_tensor(moment) or moment.dim() == 0:
                continue
            # Moments of the parameter's shape are sharded with it. Others, such as factored ones, are equal on every rank.
            if moment.shape == parameter.shape and isinstance(moment, DTensor) == isinstance(parameter, DTensor):
                elementwise[key] = self._local_part(moment).view(-1)
            else:
                moments_of_other_shape[key] = moment.view(-1)
        if self.weight_average is not None:  # its averages are of this rank's parts already
            elementwise[EMA_KEY] = self.weight_average.averages[index].reshape(-1)
        # What the tuning method keeps, such as AdaLoRA's importance of each weight.
        if self.optimizer_hooks is not None:
            for key, hook_state in self.optimizer_hooks.state_of(name).items():
                elementwise[key] = hook_state.view(-1)
        return SavedTensorsOfParameter(elementwise, moments_of_other_shape)

    def _writes_its_ranges(self) -> bool:
        """Whether this rank writes its ranges into a checkpoint: false if a rank of another replica holds and writes the same."""
        return True

    def _ensure_moments(self) -> None:
        """Create the optimizer's moments before they are saved or loaded, since an optimizer creates them only in its first step.

        So this takes a step with zero gradients and a learning rate of 0, which changes no weight (weight decay is multiplied by
        the rate), and resets the step count. Nothing is done if there is state.
        """
        if any(self.optimizer.state.values()):
            return
        groups = self.optimizer.param_groups
        original_settings = [dict(group) for group in groups]
        for group in groups:
            group["lr"] = 0.0
        for _, parameter in self.trainable:
            parameter.grad = torch.zeros_like(parameter)
        if self._optimizer_skips_on_device():
            # 0: do not skip this step. An earlier one may have left a 1.
            self.optimizer.found_inf = self._on_parameter_device(torch.zeros(()))  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for group, settings in zip(groups, original_settings, strict=True):
            group.update(settings)
        self._set_update_count(0)

    def _set_update_count(self, updates: int) -> None:
        """Set the optimizer's count of applied updates, which bias correction uses."""
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"].fill_(updates)
            elif "step" in state:
                state["step"] = updates

    def state(self, progress: Progress) -> RankState:
        """Collect this rank's part of the training state of now, ready to be written as a checkpoint. All ranks must call.

        `progress`: how far the run is. The tensors are views of the live ones: write them, or copy them, before the next step.
        """
        self._ensure_moments()  # an optimizer has no moments before its first step, and a checkpoint needs them
        header = StateHeader(
            progress=progress,
            optimizer_steps=int(self._num_updates),
            world_size=self.runtime.world_size,
            strategy=str(self.strategy),
            loss_scale=None if self.loss_scale is None else float(self.loss_scale),
            groups=[_saved_group_counts(group) for group in self.optimizer.param_groups],
        )
        return RankState(self._flat_ranges(for_writing=True), header.json(), self.runtime)

    @torch.no_grad()
    def load(self, path: Path) -> Progress:
        """Resume: read the training state in the directory `path`, whatever strategy and world size wrote it.

        Returns how far the run was. Raises on every rank: StorageError if files cannot be used, ConfigError if the state is of
        another kind of run. All ranks must call.
        """
        self._ensure_moments()  # the tensors of the state must exist, since values are read into them
        header = load_state(path, self._flat_ranges(for_writing=False), self.runtime)
        self._num_updates.fill_(header.optimizer_steps)
        self._set_update_count(header.optimizer_steps)
        self._num_steps = header.progress.step
        if self.optimizer_hooks is not None:
            self.optimizer_hooks.after_restore()
        # A state that ZeRO or an earlier version wrote has no groups: their counts then stay as they are.
        for group, saved_group in zip(self.optimizer.param_groups, header.groups, strict=False):
            group.update(_saved_group_counts(saved_group))
        if self.loss_scale is not None and header.loss_scale is not None:
            self.loss_scale.fill_(header.loss_scale)
            self._steps_since_overflow.zero_()
        self._after_weight_change()
        return header.progress

    def gather_full_parameters(self, *, trainable_only: bool) -> Iterator[tuple[str, Tensor | None]]:
        """Gather the full parameters onto rank 0, one by one: (plain name, full parameter on the CPU).

        On other ranks the parameter is None. `trainable_only`: without those that do not train. The values are the averaged
        weights if the run averages them. Each step of the iterator is a collective, so all ranks must exhaust it.
        """
        parameters = self.trainable if trainable_only else list(named_parameters(self.step_module))
        with self._averaged_weights_in_model():
            for name, parameter in parameters:
                full = self._full_parameter(name, parameter)
                if not self.runtime.is_main:
                    yield name, None
                    continue
                # Always a copy: on a CPU the averaged weights in place now are about to change back.
                yield name, full.detach().to("cpu", copy=True)

    def _full_parameter(self, name: str, parameter: nn.Parameter) -> Tensor:
        """The full parameter. All ranks must call."""
        return parameter


def _saved_group_counts(group: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps of an optimizer's parameter group: counts such as `{"k": 120, "weight_sum": 3.1}`, or nothing."""
    return {key: group[key] for key in _SAVED_GROUP_KEYS if key in group}
