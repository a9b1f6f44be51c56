"""Makes DeepSpeed work in a simulation: a stand-in accelerator, no reads of values that do not exist, no view for each rank."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.accelerator.real_accelerator import set_accelerator
from deepspeed.comm import comm
from deepspeed.runtime.comm.coalesced_collectives import reduce_scatter_coalesced
from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle, ZeroParamStatus
from deepspeed.runtime.zero.utils import assert_ints_same_as_other_ranks
from torch import Tensor

from strategies.compat.deepspeed import forget_backend, forget_deepspeed_groups, replace_stage3_functions
from strategies.runtime import SIMULATED, Runtime


class _Stream:
    """A stream or an event of the simulated device, on which everything has happened already."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_args, **_kwargs: self

    def query(self) -> bool:
        return True


class SimulatedAccelerator(CPU_Accelerator):
    """The device `SIMULATED`, on which DeepSpeed makes the choices that it makes on GPUs."""

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
        return 1  # the parent class starts a program to count processors, at each collective

    def memory_allocated(self, device_index: int | None = None) -> int:
        return 0

    max_memory_allocated = memory_reserved = max_memory_reserved = memory_allocated


@torch.no_grad()
def reduce_scatter_shapes(tensors: list[Tensor], group: Any = None) -> list[Tensor]:
    """Stand in for DeepSpeed's `reduce_scatter_coalesced` in a simulation, where tensors have sizes but no values.

    Returns this rank's part of each gradient in `tensors`, through buffers and a collective of the same sizes as DeepSpeed's. Its
    elements would lie in another order: that saves DeepSpeed's views of every rank's parts, which with many ranks would be most
    of the work of a simulated step.
    """
    num_ranks = comm.get_world_size(group)
    rank = comm.get_rank(group)
    numels = [tensor.numel() for tensor in tensors]
    part_sizes = [math.ceil(numel / num_ranks) for numel in numels]
    pieces: list[Tensor] = []
    for tensor, numel, part_size in zip(tensors, numels, part_sizes, strict=True):
        pieces.append(tensor.view(-1))
        # The parts of the last ranks may be shorter, or empty: they are padded to `part_size`. All ranks before have full parts.
        first_rank_with_padding = numel // part_size
        for owner in range(first_rank_with_padding, num_ranks):
            padding = part_size - min(part_size, max(0, numel - part_size * owner))
            if padding:
                pieces.append(torch.empty(padding, dtype=tensor.dtype, device=tensor.device))
    flat = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    flat.div_(num_ranks)  # the mean over ranks
    own_part = flat.narrow(0, rank * sum(part_sizes), sum(part_sizes))
    comm.reduce_scatter_fn(own_part, flat, group=group)

    own_tensors = []
    start = 0
    for numel, part_size in zip(numels, part_sizes, strict=True):
        own_numel = min(part_size, max(0, numel - part_size * rank))
        own_tensors.append(own_part.narrow(0, start, own_numel))
        start += part_size
    return own_tensors


class GatheredTogether(AllGatherCoalescedHandle):  # type: ignore[misc]
    """Parameters gathered in one buffer. Each is copied out of it as one part, where DeepSpeed copies one part of each rank."""

    complete: bool

    def wait(self, handle_dependency: bool = True) -> None:
        """Complete a simulated all-gather of parameters: give each its full tensor, without a view for each of many ranks.

        Quantised gathers, and those of a secondary copy, are left to DeepSpeed.
        """
        if self.complete or self.quantization or self.use_secondary_tensor:
            super().wait(handle_dependency)
            return
        self.allgather_handle.wait()
        parameters: list[Any] = self.params  # DeepSpeed gives its parameters further attributes, `ds_...`
        for param in parameters:
            # The partitions of all ranks are views of one buffer, which the first one reaches from its beginning.
            part = self.partitions[0].as_strided((param.ds_numel,), (1,), 0)
            # A copy, as DeepSpeed's from the parts of all ranks: the memory counts.
            param.data = torch.cat([part]).view(param.ds_shape).to(param.ds_tensor.dtype)
            param.ds_status = ZeroParamStatus.AVAILABLE
        self.complete = True
        if not handle_dependency:  # DeepSpeed's list keeps the buffer alive until the caller has synchronised
            AllGatherCoalescedHandle.data_buffer.append([part])


def prepare_deepspeed(runtime: Runtime) -> None:
    """Prepare DeepSpeed, as it is in this process, for a run under `runtime`, simulated or real. Changes DeepSpeed's modules.

    A simulation is of one rank, whose tensors have no values. Some of DeepSpeed's own functions would read values there, or do
    for each of the other ranks what only takes time.

    - Stage 3 gets our stand-ins in a simulation, and DeepSpeed's own functions back in a real run.
    - The accelerator becomes that of the runtime's device.
    - In a simulation, DeepSpeed also forgets its backend and process groups, which an earlier simulation has left.
    """
    if runtime.simulated:
        replace_stage3_functions(
            reduce_scatter=reduce_scatter_shapes,  # no views of every rank's part
            gathered_handle=GatheredTogether,  # no copies of every rank's part
            compare_integers=lambda _integers: None,  # no other rank has integers to compare with
        )
    else:
        replace_stage3_functions(
            reduce_scatter=reduce_scatter_coalesced,
            gathered_handle=AllGatherCoalescedHandle,
            compare_integers=assert_ints_same_as_other_ranks,
        )
    accelerator_class = _accelerator_class(runtime.device)
    if type(get_accelerator()) is not accelerator_class:
        set_accelerator(accelerator_class())
    if runtime.simulated:
        forget_backend()
        forget_deepspeed_groups(also_existing=True)


def _accelerator_class(device: torch.device) -> type:
    """The class of DeepSpeed's accelerator for a device. A simulation of a CPU runs on the CPU itself, not on `SIMULATED`."""
    if device == SIMULATED:
        return SimulatedAccelerator
    if device.type == "cuda":
        return CUDA_Accelerator
    return CPU_Accelerator
