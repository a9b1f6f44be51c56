"""A cache of operation results on fake tensors, keyed by the operands' metadata.

A step repeats a few hundred operations in block after block, and torch computes the result's metadata anew each time.
Only results that depend on metadata alone are cached: never on values, and never for real tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

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
"""Libraries of operations without side effects beyond their operands; collectives are not among them."""
_UNCACHED_TAGS = (torch.Tag.data_dependent_output, torch.Tag.inplace_view)
"""Tags of operations whose result depends on values, and of those that change their operand's metadata."""
_MASK_DTYPES = (torch.bool, torch.int8, torch.uint8)
"""Types of a mask. A mask as an index gives as many elements as it has true values."""
_OPERATIONS_WITH_ABSOLUTE_OFFSET = ("as_strided", "as_strided_", "as_strided_scatter", "_reshape_alias")
"""Operations with an argument that counts from the begin of a storage: their result depends on where the operand begins in it."""
_SLICE = torch.ops.aten.slice.Tensor
_TYPES_OF_KEY_PARTS = (type(None), str, int, torch.dtype, torch.device, torch.layout, torch.memory_format)
"""Types of arguments whose value can be a part of a cache key as it is."""


class _NotCacheable(Exception):
    """The output depends on more than the operands' metadata, or cannot be rebuilt."""


class _StorageOfOutput(NamedTuple):
    """Where an output tensor lies."""

    same_as_operand: int | None
    """Index of the operand that the output is, for operations in place."""
    storage_of_operand: int | None
    """Index of the operand whose storage it shares, as a view does; None: it has a storage of its own."""
    storage_offset: int
    """Elements in the storage, beyond the offset of that operand."""


@dataclass(frozen=True, slots=True)
class _TensorTemplate:
    """An output tensor, as far as it is needed to make one like it for other operands."""

    storage: _StorageOfOutput
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    fake_tensor_attributes: dict[str, Any]
    """Attributes of the fake tensor, but for its `fake_mode`."""


@dataclass(frozen=True, slots=True)
class CachedResult:
    """The cached result of an operation: the template of its output, and what it costs."""

    output: Any
    """`_TensorTemplate`, None, a whole number, or a list or tuple of these."""
    flops: float
    moved_bytes: int
    """Bytes read and written, as the recorder counts them."""


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation on fake tensors whose output's metadata (shape, strides, type) follows from that of its operands alone."""

    cache_key: Any
    """All that the output's metadata depends on: the operation, the operands' metadata, and the other arguments."""
    tensor_operands: list[FakeTensor]
    """Operands that are tensors, in order."""
    fake_mode: FakeTensorMode
    slice_start: int
    """Elements by which a slice begins behind its operand: slices of one length share a cached result."""


_RESULTS: dict[Any, CachedResult] = {}
"""By `Operation.cache_key`, for all simulations of this process."""


def is_simulating_step() -> bool:
    """Whether torch's fake mode is active, so that new tensors have no memory."""
    return mode_at_work(FAKE_MODE) is not None


def cacheable_operation(func: Any, args: Any, kwargs: Any) -> Operation | None:
    """Prepare to look an operation on fake tensors up in the cache: its key and operands; None if it cannot be cached.

    It can if shape, strides and type of its output follow from those of its operands alone, and the operands are fake. `func`,
    `args` and `kwargs` are what torch dispatches. All slices of one length share a result, since a step takes slices of a tensor
    one after the other: their key is that of a slice from 0.
    """
    mode: Any = mode_at_work(FAKE_MODE)  # the fake mode that is active
    if mode is None or not _is_cacheable(func):
        return None
    # The defaults of the moment decide the type and device of new tensors.
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
    # Indexing with a mask: the output is as long as the mask has true values.
    if torch.Tag.dynamic_output_shape in func.tags and any(tensor.dtype in _MASK_DTYPES for tensor in tensors):
        return None
    # A tensor of an earlier simulation, which torch refuses to compute with.
    if any(tensor.fake_mode is not mode for tensor in tensors):
        return None
    # Their result depends on where the operand begins in its storage.
    if operation_name(func) in _OPERATIONS_WITH_ABSOLUTE_OFFSET:
        key += [tensor.storage_offset() for tensor in tensors]
    return Operation(cache_key=tuple(key), tensor_operands=tensors, fake_mode=mode, slice_start=slice_start)


