"""A cache of operation results on fake tensors, keyed by the operands' metadata.

A step repeats a few hundred operations in block after block, and torch computes the result's metadata anew each time.
Only results that depend on metadata alone are cached: never on values, and never for real tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from strategies.compat.dispatch import storage_key, within_no_dispatch_mode
from strategies.compat.fake_tensors import (
    FAKE_MODE,
    FakeTensor,
    FakeTensorMode,
    default_device_at_work,
    dispatch_keys,
    make_subclass,
    mode_at_work,
    operation_name,
    pointer_may_be_read,
    refuse_when_pointer_is_read,
    warn_when_pointer_is_read,
)

_CACHED_NAMESPACES = ("aten", "prims", "fsdp")
_UNCACHED_TAGS = (torch.Tag.data_dependent_output, torch.Tag.inplace_view)
"""Tags of operations whose result depends on values, and of those that change their operand's metadata."""
_MASK_DTYPES = (torch.bool, torch.int8, torch.uint8)
"""Types of an index whose result is as long as it has true values."""
_TAKES_STORAGE_OFFSET = ("as_strided", "as_strided_", "as_strided_scatter", "_reshape_alias")
"""Operations that take a place in a storage as an argument: their result depends on where the operand begins."""
_SLICE = torch.ops.aten.slice.Tensor
_PLAIN_TYPES = (type(None), str, int, torch.dtype, torch.device, torch.layout, torch.memory_format)


class _NotCacheable(Exception):
    """The output depends on more than the operands' metadata, or cannot be rebuilt."""


@dataclass(frozen=True, slots=True)
class _TensorTemplate:
    """An output tensor, as far as it is needed to make one like it."""

    same_as_operand: int | None
    """Index of the operand that the output is, for operations in place."""
    storage_of_operand: int | None
    """Index of the operand whose storage it shares, as a view does; None: it has a storage of its own."""
    shape: torch.Size
    stride: tuple[int, ...]
    storage_offset: int
    """Elements in the storage, beyond the offset of that operand."""
    dtype: torch.dtype
    fake_tensor_attributes: dict[str, Any]
    """Attributes of the fake tensor, but for its `fake_mode`."""


@dataclass(frozen=True, slots=True)
class CachedResult:
    """The cached result of an operation."""

    output: Any
    """`_TensorTemplate`, None, a whole number, or a list or tuple of these."""
    flops: float
    moved_bytes: int
    """Bytes read and written, as the recorder counts them."""


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation with its operands."""

    cache_key: Any
    """All that the output's metadata depends on."""
    tensor_operands: list[FakeTensor]
    """Operands that are tensors, in order."""
    fake_mode: FakeTensorMode
    slice_start: int
    """Elements by which a slice begins behind its operand: slices of one length share a cached result."""


_RESULTS: dict[Any, CachedResult] = {}
"""By `Operation.key`, for all simulations of this process."""


def is_simulating_step() -> bool:
    """Whether tensors have no memory now."""
    return mode_at_work(FAKE_MODE) is not None


def cacheable_operation(func: Any, args: Any, kwargs: Any) -> Operation | None:
    """The operation with its cache key, if shape, strides and type of its output follow from those of its operands alone.

    `func`, `args` and `kwargs` are what torch dispatches. None for every other operation, and for real tensors.
    """
    mode: Any = mode_at_work(FAKE_MODE)
    if mode is None or not _depends_on_metadata(func):
        return None
    key: list[Any] = [func, torch.get_default_dtype(), default_device_at_work()]
    tensors: list[Any] = []
    slice_start = 0
    try:
        if func is _SLICE:
            args, slice_start = _slice_from_start(*args)
        for argument in args:
            _append_to_key(argument, key, tensors)
        for name, argument in kwargs.items():
            key.append(name)
            _append_to_key(argument, key, tensors)
    except _NotCacheable:
        return None
    if torch.Tag.dynamic_output_shape in func.tags and any(tensor.dtype in _MASK_DTYPES for tensor in tensors):
        return None
    if any(tensor.fake_mode is not mode for tensor in tensors):
        return None
    if operation_name(func) in _TAKES_STORAGE_OFFSET:
        key += [tensor.storage_offset() for tensor in tensors]
    return Operation(tuple(key), tensors, mode, slice_start)


