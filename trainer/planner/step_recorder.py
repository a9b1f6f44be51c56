"""Records the collectives of a step in order, the host's reads from the device, and the arithmetic."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from strategies.compat.dispatch import CAST, GROUPED_PRODUCT, READ_ON_HOST, operation_schema, tree_leaves
from strategies.compat.fake_collectives import CollectiveOp, FakeWork, Work, collective_ops, sync_ops
from strategies.compat.python import calling_frame
from trainer.model import flex_shapes
from trainer.planner import op_cache
from trainer.planner.memory_tracker import LiveBytes, Moment, device_of

_ROOT = Path(__file__).resolve().parent.parent.parent
_FILES, _OWN = ("strategies", "trainer"), ("strategies/simulation.py", "trainer/planner/")


@dataclass(frozen=True, slots=True)
class Collective:
    """One exchange between ranks, as this rank calls it."""

    name: str
    ranks: tuple[int, ...]
    """The group."""
    dtype: str
    bytes: int
    """Of the largest tensor that it is given: the whole that is gathered or reduced."""
    moment: Moment
    on_device: bool
    """Whether all its tensors lie on the rank's device."""


@dataclass(slots=True)
class Record:
    """What one step did."""

    collectives: list[Collective] = field(default_factory=list)
    host_reads: Counter[str] = field(default_factory=Counter)
    """Where the host waited for a value of the device, and how often."""
    to_host: int = 0
    """Bytes copied from the device to the host."""
    to_device: int = 0
    """Bytes copied from the host to the device."""
    moved: Counter[str] = field(default_factory=Counter)
    """Bytes that operations other than products, attention and collectives read and write on the device, by phase."""
    flops: float = 0.0
    """Floating-point operations of products and attention, those recomputed included."""


class Recorder(LiveBytes):
    """`LiveBytes` that also records; `squares` is the sum of the squared lengths of the documents at work."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.record = Record()
        self.squares = 0

    def begin(self) -> None:
        super().begin()
        self.record = Record()

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        known = _known(func)
        if known.exchanges:
            self._collective(func, args)
        if known.reads:
            if device_of(args[0]) == self.device:
                self.record.host_reads[_caller()] += 1
            if hasattr(args[0], "fake_device"):  # there is no value: one that lets a run go on
                return False if args[0].dtype is torch.bool else 0.0 if args[0].is_floating_point() else 0
        if known.answers and op_cache.simulating():  # as the kernel for tensors without memory does, and sooner
            return args[0], Work.boxed(FakeWork())
        asked = op_cache.asked(func, args, kwargs)
        given = op_cache.given(asked) if asked is not None else None
        if asked is not None and given is not None:
            out, flops, moved = op_cache.again(given, asked), given.flops, given.moved
        else:
            out = func(*args, **kwargs)
            flops = self._flops(func, args, kwargs, out) if known.counted else 0.0
            moved = 0 if flops or known.free else self._size(args) + self._size(out)
            if asked is not None:
                op_cache.remember(asked, out, flops, moved)
        if known.copies:
            self._move(func, args, out)
        self.record.flops += flops
        self.record.moved[self.moment.phase] += moved
        return out

    def _size(self, value: Any) -> int:
        """Bytes on the device of a tensor, or of tensors in lists."""
        if isinstance(value, Tensor):
            return value.numel() * value.element_size() if device_of(value) == self.device else 0
        return sum(map(self._size, value)) if isinstance(value, tuple | list) else 0

    def _collective(self, func: Any, args: Any) -> None:
        tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        group = CollectiveOp.get_process_group(func, args)
        self.record.collectives.append(
            Collective(
                func.__name__.partition(".")[0].strip("_"),
                tuple(torch.distributed.get_process_group_ranks(group)),
                "/".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors})),
                max((t.numel() * t.element_size() for t in tensors), default=0),
                self.moment,
                all(device_of(t) == self.device for t in tensors),
            )
        )

    def _move(self, func: Any, args: Any, out: Tensor) -> None:
        source = args[1] if func is torch.ops.aten.copy_.default else args[0]
        if not isinstance(source, Tensor) or device_of(source) == device_of(out):
            return
        size = out.numel() * out.element_size()
        if device_of(source) == self.device:
            self.record.to_host += size
        else:
            self.record.to_device += size

    def _flops(self, func: Any, args: Any, kwargs: Any, out: Any) -> float:
        packet = func.overloadpacket
        name = _name(func)
        if name.startswith(_ATTENTION):
            backward = "backward" in name
            query = args[1] if backward else args[0]
            windows = self.squares / 2  # causal: half of each square
            return (10 if backward else 4) * windows * query.shape[1] * query.shape[-1]
        if packet is torch.ops.aten.addmm_:
            return 2.0 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
        if packet is GROUPED_PRODUCT:  # rows by groups, each with a matrix of its own, or columns by groups
            left, right = args[:2]
            each = left.shape[0] if left.dim() == right.dim() == 3 else 1
            return 2.0 * each * left.shape[-2] * left.shape[-1] * right.shape[-1]
        if packet in flop_registry:
            count = float(flop_registry[packet](*args, **kwargs, out_val=out))
            return count / 2 if _is_causal(func, args, kwargs) else count
        return 0.0


_FREE = frozenset({"empty", "empty_strided", "empty_like", "new_empty", "detach", "alias", "_unsafe_view"})
"""Operations that touch no value, beside views."""
_ATTENTION = ("torch_attn::_varlen_attn", flex_shapes.FORWARD)
_PRODUCTS = (torch.ops.aten.addmm_, GROUPED_PRODUCT)
_COPIES = (CAST.default, torch.ops.aten.copy_.default)


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of an operation, whatever it is given."""

    exchanges: bool
    answers: bool
    """Whether it is an exchange that gives the first of its operands, in which something was written, and a handle."""
    reads: bool
    copies: bool
    counted: bool
    """Whether it may be a product or attention."""
    free: bool


@cache
def _known(func: Any) -> _Known:
    packet = func.overloadpacket
    return _Known(
        exchanges=func in collective_ops and func not in sync_ops,
        answers=func in CollectiveOp.WK_ARG_1 and func.namespace == "c10d",
        reads=func is READ_ON_HOST.default,
        copies=func in _COPIES,
        counted=_name(func).startswith(_ATTENTION) or packet in _PRODUCTS or packet in flop_registry,
        free=_free(func),
    )


def _name(func: Any) -> str:
    """An operation's name with its namespace, without its overload: `aten::empty`."""
    return str(func.name()).partition(".")[0]


def _free(func: Any) -> bool:
    """Whether an operation reads and writes nothing on the device, or is counted as a collective."""
    name = _name(func).partition("::")
    return func.is_view or func in collective_ops or name[0] == "prim" or name[2] in _FREE


def _is_causal(func: Any, args: Any, kwargs: Any) -> bool:
    names = [argument.name for argument in operation_schema(func).arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    return bool(given.get("is_causal", False))


def _caller() -> str:
    """The line of the project that is at work."""
    frame = calling_frame(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_ROOT) and path.relative_to(_ROOT).parts[0] in _FILES:
            name = path.relative_to(_ROOT).as_posix()
            if not name.startswith(_OWN):
                return f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"
