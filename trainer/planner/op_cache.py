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

_SPACES = ("aten", "prims", "fsdp")
_BY_VALUE = (torch.Tag.data_dependent_output, torch.Tag.inplace_view)
"""Tags of operations whose result depends on values, and of those that change the form of their operand."""
_MASKS = (torch.bool, torch.int8, torch.uint8)
"""Types of an index whose result is as long as it has true values."""
_ABSOLUTE = ("as_strided", "as_strided_", "as_strided_scatter", "_reshape_alias")
"""Operations that are told places in a storage; all others go by those of their operands."""
_SLICE = torch.ops.aten.slice.Tensor
_PLAIN = (type(None), str, int, torch.dtype, torch.device, torch.layout, torch.memory_format)


class _NotByForm(Exception):
    """What comes out is not told by the form of the operands, or cannot be made anew."""


@dataclass(frozen=True, slots=True)
class _Made:
    """A tensor that came out."""

    itself: int | None
    """The operand that it is."""
    shares: int | None
    """The operand whose storage it shares; with neither, it is a new one."""
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    """In the storage, beyond that of the operand whose storage it shares."""
    dtype: torch.dtype
    state: dict[str, Any]
    """Attributes of the fake tensor, but for the simulation that it is of."""


@dataclass(frozen=True, slots=True)
class OperationResult:
    """What an operation gives."""

    out: Any
    """`_Made`, None, a whole number, or a list or tuple of these."""
    flops: float
    moved: int
    """As the recorder counts them."""


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation with its operands."""

    key: Any
    """What decides what comes out."""
    tensors: list[FakeTensor]
    """Its operands that are tensors."""
    mode: FakeTensorMode
    start: int
    """Elements by which a slice begins beyond its operand: what is remembered of one serves all of its length."""


_GIVEN: dict[Any, OperationResult] = {}
"""Of all simulations of this process."""


def simulating() -> bool:
    """Whether tensors have no memory now."""
    return mode_at_work(FAKE_MODE) is not None


def asked(func: Any, args: Any, kwargs: Any) -> Operation | None:
    """The operation, where what comes out is told by the form of its operands; None elsewhere, as for real tensors."""
    mode: Any = mode_at_work(FAKE_MODE)
    if mode is None or not _by_form(func):
        return None
    key: list[Any] = [func, torch.get_default_dtype(), default_device_at_work()]
    tensors: list[Any] = []
    start = 0
    try:
        if func is _SLICE:
            args, start = _from_start(*args)
        for value in args:
            _describe(value, key, tensors)
        for name, value in kwargs.items():
            key.append(name)
            _describe(value, key, tensors)
    except _NotByForm:
        return None
    if torch.Tag.dynamic_output_shape in func.tags and any(tensor.dtype in _MASKS for tensor in tensors):
        return None
    if any(tensor.fake_mode is not mode for tensor in tensors):
        return None
    if operation_name(func) in _ABSOLUTE:
        key += [tensor.storage_offset() for tensor in tensors]
    return Operation(tuple(key), tensors, mode, start)


def _from_start(tensor: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> tuple[Any, int]:
    """Arguments of the slice of the same length from the start on, and the elements that it begins later."""
    if type(tensor) is not FakeTensor:
        raise _NotByForm
    first, last, _ = slice(start, end).indices(tensor.shape[dim])
    return (tensor, dim, 0, max(0, last - first), step), first * tensor.stride(dim)


@cache
def _by_form(func: Any) -> bool:
    if func.namespace not in _SPACES or any(tag in func.tags for tag in _BY_VALUE):
        return False
    if torch.Tag.dynamic_output_shape in func.tags and func is not torch.ops.aten.index.Tensor:
        return False
    return func not in FakeTensorMode.lift_fns


def _describe(value: Any, key: list[Any], tensors: list[Any]) -> None:
    """Add the form of an argument to the key, and its tensors to those of the operation."""
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None or value.layout is not torch.strided or value.is_conj() or value.is_neg():
            raise _NotByForm
        key += (value.shape, value.stride(), value.dtype, value.fake_device)
        tensors.append(value)
    elif kind is list or kind is tuple:
        key.append(len(value))
        for each in value:
            _describe(each, key, tensors)
    elif kind is float or kind is bool:  # which equal whole numbers, and give other types
        key += (kind, value)
    elif kind in _PLAIN:
        key.append(value)
    else:
        raise _NotByForm


def given(operation: Operation) -> OperationResult | None:
    """What it gave before."""
    return _GIVEN.get(operation.key)


def again(what: OperationResult, operation: Operation) -> Any:
    """The same, made anew."""
    with within_no_dispatch_mode():
        return _make(what.out, operation)


def _make(made: Any, operation: Operation) -> Any:
    if isinstance(made, list | tuple):
        return type(made)(_make(each, operation) for each in made)
    if not isinstance(made, _Made):
        return made
    if made.itself is not None:
        return operation.tensors[made.itself]
    # As FakeTensor's constructor does, of which this is what is the same for all tensors of one form.
    empty = torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device="meta")
    if made.shares is not None:
        operand = operation.tensors[made.shares]
        offset = operand.storage_offset() + operation.start + made.offset
        empty.set_(operand.untyped_storage(), offset, made.shape, made.stride)
    device = made.state["_fake_device"]
    tensor = make_subclass(FakeTensor, empty, False, dispatch_device=True, device_for_backend_keys=device)
    if pointer_may_be_read(operation.mode):
        warn_when_pointer_is_read(tensor)
    else:
        refuse_when_pointer_is_read(tensor)
    vars(tensor).update(made.state)
    tensor.fake_mode = operation.mode
    return tensor


def remember(operation: Operation, out: Any, flops: float, moved: int) -> None:
    """Note what came out, where a tensor made anew is no other."""
    try:
        made = _noted(out, operation, set())
    except _NotByForm:
        return
    _GIVEN[operation.key] = OperationResult(made, flops, moved)


def _noted(out: Any, operation: Operation, new: set[int]) -> Any:
    """`out` as it is remembered; `new` has the storages of what came out with it."""
    if isinstance(out, list | tuple):
        return type(out)(_noted(each, operation, new) for each in out)
    if out is None or type(out) is int:
        return out
    if type(out) is not FakeTensor or out.constant is not None or out.real_tensor is not None:
        raise _NotByForm
    if out.layout is not torch.strided or out.is_conj() or out.is_neg() or out.is_inference():
        raise _NotByForm
    state = {name: value for name, value in vars(out).items() if name != "fake_mode"}
    storage = out.untyped_storage()
    found = [i for i, t in enumerate(operation.tensors) if storage_key(t.untyped_storage()) == storage_key(storage)]
    if len(found) > 1:  # which of them it goes by, another time?
        raise _NotByForm
    shares = found[0] if found else None
    itself = shares if shares is not None and operation.tensors[shares] is out else None
    before = 0 if shares is None else operation.tensors[shares].storage_offset() + operation.start
    made = _Made(itself, shares, out.shape, out.stride(), int(out.storage_offset() - before), out.dtype, state)
    if itself is not None:
        return made
    if out.requires_grad or storage_key(storage) in new:
        raise _NotByForm
    other = again(OperationResult(made, 0, 0), operation)
    if shares is None:
        new.add(storage_key(storage))
        if other.untyped_storage().nbytes() != storage.nbytes() or made.offset:
            raise _NotByForm
    if dispatch_keys(other) != dispatch_keys(out):
        raise _NotByForm
    return made