def _slice_from_start(tensor: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> tuple[Any, int]:
    """Arguments of a slice of the same length that begins at 0, and how many elements later the real one begins."""
    if type(tensor) is not FakeTensor:
        raise _NotCacheable
    first, last, _ = slice(start, end).indices(tensor.shape[dim])
    length = max(0, last - first)
    return (tensor, dim, 0, length, step), first * tensor.stride(dim)


@cache
def _depends_on_metadata(func: Any) -> bool:
    """Whether the shape, strides and type of an operation's output follow from its operands' metadata, not their values.

    Indexing does, unless an index is a mask, which the caller checks.
    """
    if func.namespace not in _CACHED_NAMESPACES or any(tag in func.tags for tag in _UNCACHED_TAGS):
        return False
    if torch.Tag.dynamic_output_shape in func.tags and func is not torch.ops.aten.index.Tensor:
        return False
    return func not in FakeTensorMode.lift_fns


def _append_to_key(argument: Any, key: list[Any], tensors: list[Any]) -> None:
    """Append what the output's metadata depends on in `argument` to `key`, and its tensors to `tensors`.

    Raises _NotCacheable for arguments whose values, or more than whose shape, strides, type and device, may matter.
    """
    argument_type = type(argument)
    if argument_type is FakeTensor:
        if (
            argument.constant is not None
            or argument.layout is not torch.strided
            or argument.is_conj()
            or argument.is_neg()
        ):
            raise _NotCacheable
        key += (argument.shape, argument.stride(), argument.dtype, argument.fake_device)
        tensors.append(argument)
    elif argument_type is list or argument_type is tuple:
        key.append(len(argument))
        for element in argument:
            _append_to_key(element, key, tensors)
    elif argument_type is float or argument_type is bool:  # which equal whole numbers, and give other types
        key += (argument_type, argument)
    elif argument_type in _PLAIN_TYPES:
        key.append(argument)
    else:
        raise _NotCacheable


def cached_result(operation: Operation) -> CachedResult | None:
    """The result of an earlier operation with the same key; None if there was none."""
    return _RESULTS.get(operation.cache_key)


def rebuild_output(cached: CachedResult, operation: Operation) -> Any:
    """The output of a cached result as new tensors, for the operands of `operation`."""
    with within_no_dispatch_mode():
        return _rebuild_output(cached.output, operation)


def _rebuild_output(template: Any, operation: Operation) -> Any:
    """An operation's output from its cached template, for the operands of this call.

    It is the operand itself (an operation in place), a view of an operand's storage, or a new fake tensor.
    """
    if isinstance(template, list | tuple):
        return type(template)(_rebuild_output(element, operation) for element in template)
    if not isinstance(template, _TensorTemplate):
        return template
    if template.same_as_operand is not None:
        return operation.tensor_operands[template.same_as_operand]
    # What FakeTensor's constructor does; the rest of it depends on the metadata alone, and stands in `state`.
    meta_tensor = torch.empty_strided(template.shape, template.stride, dtype=template.dtype, device="meta")
    if template.storage_of_operand is not None:
        operand = operation.tensor_operands[template.storage_of_operand]
        offset = operand.storage_offset() + operation.slice_start + template.storage_offset
        meta_tensor.set_(operand.untyped_storage(), offset, template.shape, template.stride)
    device = template.fake_tensor_attributes["_fake_device"]
    tensor = make_subclass(FakeTensor, meta_tensor, False, dispatch_device=True, device_for_backend_keys=device)
    if pointer_may_be_read(operation.fake_mode):
        warn_when_pointer_is_read(tensor)
    else:
        refuse_when_pointer_is_read(tensor)
    vars(tensor).update(template.fake_tensor_attributes)
    tensor.fake_mode = operation.fake_mode
    return tensor


def store_result(operation: Operation, output: Any, flops: float, moved_bytes: int) -> None:
    """Cache a result, unless a rebuilt output would differ from it."""
    try:
        template = _template_of(output, operation, set())
    except _NotCacheable:
        return
    _RESULTS[operation.cache_key] = CachedResult(template, flops, moved_bytes)


def _template_of(output: Any, operation: Operation, new_storages: set[int]) -> Any:
    """An operation's output as it is cached: each tensor as the description from which `rebuild_output` makes one like it.

    `new_storages`: storages of the outputs that came before it in the same list. Two new tensors that share a storage could
    not be rebuilt. Raises _NotCacheable for these, and if a rebuilt tensor would differ in any way.
    """
    if isinstance(output, list | tuple):
        return type(output)(_template_of(element, operation, new_storages) for element in output)
    if output is None or type(output) is int:
        return output
    if not _is_plain_fake(output):
        raise _NotCacheable
    storage = output.untyped_storage()
    key = storage_key(storage)
    template = _TensorTemplate(
        **_shared_storage(output, key, operation),
        shape=output.shape,
        stride=output.stride(),
        dtype=output.dtype,
        fake_tensor_attributes={name: attribute for name, attribute in vars(output).items() if name != "fake_mode"},
    )
    if template.same_as_operand is not None:
        return template
    if output.requires_grad or key in new_storages:
        raise _NotCacheable
    # Rebuild it once: it is cached only if that gives the same tensor.
    rebuilt = rebuild_output(CachedResult(template, 0, 0), operation)
    if template.storage_of_operand is None:
        new_storages.add(key)
        if rebuilt.untyped_storage().nbytes() != storage.nbytes() or template.storage_offset:
            raise _NotCacheable
    if dispatch_keys(rebuilt) != dispatch_keys(output):
        raise _NotCacheable
    return template


def _is_plain_fake(output: Any) -> bool:
    """Whether an output is a fake tensor that its metadata describes completely."""
    if type(output) is not FakeTensor or output.constant is not None or output.real_tensor is not None:
        return False
    return output.layout is torch.strided and not (output.is_conj() or output.is_neg() or output.is_inference())


def _shared_storage(output: FakeTensor, key: int, operation: Operation) -> dict[str, Any]:
    """Three fields of `_TensorTemplate`: which operand the output is, whose storage it shares, and where it begins in it.

    `key`: of the output's storage. Raises _NotCacheable if several operands share it: another time, they may not share one.
    """
    sharing_operands = []
    for index, tensor in enumerate(operation.tensor_operands):
        if storage_key(tensor.untyped_storage()) == key:
            sharing_operands.append(index)
    if len(sharing_operands) > 1:
        raise _NotCacheable
    offset = int(output.storage_offset())
    if not sharing_operands:
        return {"same_as_operand": None, "storage_of_operand": None, "storage_offset": offset}
    (operand_index,) = sharing_operands
    operand = operation.tensor_operands[operand_index]
    return {
        "same_as_operand": operand_index if operand is output else None,
        "storage_of_operand": operand_index,
        "storage_offset": offset - int(operand.storage_offset()) - operation.slice_start,
    }
