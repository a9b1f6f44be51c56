"""Adapts DeepSpeed: quiet, and on CPUs without a compiler, with our own collectives through shared memory and our own norm."""

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
    disable_shared_memory_op,
    grad_norm_in_step,
    replace_backend,
    silence_deepspeed_memory_reports,
)
from strategies.compat.dispatch import tree_leaves
from strategies.compat.optimizers import multiply_each
from strategies.grad_norm import squared_norm
from strategies.host_memory import HostMemory
from strategies.runtime import Runtime

_CPU = torch.device("cpu")
_MIN_SHARED_MEMORY_ELEMENTS = 2**12
"""Smaller tensors (flags and norms) stay with the process group."""
_IS_AVERAGE_BY_OPERATION = {"SUM": False, "AVG": True}
"""Whether a reduction averages, by its name: DeepSpeed and torch each have an enumeration of their own. Others are not ours."""


def import_deepspeed(*, on_cpu: bool) -> Any:
    """Import DeepSpeed and return it, without its messages, and on a CPU without an op of its own that needs a C++ compiler."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its autotuner imports mlflow if that is installed, which takes seconds, and is not used here.
    with _mlflow_import_blocked():
        import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # DeepSpeed calls collectives by their old names, and each call warns.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*` is deprecated", category=FutureWarning)
    silence_deepspeed_memory_reports()
    if on_cpu:
        disable_shared_memory_op()
    return deepspeed


@contextmanager
def _mlflow_import_blocked() -> Iterator[None]:
    """A context in which mlflow seems not to be installed, so that nobody imports it; unless it has been imported before."""
    if "mlflow" in sys.modules:
        yield
        return
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # Python raises ImportError for such an entry
    try:
        yield
    finally:
        del sys.modules["mlflow"]


def free_deepspeed_engine(engine: Any) -> None:
    """Free the memory of a DeepSpeed engine that is not used any more: parameters, gradients and optimizer state. No collective.

    References from inside autograd (hooks, and others under stage 3), which garbage collection does not find, keep its parameters
    alive. So the storages themselves are emptied.
    """
    engine.destroy()
    optimizer = engine.optimizer
    parameters = list(engine.module.parameters())
    owners_of_tensors: list[Any] = [
        list(vars(optimizer).values()),
        list(optimizer.optimizer.state.values()),  # torch's optimizer inside of DeepSpeed's
        parameters,
        [parameter.grad for parameter in parameters],
        [getattr(parameter, "ds_tensor", None) for parameter in parameters],
    ]
    for leaf in tree_leaves(owners_of_tensors):
        if isinstance(leaf, Tensor) and leaf.device.type != "meta" and leaf.untyped_storage().resizable():
            leaf.untyped_storage().resize_(0)


def set_deepspeed_device(runtime: Runtime) -> None:
    """Make DeepSpeed use the device of `runtime`, which may be a simulated one. Call it before DeepSpeed starts."""
    # DeepSpeed uses LOCAL_RANK, the rank within the host, as the number of the GPU. That is wrong if each rank sees only its own.
    if runtime.device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(runtime.device.index)
    # The module is loaded if this process has simulated DeepSpeed before: its stand-ins must be taken out for a real run.
    may_have_stand_ins = "strategies.simulated_deepspeed" in sys.modules
    if runtime.simulated or may_have_stand_ins:
        from strategies.simulated_deepspeed import prepare_deepspeed

        prepare_deepspeed(runtime)


class _FinishedWork:
    """The handle of a collective that is already over."""

    def wait(self) -> None:
        pass


class SharedMemoryBackend:
    """Stands in for DeepSpeed's backend. Large collectives of all ranks go through shared memory, the rest to the backend."""

    def __init__(self, backend: Any, memory: HostMemory) -> None:
        self.backend = backend
        self.memory = memory

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def _uses_shared_memory(self, tensor: Tensor, group: Any, op: Any = dist.ReduceOp.SUM) -> bool:
        """Whether a collective goes through shared memory: it is of all ranks, large, and its tensor contiguous.

        Every rank decides alike.
        """
        is_of_all_ranks = group is None or dist.get_world_size(group) == self.memory.size
        is_large = tensor.numel() >= _MIN_SHARED_MEMORY_ELEMENTS
        return is_of_all_ranks and is_large and tensor.is_contiguous() and op.name in _IS_AVERAGE_BY_OPERATION

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        if not self._uses_shared_memory(tensor, group, op):
            return self.backend.all_reduce(tensor, op, group=group, async_op=async_op)
        self.memory.all_reduce(tensor, average=_IS_AVERAGE_BY_OPERATION[op.name])
        return _FinishedWork()

    def all_gather_into_tensor(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        if not self._uses_shared_memory(output_tensor, group):
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
        """Reduce `input_tensor` over the ranks of `group`, and put this rank's part into `output_tensor`. All must call.

        DeepSpeed calls it in place of `torch.distributed`'s function of that name. A large tensor of all ranks goes through
        shared memory, and is done when it returns; anything else goes to DeepSpeed's own backend.
        """
        if not self._uses_shared_memory(input_tensor, group, op):
            return self.backend.reduce_scatter_tensor(output_tensor, input_tensor, op, group=group, async_op=async_op)
        self.memory.reduce_scatter(output_tensor, input_tensor, average=_IS_AVERAGE_BY_OPERATION[op.name])
        return _FinishedWork()


def route_collectives_through(memory: HostMemory | None) -> None:
    """Let DeepSpeed's large collectives between CPU ranks of a host go through shared memory.

    Replaces the backend that `deepspeed.comm` calls, in this process; with None, by DeepSpeed's own again.
    """

    def through_memory(current: Any) -> Any:
        # An earlier engine of this process may have put our stand-in there.
        backend = current.backend if isinstance(current, SharedMemoryBackend) else current
        if memory is None:
            return backend
        return SharedMemoryBackend(backend, memory)

    replace_backend(through_memory)


def gradient_norm_over_ranks(
    gradients: list[Tensor], parameters: list[Any], norm_type: float = 2.0, *, device: torch.device = _CPU
) -> Tensor:
    """Compute the norm over all ranks' `gradients`, 0-d on `device`; -1 if it is not finite, as DeepSpeed expects it.

    Replaces a method of DeepSpeed's optimizers with this signature, which copies everything to float64 first (a tenth of a step
    on a CPU), and waits for a GPU. All ranks must call.
    """
    assert norm_type == 2.0  # DeepSpeed passes no other
    sum_of_squares = squared_norm(gradients) if gradients else torch.zeros((), device=device)
    dist.all_reduce(sum_of_squares)
    norm = sum_of_squares.sqrt()
    return torch.where(norm.isfinite(), norm, -1.0)


class DeviceClipping:
    """Clips gradients and skips updates on the device, in a hook before each step of the inner optimizer.

    DeepSpeed itself decides both on the host, which reads the norm several times a step. This class is for bf16 with torch's
    fused optimizers, which read `found_inf`. DeepSpeed's own clipping and overflow check are switched off.
    """

    def __init__(self, zero_optimizer: Any, max_norm: float, device: torch.device) -> None:
        self.zero_optimizer = zero_optimizer
        self.max_norm = max_norm
        self.device = device
        self._update_filter: UpdateFilter | None = None
        self._is_applied: Tensor | None = None
        """Whether the update of the current step is applied, 0-d bool; None until the filter was called."""
        zero_optimizer.optimizer.register_step_pre_hook(self._skip_or_clip_before_step)

    def begin_step(self, update_filter: UpdateFilter | None) -> None:
        """Set the filter that may skip the update of the coming step. Call it before each step."""
        self._update_filter = update_filter
        self._is_applied = None

    def gradient_norm(self) -> Tensor:
        """Norm of this step's gradients before clipping, 0-d float32; infinite if one is not finite. Does not wait."""
        return torch.as_tensor(grad_norm_in_step(self.zero_optimizer), dtype=torch.float32, device=self.device)

    def decide_update(self) -> Tensor:
        """Whether this step's update is applied, 0-d bool. Calls the filter the first time in a step, on all ranks alike."""
        if self._is_applied is None:
            norm = self.gradient_norm()
            self._is_applied = norm.isfinite()
            if self._update_filter is not None:
                self._is_applied = self._is_applied & ~self._update_filter(norm)
        return self._is_applied

    def _skip_or_clip_before_step(self, inner_optimizer: Any, *_: Any) -> None:
        """Hook before the step of torch's optimizer inside DeepSpeed's: on the device, decide if it skips, and clip gradients.

        A fused optimizer changes nothing if its `found_inf` is 1.
        """
        inner_optimizer.found_inf = (~self.decide_update()).float()
        if self.max_norm > 0:
            factor = (self.max_norm / (self.gradient_norm() + 1e-6)).clamp(max=1.0)
            parameters = [parameter for group in inner_optimizer.param_groups for parameter in group["params"]]
            multiply_each([parameter.grad for parameter in parameters if parameter.grad is not None], factor)


class UpdateGate:
    """Skips an update if the update filter says so, by replacing the inner optimizer's `step`, when the norm is known.

    The rest of DeepSpeed's step runs with unchanged weights and moments. The host waits for the filter's answer, as it does for
    DeepSpeed's norm.
    """

    def __init__(self, zero_optimizer: Any, device: torch.device) -> None:
        self.zero_optimizer = zero_optimizer
        self.device = device
        self.is_skipped: bool | None = None
        """Whether this step's update was skipped; None if the filter was not called."""
        self._update_filter: UpdateFilter | None = None
        self._inner_step = zero_optimizer.optimizer.step
        zero_optimizer.optimizer.step = self._step_unless_skipped

    def begin_step(self, update_filter: UpdateFilter | None) -> None:
        """Set the filter that may skip the update of the coming step. Call it before each step."""
        self._update_filter = update_filter
        self.is_skipped = None

    def _step_unless_skipped(self, *args: Any, **kwargs: Any) -> Any:
        """Replaces the inner optimizer's `step`: does nothing if the update filter refuses the norm of this step."""
        # DeepSpeed steps once for each parameter group. The filter is called with the first.
        if self._update_filter is not None and self.is_skipped is None:
            norm = torch.as_tensor(grad_norm_in_step(self.zero_optimizer), dtype=torch.float32, device=self.device)
            self.is_skipped = bool(self._update_filter(norm))
        if self.is_skipped:
            return None
        return self._inner_step(*args, **kwargs)