def _slice_from_start(tensor: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> tuple[Any, int]:
    """Turn the arguments of a slice into those of one that begins at 0, so that all slices of a length share a cached result.

    Returns (these arguments, how many elements of the storage later the real slice begins).
    """
    if type(tensor) is not FakeTensor:
        raise _NotCacheable
    first, last, _ = slice(start, end).indices(tensor.shape[dim])
    length = max(0, last - first)
    return (tensor, dim, 0, length, step), first * tensor.stride(dim)


@cache
def _is_cacheable(func: Any) -> bool:
    """Whether the result of a torch operation may be reused for other operands of equal metadata (shape, strides, type).

    Not if the result depends on values, or the operation changes its operand's metadata. It may for indexing (`aten.index`),
    unless an index is a mask, which the caller checks.
    """
    if func.namespace not in _CACHED_NAMESPACES or any(tag in func.tags for tag in _UNCACHED_TAGS):
        return False
    if torch.Tag.dynamic_output_shape in func.tags and func is not torch.ops.aten.index.Tensor:
        return False
    return func not in FakeTensorMode.lift_fns  # those make a fake tensor from a real one, with its values


def _append_to_key(argument: Any, key: list[Any], tensors: list[Any]) -> None:
    """Append to the cache key `key` what an operation's output depends on in `argument`, and its tensors to `tensors`.

    Raises _NotCacheable for an argument of which more may matter: values, a layout that is not strided, real tensors.
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
    elif argument_type in _TYPES_OF_KEY_PARTS:
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
    """Make an operation's output from its cached template, as torch would for the operands of this call.

    It is the operand itself (an operation in place), a view of an operand's storage, or a new fake tensor. `template`: a
    `_TensorTemplate`, a list or tuple of them, or what is no tensor and is returned as it is.
    """
    if isinstance(template, list | tuple):
        return type(template)(_rebuild_output(element, operation) for element in template)
    if not isinstance(template, _TensorTemplate):
        return template
    storage = template.storage
    if storage.same_as_operand is not None:
        return operation.tensor_operands[storage.same_as_operand]
    # What FakeTensor's constructor does; the rest depends on the metadata alone, and is in `fake_tensor_attributes`.
    meta_tensor = torch.empty_strided(template.shape, template.stride, dtype=template.dtype, device="meta")
    if storage.storage_of_operand is not None:
        operand = operation.tensor_operands[storage.storage_of_operand]
        offset = operand.storage_offset() + operation.slice_start + storage.storage_offset
        meta_tensor.set_(operand.untyped_storage(), offset, template.shape, template.stride)
    device = template.fake_tensor_attributes["_fake_device"]
    tensor = make_subclass(FakeTensor, meta_tensor, False, dispatch_device=True, device_for_backend_keys=device)
    # As in the constructor: torch refuses code that asks a fake tensor for the address of its memory, or warns.
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
    """Describe an operation's output so that `rebuild_output` can make one like it for other operands: what is cached of it.

    `new_storages`: storages of the outputs that came before it in the same list. Raises _NotCacheable if a rebuilt tensor would
    differ in any way.
    """
    if isinstance(output, list | tuple):
        return type(output)(_template_of(element, operation, new_storages) for element in output)
    if output is None or type(output) is int:  # no tensor: it follows from the operands' metadata as it is
        return output
    if not _is_plain_fake(output):
        raise _NotCacheable
    return _template_of_tensor(output, operation, new_storages)


def _template_of_tensor(output: FakeTensor, operation: Operation, new_storages: set[int]) -> _TensorTemplate:
    """Describe one output tensor for the cache; adds its storage to `new_storages` if no operand has it.

    Raises _NotCacheable if a tensor rebuilt from the description would differ: it is rebuilt once to find out.
    """
    storage = output.untyped_storage()
    output_storage_key = storage_key(storage)
    template = _TensorTemplate(
        storage=_storage_of_output(output, output_storage_key, operation),
        shape=output.shape,
        stride=output.stride(),
        dtype=output.dtype,
        fake_tensor_attributes={name: attribute for name, attribute in vars(output).items() if name != "fake_mode"},
    )
    if template.storage.same_as_operand is not None:
        return template
    # A rebuilt tensor requires no gradient, and each one without an operand's storage has a storage to itself.
    if output.requires_grad or output_storage_key in new_storages:
        raise _NotCacheable
    rebuilt = rebuild_output(CachedResult(template, flops=0, moved_bytes=0), operation)
    if template.storage.storage_of_operand is None:
        new_storages.add(output_storage_key)
        # A new storage is made as large as the tensor needs it, and the tensor begins where it begins.
        if rebuilt.untyped_storage().nbytes() != storage.nbytes() or template.storage.storage_offset:
            raise _NotCacheable
    if dispatch_keys(rebuilt) != dispatch_keys(output):
        raise _NotCacheable
    return template


def _is_plain_fake(output: Any) -> bool:
    """Whether an output is a fake tensor that its metadata describes completely."""
    if type(output) is not FakeTensor or output.constant is not None or output.real_tensor is not None:
        return False
    return output.layout is torch.strided and not (output.is_conj() or output.is_neg() or output.is_inference())


def _storage_of_output(output: FakeTensor, output_storage_key: int, operation: Operation) -> _StorageOfOutput:
    """Find where an output lies relative to the operands: which of them it is, whose storage it shares, where it begins there.

    Raises _NotCacheable if several operands share the output's storage: another time, they may not share one.
    """
    sharing_operands = []
    for index, tensor in enumerate(operation.tensor_operands):
        if storage_key(tensor.untyped_storage()) == output_storage_key:
            sharing_operands.append(index)
    if len(sharing_operands) > 1:
        raise _NotCacheable
    offset = int(output.storage_offset())
    if not sharing_operands:
        return _StorageOfOutput(same_as_operand=None, storage_of_operand=None, storage_offset=offset)
    (operand_index,) = sharing_operands
    operand = operation.tensor_operands[operand_index]
    return _StorageOfOutput(
        same_as_operand=operand_index if operand is output else None,
        storage_of_operand=operand_index,
        # Without the start of a slice: slices that begin elsewhere share the cached result.
        storage_offset=offset - int(operand.storage_offset()) - operation.slice_start,
    )
