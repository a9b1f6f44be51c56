"""DeepSpeed in a simulation: an accelerator that is not there, and no look at values that do not exist."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.accelerator.real_accelerator import set_accelerator
from deepspeed.comm import comm
from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator, stage3
from deepspeed.runtime.zero.utils import assert_ints_same_as_other_ranks
from deepspeed.utils import groups
from torch import Tensor

from strategies.runtime import SIMULATED, Runtime

_LOOK_AT_VALUES = (partition_parameters, partitioned_param_coordinator, stage3)
"""Modules that ask the other ranks whether they have the same numbers."""


class _Stream:
    """A stream or an event; everything on it has happened already."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_args, **_kwargs: self

    def query(self) -> bool:
        return True


class SimulatedAccelerator(CPU_Accelerator):
    """`SIMULATED` with the choices that DeepSpeed makes on GPUs."""

    Stream = Event = property(lambda self: _Stream)  # type: ignore[assignment]

    def is_synchronized_device(self) -> bool:
        return False

    def use_host_timers(self) -> bool:
        return False

    def device_name(self, device_index: int | None = None) -> str:
        return str(SIMULATED)

    current_device_name = device_name

    def device(self, device_index: int | None = None) -> Any:
        return contextlib.nullcontext()

    def current_device(self) -> str:
        return str(SIMULATED)

    def stream(self, stream: Any) -> Any:
        return contextlib.nullcontext()

    def current_stream(self, device_index: int | None = None) -> Any:
        return _Stream()

    default_stream = current_stream

    def is_fp16_supported(self) -> bool:
        return True

    def supported_dtypes(self) -> list[torch.dtype]:
        return [torch.float, torch.half, torch.bfloat16]

    def pin_memory(self, tensor: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.device != SIMULATED

    def on_accelerator(self, tensor: Tensor) -> bool:
        return tensor.device == SIMULATED

    def device_count(self) -> int:
        return 1  # else a program is started to count the host's processors, at each collective

    def memory_allocated(self, device_index: int | None = None) -> int:
        return 0

    max_memory_allocated = memory_reserved = max_memory_reserved = memory_allocated


def settle(runtime: Runtime) -> None:
    """Give DeepSpeed the accelerator of `runtime`, and no memory of the process groups of an earlier simulation."""
    simulated = runtime.device == SIMULATED
    if isinstance(get_accelerator(), SimulatedAccelerator) != simulated:
        set_accelerator(SimulatedAccelerator() if simulated else CPU_Accelerator())
    for module in _LOOK_AT_VALUES:
        module.assert_ints_same_as_other_ranks = (  # type: ignore[attr-defined]
            (lambda ints: None) if runtime.simulated else assert_ints_same_as_other_ranks
        )
    if runtime.simulated:
        comm.cdb = None
        groups._release_process_group_references()
