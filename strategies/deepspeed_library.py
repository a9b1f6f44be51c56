"""The DeepSpeed library as it is used here: quiet, and on CPUs without a compiler and with its own exchange and norm."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from strategies.base import UpdateFilter
from strategies.compat.deepspeed import (
    grad_norm_in_step,
    leave_shared_memory_op_out,
    replace_backend,
    silence_memory_reports,
)
from strategies.compat.dispatch import tree_leaves
from strategies.compat.optimizers import multiply_each
from strategies.grad_norm import squared_norm
from strategies.host_memory import HostMemory
from strategies.runtime import Runtime

_CPU = torch.device("cpu")
_MIN_ELEMENTS = 2**12
"""Elements below which a collective stays with the process group: flags and norms."""
_AVERAGES = {"SUM": False, "AVG": True}
"""Reductions that go through the memory, by name: DeepSpeed and torch each have their own enumeration."""


def import_deepspeed(*, on_cpu: bool) -> Any:
    """DeepSpeed, quiet, and on a CPU without the shared-memory op that would need a C++ compiler."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with _without("mlflow"):  # its autotuner would report there; where it is installed, importing it takes seconds
        import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # DeepSpeed calls collectives by their old names, once a warning each time.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*` is deprecated", category=FutureWarning)
    silence_memory_reports()
    if on_cpu:
        leave_shared_memory_op_out()
    return deepspeed


