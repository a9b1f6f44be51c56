"""Parameters on their way from the meta device to their values: names, data types, allocation, loading."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode

from strategies.base import ParameterSource, Precision
from strategies.compat.modules import own_parameters, replace_buffers
from strategies.runtime import Runtime

PREFIX = "model."
"""The step module holds the model under this attribute. A plain name is what follows it."""
TEACHER = "teacher."
"""The step module may hold a frozen model under this attribute. Names of its parameters keep the prefix."""
REWARD_MODELS = "reward_models."
"""Likewise of models that score written answers, each under its name: no training step computes them."""
BESIDE = (TEACHER, REWARD_MODELS)
"""Beginnings of the names of all parameters that do not belong to the model itself."""

COMPUTE_DTYPE = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}

LARGE_ELEMENTS = 2**20
"""Tensors of at least this many elements are made on meta from the first."""
READ_TOGETHER_ELEMENTS = 2**20
"""Parameters with fewer elements are read by every rank: an exchange would take longer."""
CONSTRUCTORS = (torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)
"""Functions that make parameters, like `torch.empty`, but also masks."""

RANDOM_FILLS = frozenset(
    ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_", "xavier_normal_")
)
"""Functions that draw initial values. Meta tensors have no values, and yet drawing takes a third of the time of building."""


@contextmanager
def meta_context() -> Iterator[None]:
    """Inside the context modules are built with parameters on the meta device and real buffers (rotary tables, masks)."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), _Unallocated():
        yield


class _Unallocated(TorchFunctionMode):
    """Makes large parameters on meta from the first: all experts of a layer are tens of GiB, which a host may not have.

    Uninitialised tensors become parameters. Of others only those with three dimensions do: masks have two.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in RANDOM_FILLS:
            tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        if self._is_large(func, args, kwargs):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)

    @staticmethod
    def _is_large(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call makes a large tensor that is to become a parameter, on a device that the call leaves open."""
        if kwargs.get("device") is not None or (func is not torch.empty and func not in CONSTRUCTORS):
            return False
        # A size is a keyword, one sequence, or several numbers.
        positional = args[0] if args and isinstance(args[0], tuple | list) else args
        size = kwargs.get("size", positional)
        if not all(isinstance(length, int) for length in size):
            return False
        if func is not torch.empty and len(size) < 3:
            return False
        return math.prod(size) >= LARGE_ELEMENTS


def named_parameters(step_module: nn.Module, *, teacher: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
    """(plain name, parameter) of every distinct parameter; a tied one comes once. The model's state dict has plain names too.

    With `teacher` also the parameters of the frozen models beside it.
    """
    for name, parameter in step_module.named_parameters():
        if teacher or not name.startswith(BESIDE):
            yield name.removeprefix(PREFIX), parameter


@runtime_checkable
class PackedModule(Protocol):
    """A module that stores weights packed, as bytes."""

    packed_elements: dict[str, int]
    """Elements that each packed weight stands for, by its name in the module."""


def element_counts(step_module: nn.Module) -> dict[str, int]:
    """Elements of each distinct parameter by plain name: of the full parameter, whatever this rank holds of it.

    For a packed weight the elements that it stands for, not its bytes.
    """
    counts: dict[str, int] = {}
    for name, parameter in named_parameters(step_module):
        owner_name, _, key = name.rpartition(".")
        owner = step_module.get_submodule(PREFIX + owner_name) if owner_name else None
        if isinstance(owner, PackedModule) and key in owner.packed_elements:
            counts[name] = owner.packed_elements[key]
        elif share := getattr(owner, "expert_share", None):  # experts that are dealt: of all ranks together
            counts[name] = share.full_shape(parameter.shape).numel()
        else:
            # ZeRO-3 leaves an empty tensor in the place of a parameter, and its full size in `ds_numel`.
            counts[name] = getattr(parameter, "ds_numel", parameter.numel())
    return counts


def trainable_parameters(step_module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(plain name, parameter) of the distinct parameters that train, in module order."""
    return [(name, p) for name, p in named_parameters(step_module) if p.requires_grad]


def replace_parameters(module: nn.Module, make: Callable[[nn.Parameter], torch.Tensor]) -> None:
    """Replace every parameter by `make(parameter)`. Parameters that several modules share stay shared; `requires_grad` stays."""
    replacements: dict[int, nn.Parameter] = {}  # by the id of the old parameter
    keep_alive = []  # an id is unique only while its object lives
    for owner in module.modules():
        parameters = own_parameters(owner)
        for name, old in list(parameters.items()):
            if old is None:
                continue
            if id(old) not in replacements:
                keep_alive.append(old)
                replacements[id(old)] = nn.Parameter(make(old), requires_grad=old.requires_grad)
            parameters[name] = replacements[id(old)]


def set_dtypes(step_module: nn.Module, *, trainable: torch.dtype, frozen: torch.dtype) -> None:
    """Give parameters on meta the types in which they will be stored: `trainable` for those that train, `frozen` for others.

    Packed (quantised) parameters keep theirs.
    """

    def retyped(parameter: nn.Parameter) -> torch.Tensor:
        if not parameter.is_floating_point():
            return parameter.data
        dtype = trainable if parameter.requires_grad else frozen
        return torch.empty_like(parameter.data, dtype=dtype)

    replace_parameters(step_module, retyped)


def materialize(step_module: nn.Module, device: torch.device) -> None:
    """Allocate meta parameters on `device`, without values, and move buffers there."""

    def allocated(parameter: nn.Parameter) -> torch.Tensor:
        if not parameter.is_meta:
            return parameter.data
        return torch.empty_like(parameter.data, device=device)

    replace_parameters(step_module, allocated)
    replace_buffers(step_module, lambda buffer: buffer.to(device))


@torch.no_grad()
def fill_in_full(step_module: nn.Module, source: ParameterSource, runtime: Runtime) -> None:
    """Load every parameter in full, for strategies that do not shard parameters. All ranks must call.

    Ranks with GPUs read a large parameter together: each its part, which they exchange over their own network. Ranks on CPUs
    read everything, which the page cache of their host serves.
    """
    together = runtime.kind == "cuda" and not runtime.simulated
    for name, parameter in named_parameters(step_module, teacher=True):
        if together:
            fill_together(parameter, name, source, runtime)
        else:
            values = source.read_slice(name, parameter.shape, 0, parameter.numel())
            parameter.view(-1).copy_(values)


@torch.no_grad()
def fill_together(parameter: torch.Tensor, name: str, source: ParameterSource, runtime: Runtime) -> None:
    """Load a parameter in full on every rank, of which each reads its part. All ranks must call, in the same order.

    Small parameters, and packed ones, which a host keeps, are read by every rank.
    """
    count = parameter.numel()
    flat = parameter.view(-1)
    if runtime.world_size == 1 or count < READ_TOGETHER_ELEMENTS or not parameter.is_floating_point():
        flat.copy_(source.read_slice(name, parameter.shape, 0, count))
        return
    share = -(-count // runtime.world_size)
    start = min(runtime.rank * share, count)
    stop = min(start + share, count)
    part = torch.empty(share, dtype=parameter.dtype, device=parameter.device)
    if start < stop:
        part[: stop - start].copy_(source.read_slice(name, parameter.shape, start, stop))
    parts = torch.empty(share * runtime.world_size, dtype=parameter.dtype, device=parameter.device)
    dist.all_gather_into_tensor(parts, part)
    flat.copy_(parts[:count])
