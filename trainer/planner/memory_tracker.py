"""Tracks live bytes through a step, by storage, on real tensors as on fake ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from strategies.compat.dispatch import (
    CAST,
    TorchDispatchMode,
    resizes_reported,
    storage_key,
    within_no_dispatch_mode,
    within_no_function_mode,
)
from strategies.compat.fake_tensors import FakeTensor
from strategies.tensor_inventory import MemoryKind

_DEVICE, _TO_COPY = torch.ops.prim.device.default, CAST.default
GRAIN = 512
"""Bytes that an allocation is a multiple of, as torch's allocator for GPUs hands them out."""


def rounded(size: int) -> int:
    """Bytes that an allocation of `size` takes."""
    return -(-size // GRAIN) * GRAIN


def device_of(tensor: Tensor) -> torch.device:
    """Where a tensor lies. To ask a fake one for its device is an operation, which takes as long as others."""
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


@dataclass(frozen=True, slots=True)
class Moment:
    """A stretch of a step in which a rank does one thing."""

    phase: str
    """`forward`, `backward`, `update`, or `between` steps."""
    micro: int
    """The micro-batch, from 0."""
    place: int | str
    """The block at work, from 0; or `before`, `head`, `after`."""

    def __str__(self) -> str:
        where = f"block {self.place}" if isinstance(self.place, int) else self.place
        return self.phase if self.phase in ("update", "between") else f"{self.phase} {self.micro}: {where}"


@dataclass(slots=True)
class Highest:
    """The most bytes that were live at once in a moment, and after which of its operations that was."""

    total: int = 0
    operation: int = -1
    kinds: dict[MemoryKind, int] = field(default_factory=dict)
    course: list[int] = field(default_factory=list, repr=False, compare=False)
    """Live bytes after each operation of the moment."""


@dataclass(slots=True)
class _Held:
    size: int
    kind: MemoryKind
    reference: Any
    """Of the storage: ends the count when that is freed."""


class LiveBytes(TorchDispatchMode):
    """Counts bytes on `device` while it is entered, from what is made within it and what is shown to it.

    `moment` is set by whoever knows; the highest of each is in `highest`. With `explain`, a tally by kind is taken after
    the operations told there, which another step has found to be the highest of their moments, and where a later one is higher.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.now = 0
        self.moment = Moment("between", 0, "before")
        self.highest: dict[Moment, Highest] = {}
        self.made = MemoryKind.other
        """The kind of what is made now, unless more is known."""
        self.more = 0
        """Bytes that count beside those that are live."""
        self.hidden = False
        """Whether what happens counts in no moment."""
        self._noted: Moment | None = None
        """The moment that `_highest` is of."""
        self._highest, self._tallied = Highest(), -1
        self._held: dict[int, _Held] = {}
        self._explain: dict[Moment, int] = {}
        self._owned: Callable[[], Iterable[tuple[MemoryKind, Tensor]]] = lambda: ()
        self._reports: AbstractContextManager[None] = nullcontext()
        self._counts = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        """It changes nothing: other modes need not know of it."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled in a simulation: to keep torch.compile out of each operation would only take time."""
        return False

    # -- what lives ----------------------------------------------------------------------------------------------

    def see(self, tensor: Tensor, kind: MemoryKind | None = None) -> None:
        """Count a tensor's storage from now on; with `kind`, it is known what it holds."""
        if device_of(tensor) != self.device:
            return
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        held = self._held.get(key)
        if held is None:
            size = rounded(storage.nbytes())
            self._held[key] = _Held(size, kind or self.made, weakref.ref(storage, self._freed(key)))
            self.now += size
        elif kind is not None:
            held.kind = kind

    def _freed(self, key: int) -> Callable[[Any], None]:
        def free(_reference: Any) -> None:
            held = self._held.pop(key, None)
            if held is not None:
                self.now -= held.size

        return free

    def _resized(self, storage: torch.UntypedStorage) -> None:
        held = self._held.get(storage_key(storage))
        if held is not None:
            size = rounded(storage.nbytes())
            self.now += size - held.size
            held.size, held.kind = size, MemoryKind.gathered
            self._note()

    # -- through a step ------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A step begins: operations are counted from here."""
        self.highest, self._explain, self._noted = {}, {}, None

    def explain(self, operations: dict[Moment, int], owned: Callable[[], Iterable[tuple[MemoryKind, Tensor]]]) -> None:
        """A step begins: tally what is live by kind after these operations of their moments."""
        self.begin()
        self._explain, self._owned = operations, owned

    def labels(self) -> dict[int, tuple[_Held, MemoryKind]]:
        """What is known now of what is live; a tally learns more."""
        return {key: (held, held.kind) for key, held in self._held.items()}

    def relabel(self, labels: dict[int, tuple[_Held, MemoryKind]]) -> None:
        """Know of what is still live what was known then."""
        for key, (held, kind) in labels.items():
            if self._held.get(key) is held:
                held.kind = kind

    def tally(self) -> dict[MemoryKind, int]:
        """Live bytes by kind, now."""
        self._counts = False  # asking for a tensor can be an operation
        found = list(self._owned())
        self._counts = True
        for kind, tensor in found:
            if device_of(tensor) == self.device and storage_key(tensor.untyped_storage()) in self._held:
                self.see(tensor, kind)
        out: dict[MemoryKind, int] = {}
        for held in self._held.values():
            out[held.kind] = out.get(held.kind, 0) + held.size
        return {kind: size for kind, size in out.items() if size}

    def suppose(self, more: int) -> None:
        """Note a moment with `more` bytes beside those that are live."""
        self.more = more
        self._note()
        self.more = 0

    def _note(self) -> None:
        if not self._counts or self.hidden:
            return
        if self.moment is not self._noted:
            self._noted, self._highest = self.moment, self.highest.setdefault(self.moment, Highest())
            self._tallied = self._explain.get(self.moment, -1)
        highest, now, operation = self._highest, self.now + self.more, len(self._highest.course)
        if more := now > highest.total or highest.operation < 0:
            highest.total, highest.operation = now, operation
        highest.course.append(now)
        if operation == self._tallied or (more and 0 <= self._tallied < operation):
            highest.kinds = self.tally()
            if self.more:
                highest.kinds[MemoryKind.communication] = highest.kinds.get(MemoryKind.communication, 0) + self.more

    def __enter__(self) -> Any:
        self._reports = resizes_reported(self._resized)
        self._reports.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._reports.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # its local operations come by themselves
        if func is _DEVICE and isinstance(args[0], FakeTensor):  # most of what is called
            self._note()
            return args[0].fake_device
        if func.namespace == "profiler":  # labels of stretches of a step, which have no tensors
            self._note()
            with within_no_dispatch_mode():
                return func(*args, **(kwargs or {}))
        with within_no_function_mode():  # what is asked of tensors on the way is no operation of the step
            out = self.run(func, args, kwargs or {})
            if func.namespace in ("c10d", "_c10d_functional"):
                self._exchanged(args)
            self._seen(func, args, out)
        self._note()
        return out

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operation itself."""
        return func(*args, **kwargs)

    def _seen(self, func: Any, args: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            self.see(out)
            if func is _TO_COPY and self._is_parameter(args[0]):
                self.see(out, MemoryKind.gathered)
        elif isinstance(out, tuple | list):
            for each in out:
                self._seen(None, (), each)

    def _is_parameter(self, tensor: Tensor) -> bool:
        held = self._held.get(storage_key(tensor.untyped_storage()))
        return held is not None and held.kind is MemoryKind.parameters

    def _exchanged(self, value: Any) -> None:
        """What a collective reads and writes is a buffer, unless it has an owner."""
        if isinstance(value, Tensor):
            held = self._held.get(storage_key(value.untyped_storage()))
            if held is not None and held.kind in (MemoryKind.activations, MemoryKind.other):
                held.kind = MemoryKind.communication
        elif isinstance(value, tuple | list):
            for each in value:
                self._exchanged(each)