@contextmanager
def _without(module: str) -> Iterator[None]:
    """Within it, `module` cannot be imported, unless it is already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


def free_engine_memory(engine: Any) -> None:
    """Give up the memory of an engine that is used no more. No collective.

    Its hooks, and under stage 3 more than those, keep parameters alive from within autograd, where no garbage collection looks:
    what they keep is emptied.
    """
    engine.destroy()
    optimizer = engine.optimizer
    parameters = list(engine.module.parameters())
    kept_alive = [list(vars(optimizer).values()), list(optimizer.optimizer.state.values()), parameters]
    kept_alive += [[p.grad for p in parameters], [getattr(p, "ds_tensor", None) for p in parameters]]
    for tensor in tree_leaves(kept_alive):
        if isinstance(tensor, Tensor) and tensor.device.type != "meta" and tensor.untyped_storage().resizable():
            tensor.untyped_storage().resize_(0)


def settle_accelerator(runtime: Runtime) -> None:
    """Let DeepSpeed see the device of `runtime`, one that is simulated too.

    It takes the rank within its host for the number of a GPU, which it is not where each rank sees its own GPU alone.
    """
    if runtime.device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(runtime.device.index)
    if runtime.simulated or "strategies.simulated_deepspeed" in sys.modules:
        from strategies.simulated_deepspeed import choose_accelerator

        choose_accelerator(runtime)


class _FinishedWork:
    """The handle of a collective that has ended."""

    def wait(self) -> None:
        pass


class HostExchange:
    """Stands in for DeepSpeed's backend: large collectives of all ranks go through the memory, all else to the backend."""

    def __init__(self, backend: Any, memory: HostMemory) -> None:
        self.backend, self.memory = backend, memory

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def _goes_through_memory(self, tensor: Tensor, group: Any, op: Any = dist.ReduceOp.SUM) -> bool:
        """Whether a collective is ours: of all ranks, large, in one piece; decided alike on every rank."""
        everyone = group is None or dist.get_world_size(group) == self.memory.size
        return everyone and tensor.numel() >= _MIN_ELEMENTS and tensor.is_contiguous() and op.name in _AVERAGES

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        if not self._goes_through_memory(tensor, group, op):
            return self.backend.all_reduce(tensor, op, group=group, async_op=async_op)
        self.memory.all_reduce(tensor, average=_AVERAGES[op.name])
        return _FinishedWork()

    def all_gather_into_tensor(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        if not self._goes_through_memory(output_tensor, group):
            return self.backend.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)
        self.memory.all_gather(output_tensor, input_tensor)
        return _FinishedWork()

    def reduce_scatter_tensor(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if not self._goes_through_memory(input_tensor, group, op):
            return self.backend.reduce_scatter_tensor(output_tensor, input_tensor, op, group=group, async_op=async_op)
        self.memory.reduce_scatter(output_tensor, input_tensor, average=_AVERAGES[op.name])
        return _FinishedWork()


def route_collectives_through(memory: HostMemory | None) -> None:
    """Let DeepSpeed's collectives go through `memory`, or as it makes them itself."""

    def through_memory(current: Any) -> Any:
        backend = current.backend if isinstance(current, HostExchange) else current
        return backend if memory is None else HostExchange(backend, memory)

    replace_backend(through_memory)


def global_norm(
    gradients: list[Tensor], parameters: list[Any], norm_type: float = 2.0, *, device: torch.device = _CPU
) -> Tensor:
    """What DeepSpeed asks its optimizer for: the norm over all ranks' `gradients` on `device`, -1 where it is not finite.

    Its own copies everything to float64 first, a tenth of a step on a CPU, and a GPU is waited for. All ranks must call.
    """
    assert norm_type == 2.0
    squared = squared_norm(gradients) if gradients else torch.zeros((), device=device)
    dist.all_reduce(squared)
    norm = squared.sqrt()
    return torch.where(norm.isfinite(), norm, -1.0)


class DeviceClipping:
    """Clips, and leaves out what is not finite, where the gradients are: a hook before each step of the inner optimizer.

    DeepSpeed reads the norm on the host to decide both, several times a step. For torch's fused optimizers, which look at
    `found_inf`, in bf16, with DeepSpeed's own clipping and its check of overflow switched off.
    """

    def __init__(self, zero: Any, max_norm: float, device: torch.device) -> None:
        self.zero, self.max_norm, self.device = zero, max_norm, device
        self._update_filter: UpdateFilter | None = None
        self._applied: Tensor | None = None
        zero.optimizer.register_step_pre_hook(self._before_step)

    def begin(self, update_filter: UpdateFilter | None) -> None:
        """A step is about to be taken; `update_filter` may leave its update out."""
        self._update_filter, self._applied = update_filter, None

    def norm(self) -> Tensor:
        """Of the gradients of this step before clipping, 0-d float32, infinite where one is not finite; waits for nothing."""
        return torch.as_tensor(grad_norm_in_step(self.zero), dtype=torch.float32, device=self.device)

    def applied(self) -> Tensor:
        """Whether the update of this step is made, 0-d bool; the filter is asked once, all ranks alike."""
        if self._applied is None:
            norm = self.norm()
            self._applied = norm.isfinite()
            if self._update_filter is not None:
                self._applied = self._applied & ~self._update_filter(norm)
        return self._applied

    def _before_step(self, inner: Any, *_: Any) -> None:
        inner.found_inf = (~self.applied()).float()
        if self.max_norm > 0:
            factor = (self.max_norm / (self.norm() + 1e-6)).clamp(max=1.0)
            multiply_each([p.grad for g in inner.param_groups for p in g["params"] if p.grad is not None], factor)


class UpdateGate:
    """Leaves an update out where a filter says so: before the first step of the inner optimizer, when the norm is known.

    The rest of DeepSpeed's step goes on, with weights and moments as they were. The answer is read on the host, as DeepSpeed
    reads the norm.
    """

    def __init__(self, zero: Any, device: torch.device) -> None:
        self.zero, self.device = zero, device
        self.skipped: bool | None = None
        """Of this step; None where nobody was asked."""
        self._update_filter: UpdateFilter | None = None
        self._inner_step = zero.optimizer.step
        zero.optimizer.step = self._step_unless_refused

    def begin(self, update_filter: UpdateFilter | None) -> None:
        """A step is about to be taken; `update_filter` may leave its update out."""
        self._update_filter, self.skipped = update_filter, None

    def _step_unless_refused(self, *args: Any, **kwargs: Any) -> Any:
        if self._update_filter is not None and self.skipped is None:  # of several parameter groups, with the first
            norm = torch.as_tensor(grad_norm_in_step(self.zero), dtype=torch.float32, device=self.device)
            self.skipped = bool(self._update_filter(norm))
        return None if self.skipped else self._inner_step(*args, **kwargs)
