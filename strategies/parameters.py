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

MODEL_PREFIX = "model."
"""The step module holds the model under this attribute. A plain name is what follows it."""
TEACHER_PREFIX = "teacher."
"""The step module may hold a frozen model under this attribute. Names of its parameters keep the prefix."""
REWARD_MODELS_PREFIX = "reward_models."
"""Likewise of models that score written answers, each under its name: no training step computes them."""
FROZEN_MODEL_PREFIXES = (TEACHER_PREFIX, REWARD_MODELS_PREFIX)
"""Beginnings of the names of all parameters that do not belong to the model itself."""

COMPUTE_DTYPE = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}

MIN_META_ELEMENTS = 2**20
"""Tensors of at least this many elements are made on meta from the first."""
MIN_COOPERATIVE_ELEMENTS = 2**20
"""Parameters with fewer elements are read by every rank: a collective would take longer."""
TENSOR_CONSTRUCTORS = (torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)
"""Functions that make parameters, like `torch.empty`, but also masks."""

RANDOM_FILL_FUNCTION_NAMES = frozenset(
    ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_", "xavier_normal_")
)
"""Functions that draw initial values. Meta tensors have no values, and yet drawing takes a third of the time of building."""


@contextmanager
def meta_context() -> Iterator[None]:
    """Inside the context modules are built with parameters on the meta device and real buffers (rotary tables, masks)."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), _LargeParametersOnMeta():
        yield


class _LargeParametersOnMeta(TorchFunctionMode):
    """A mode in which large parameters are created on the meta device, and functions that draw initial values leave them alone.

    All experts of a layer are tens of GiB, which a host may not have. A tensor is taken for a parameter if it is uninitialised
    (`torch.empty`), or has at least three dimensions: masks have two.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in RANDOM_FILL_FUNCTION_NAMES:
            tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        if self._creates_large_parameter(func, args, kwargs):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)

    @staticmethod
    def _creates_large_parameter(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the call `func(*args, **kwargs)` of a torch function creates a parameter so large that it belongs on meta.

        Not if the call names a device. What is uninitialised, or has at least three dimensions, is taken for a parameter.
        """
        if kwargs.get("device") is not None or (func is not torch.empty and func not in TENSOR_CONSTRUCTORS):
            return False
        # A shape is the keyword `size`, one sequence, or several numbers.
        positional_shape = args[0] if args and isinstance(args[0], tuple | list) else args
        shape = kwargs.get("size", positional_shape)
        if not all(isinstance(length, int) for length in shape):
            return False  # not a shape, so the call is of another form
        if func is not torch.empty and len(shape) < 3:  # masks, of two dimensions, are made by these functions too
            return False
        return math.prod(shape) >= MIN_META_ELEMENTS


def named_parameters(
    step_module: nn.Module, *, include_frozen_models: bool = False
) -> Iterator[tuple[str, nn.Parameter]]:
    """(plain name, parameter) of every distinct parameter of the trained model; one that modules share (tied) comes once.

    Plain names are those of the model's own state dict (`h.0.attn.weight`), as in checkpoints: the step module, which strategies
    shard, has them with the prefix `model.`. With `include_frozen_models`, the parameters of the teacher and of reward models
    come too, under their names in the step module (`teacher.`, `reward_models.`).
    """
    for name, parameter in step_module.named_parameters():
        if include_frozen_models or not name.startswith(FROZEN_MODEL_PREFIXES):
            yield name.removeprefix(MODEL_PREFIX), parameter


@runtime_checkable
class PackedModule(Protocol):
    """A module that stores weights packed, as bytes."""

    packed_elements: dict[str, int]
    """Elements that each packed weight stands for, by its name in the module."""


def num_elements_by_name(step_module: nn.Module) -> dict[str, int]:
    """Count the elements of each full parameter, whatever this rank holds of it, by its name in the model's state dict.

    - A packed (quantised) weight: the elements that it encodes, not its bytes.
    - Experts under expert parallelism: those of all ranks of the expert group.
    - A parameter that ZeRO-3 has partitioned, and any other one: its full size.
    """
    counts: dict[str, int] = {}
    for name, parameter in named_parameters(step_module):
        owner_name, _, key = name.rpartition(".")
        owner = step_module.get_submodule(MODEL_PREFIX + owner_name) if owner_name else None
        if isinstance(owner, PackedModule) and key in owner.packed_elements:
            counts[name] = owner.packed_elements[key]
        elif share := getattr(owner, "expert_share", None):
            counts[name] = share.full_shape(parameter.shape).numel()
        else:
            # ZeRO-3 leaves an empty tensor in the place of a parameter, and its full size in `ds_numel`.
            counts[name] = getattr(parameter, "ds_numel", parameter.numel())
    return counts


def trainable_parameters(step_module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(plain name, parameter) of the distinct parameters that train, in module order."""
    return [(name, p) for name, p in named_parameters(step_module) if p.requires_grad]


def replace_parameters(module: nn.Module, make: Callable[[nn.Parameter], torch.Tensor]) -> None:
    """Replace every parameter of `module` by one with the tensor `make(parameter)`, of another dtype or device say.

    Parameters that several modules share stay shared; `requires_grad` stays.
    """
    replacement_by_old_id: dict[int, nn.Parameter] = {}
    old_parameters = []  # keeps them alive, because an id is unique only while its object lives
    for owner in module.modules():
        parameters = own_parameters(owner)  # the module's own dict: what is set in it is in the module
        for name, old_parameter in list(parameters.items()):
            if old_parameter is None:
                continue
            old_id = id(old_parameter)
            if old_id not in replacement_by_old_id:
                old_parameters.append(old_parameter)
                replacement = nn.Parameter(make(old_parameter), requires_grad=old_parameter.requires_grad)
                replacement_by_old_id[old_id] = replacement
            parameters[name] = replacement_by_old_id[old_id]


def set_parameter_dtypes(step_module: nn.Module, *, trainable: torch.dtype, frozen: torch.dtype) -> None:
    """Set the dtypes in which a model on meta will store its parameters: `trainable` for those that train, `frozen` for others.

    Packed (quantised) parameters, which are bytes, keep theirs.
    """

    def with_stored_dtype(parameter: nn.Parameter) -> torch.Tensor:
        if not parameter.is_floating_point():
            return parameter.data
        dtype = trainable if parameter.requires_grad else frozen
        return torch.empty_like(parameter.data, dtype=dtype)

    replace_parameters(step_module, with_stored_dtype)


def allocate_on_device(step_module: nn.Module, device: torch.device) -> None:
    """Give the parameters of a model that are on meta memory on `device`, still without values, and move its buffers there."""

    def on_device(parameter: nn.Parameter) -> torch.Tensor:
        if not parameter.is_meta:
            return parameter.data
        return torch.empty_like(parameter.data, device=device)

    replace_parameters(step_module, on_device)
    replace_buffers(step_module, lambda buffer: buffer.to(device))


@torch.no_grad()
def load_full_parameters(step_module: nn.Module, source: ParameterSource, runtime: Runtime) -> None:
    """Fill every parameter with its full initial value, for strategies that do not shard parameters. All ranks must call.

    `source`: where values come from: the model's files, or random numbers. Ranks with GPUs read a large parameter together: each
    its part, which they exchange over their own network. Ranks on CPUs read everything, which the page cache of their host
    serves.
    """
    reads_cooperatively = runtime.kind == "cuda" and not runtime.simulated
    for name, parameter in named_parameters(step_module, include_frozen_models=True):
        if reads_cooperatively:
            load_parameter_cooperatively(parameter, name, source, runtime)
        else:
            values = source.read_slice(name, parameter.shape, 0, parameter.numel())
            parameter.view(-1).copy_(values)


@torch.no_grad()
def load_parameter_cooperatively(parameter: torch.Tensor, name: str, source: ParameterSource, runtime: Runtime) -> None:
    """Fill `parameter` with its full value, which is read from disk once: each rank reads a part, and all-gathers the rest.

    Every rank reads all of a small parameter, since a collective would take longer, and of a packed (quantised) one, which its
    host caches. `name`: the plain name under which `source` knows it. All ranks must call, for the
    same parameters in the same order.
    """
    num_elements = parameter.numel()
    flat = parameter.view(-1)
    # Packed weights are stored as bytes.
    is_packed = not parameter.is_floating_point()
    if runtime.world_size == 1 or num_elements < MIN_COOPERATIVE_ELEMENTS or is_packed:
        flat.copy_(source.read_slice(name, parameter.shape, 0, num_elements))
        return
    # All parts have the same size, as the all-gather requires: the last ones are padded.
    part_size = math.ceil(num_elements / runtime.world_size)
    start = min(runtime.rank * part_size, num_elements)
    stop = min(start + part_size, num_elements)
    own_part = torch.empty(part_size, dtype=parameter.dtype, device=parameter.device)
    if start < stop:
        own_part[: stop - start].copy_(source.read_slice(name, parameter.shape, start, stop))
    all_parts = torch.empty(part_size * runtime.world_size, dtype=parameter.dtype, device=parameter.device)
    dist.all_gather_into_tensor(all_parts, own_part)
    flat.copy_(all_parts[:num_elements])
