"""Parameters between the meta device and their values: names, data types, materialising, filling."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from strategies.base import ParameterSource, Precision
from strategies.compat.modules import own_parameters, replace_buffers

PREFIX = "model."
"""The step module holds the model under this attribute; a plain name is the rest."""
TEACHER = "teacher."
"""Under this attribute it may hold a frozen model, whose parameters keep this prefix."""

COMPUTE_DTYPE = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


LARGE_ELEMENTS = 2**20
"""Elements from which a tensor is no longer made before it is thrown away."""
CONSTRUCTORS = (torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)
"""What makes parameters beside `torch.empty`, and masks."""

RANDOM_FILLS = frozenset(
    ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_", "xavier_normal_")
)
"""What draws the first values of a parameter: on meta there are none, and torch takes a third of the time for drawing them."""


@contextmanager
def meta_context() -> Iterator[None]:
    """Build a module with its parameters on the meta device and its buffers (rotary tables, masks) real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), _Unallocated():
        yield


class _Unallocated(TorchFunctionMode):
    """Has large parameters on meta from the first: all experts of a layer are tens of GiB, which a host need not have.

    Uninitialised tensors become parameters; of others those with three dimensions, since masks begin with two.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs_given = kwargs or {}
        if getattr(func, "__name__", "") in RANDOM_FILLS:
            tensor = kwargs_given["tensor"] if "tensor" in kwargs_given else args[0]
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs_given | ({"device": "meta"} if self._is_large(func, args, kwargs_given) else {}))

    @staticmethod
    def _is_large(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if kwargs.get("device") is not None or (func is not torch.empty and func not in CONSTRUCTORS):
            return False
        size = kwargs.get("size", args[0] if args and isinstance(args[0], tuple | list) else args)
        if not all(isinstance(n, int) for n in size) or (func is not torch.empty and len(size) < 3):
            return False
        return math.prod(size) >= LARGE_ELEMENTS


def named_parameters(step_module: nn.Module, *, teacher: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
    """Every distinct parameter under its plain name: that of the model's own state dict. A tied one comes once.

    Those of a frozen model beside it come only with `teacher`.
    """
    for name, parameter in step_module.named_parameters():
        if teacher or not name.startswith(TEACHER):
            yield name.removeprefix(PREFIX), parameter


@runtime_checkable
class PackedModule(Protocol):
    """A module that stores weights packed, as bytes."""

    packed_elements: dict[str, int]
    """Elements that each packed weight stands for, by its name in the module."""


def element_counts(step_module: nn.Module) -> dict[str, int]:
    """Elements of the model behind each distinct parameter, whole, by plain name.

    A packed weight counts the elements that it stands for, not its bytes.
    """
    counts: dict[str, int] = {}
    for name, parameter in named_parameters(step_module):
        owner_name, _, key = name.rpartition(".")
        owner = step_module.get_submodule(PREFIX + owner_name) if owner_name else None
        if isinstance(owner, PackedModule) and key in owner.packed_elements:
            counts[name] = owner.packed_elements[key]
        else:
            # ZeRO-3 leaves an empty tensor in the place of a parameter, and its whole size in `ds_numel`.
            counts[name] = getattr(parameter, "ds_numel", parameter.numel())
    return counts


def trainable_parameters(step_module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The distinct parameters that train, under plain names, in module order."""
    return [(name, p) for name, p in named_parameters(step_module) if p.requires_grad]


def replace_parameters(module: nn.Module, make: Callable[[nn.Parameter], torch.Tensor]) -> None:
    """Replace every parameter by `make(parameter)`, keeping ties and requires_grad."""
    replacements: dict[int, nn.Parameter] = {}
    keep_alive = []  # an id is only unique while its object lives
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
    """Give meta parameters their storage type. Non-floating (quantised) parameters keep theirs."""

    def retyped(p: nn.Parameter) -> torch.Tensor:
        if not p.is_floating_point():
            return p.data
        return torch.empty_like(p.data, dtype=trainable if p.requires_grad else frozen)

    replace_parameters(step_module, retyped)


def materialize(step_module: nn.Module, device: torch.device) -> None:
    """Allocate meta parameters on `device`, unfilled, and move buffers there."""
    replace_parameters(step_module, lambda p: torch.empty_like(p.data, device=device) if p.is_meta else p.data)
    replace_buffers(step_module, lambda buffer: buffer.to(device))


@torch.no_grad()
def fill_in_full(step_module: nn.Module, source: ParameterSource) -> None:
    """Load every parameter in full (strategies that replicate)."""
    for name, parameter in named_parameters(step_module, teacher=True):
        values = source.run(name, parameter.shape, 0, parameter.numel())
        parameter.view(-1).copy_(values)
