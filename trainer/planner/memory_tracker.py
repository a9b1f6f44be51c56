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

_DEVICE_OPERATION = torch.ops.prim.device.default
_CAST_OPERATION = CAST.default
ALLOCATION_GRAIN = 512
"""Bytes that an allocation is a multiple of, as torch's allocator for GPUs hands them out."""


def allocated_bytes(size: int) -> int:
    """Bytes that an allocation of `size` bytes takes, such as 1,024 for 600: a multiple of `ALLOCATION_GRAIN`."""
    return -(-size // ALLOCATION_GRAIN) * ALLOCATION_GRAIN


def device_of(tensor: Tensor) -> torch.device:
    """Where a tensor lies. To ask a fake one for its device is an operation, which takes as long as others."""
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


@dataclass(frozen=True, slots=True)
class StepPhase:
    """A stretch of a step in which a rank does one thing."""

    name: str
    """`forward`, `backward`, `update`, or `between` steps."""
    micro_batch_index: int
    """The micro-batch, from 0."""
    place: int | str
    """The block at work, from 0; or `before`, `teacher` (any of its blocks), `head`, `after`."""

    def __str__(self) -> str:
        where = f"block {self.place}" if isinstance(self.place, int) else self.place
        return self.name if self.name in ("update", "between") else f"{self.name} {self.micro_batch_index}: {where}"


@dataclass(slots=True)
class PhasePeak:
    """The most bytes that were live at once in a phase, and after which of its operations that was."""

    total_bytes: int = 0
    operation_index: int = -1
    bytes_by_kind: dict[MemoryKind, int] = field(default_factory=dict)
    live_after_operation: list[int] = field(default_factory=list, repr=False, compare=False)
    """Live bytes after each operation of the phase, in order."""


@dataclass(slots=True)
class _LiveStorage:
    num_bytes: int
    kind: MemoryKind
    reference: Any
    """Weak reference to the storage, whose callback ends the count when the storage is freed."""


class LiveBytes(TorchDispatchMode):
    """Counts bytes on `device` while it is entered, from what is made within it and what is shown to it.

    `phase` is set from outside; the peak of each phase is in `peak_by_phase`. After `begin_tallied_step`, a tally by kind
    of memory is taken after the given operations, which an earlier step found to be the highest of their phases, and after later
    ones that are higher.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.live_bytes = 0
        self.phase = StepPhase("between", 0, "before")
        self.peak_by_phase: dict[StepPhase, PhasePeak] = {}
        self.kind_of_new_tensors = MemoryKind.other
        """The kind of new tensors, unless more is known of them."""
        self.extra_bytes = 0
        """Bytes that count beside those that are live, of a reduction that is only supposed."""
        self.ignores_operations = False
        """Whether operations count in no phase for now."""
        self._current_phase: StepPhase | None = None
        """The phase that `_current_peak` and `_operation_to_tally` are of."""
        self._current_peak = PhasePeak()
        self._operation_to_tally = -1
        """The operation after which to tally by kind; -1: none."""
        self._live: dict[int, _LiveStorage] = {}
        self._operations_to_tally: dict[StepPhase, int] = {}
        self._owned_tensors: Callable[[], Iterable[tuple[MemoryKind, Tensor]]] = lambda: ()
        self._resize_reports: AbstractContextManager[None] = nullcontext()
        self._is_counting = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        """For torch: this mode only observes operations, so other modes need not handle it."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """For torch: nothing is compiled in a simulation, so no time is spent to keep torch.compile out of each operation."""
        return False

    # -- what lives ----------------------------------------------------------------------------------------------

    def track(self, tensor: Tensor, kind: MemoryKind | None = None) -> None:
        """Count a tensor's storage as live until it is freed. `kind`: what it holds; None if nothing special is known.

        Tensors that share a storage count once. Tensors elsewhere than on `device` do not count.
        """
        if device_of(tensor) != self.device:
            return
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        live_storage = self._live.get(key)
        if live_storage is None:
            size = allocated_bytes(storage.nbytes())
            self._live[key] = _LiveStorage(
                size, kind or self.kind_of_new_tensors, weakref.ref(storage, self._on_free(key))
            )
            self.live_bytes += size
        elif kind is not None:
            live_storage.kind = kind

    def _on_free(self, key: int) -> Callable[[Any], None]:
        """The callback of the weak reference to a storage: subtracts its bytes when Python frees it."""

        def free(_reference: Any) -> None:
            live_storage = self._live.pop(key, None)
            if live_storage is not None:
                self.live_bytes -= live_storage.num_bytes

        return free

    def _on_resize(self, storage: torch.UntypedStorage) -> None:
        """Count a storage with its new size: FSDP2 frees and fills its buffers by resizing them, without a new tensor."""
        live_storage = self._live.get(storage_key(storage))
        if live_storage is None:
            return
        size = allocated_bytes(storage.nbytes())
        self.live_bytes += size - live_storage.num_bytes
        live_storage.num_bytes = size
        live_storage.kind = MemoryKind.gathered  # FSDP2 resizes the buffers that it gathers into
        self.note_live_bytes()

    # -- through a step ------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Forget the peaks so far, and count the operations of each phase from 0."""
        self.peak_by_phase = {}
        self._operations_to_tally = {}
        self._current_phase = None

    def begin_tallied_step(
        self, tally_after: dict[StepPhase, int], owned_tensors: Callable[[], Iterable[tuple[MemoryKind, Tensor]]]
    ) -> None:
        """As `begin_step`; once a phase, live bytes will also be counted by kind. After each operation, that would take too long.

        `tally_after`: by phase, the number of the operation after which they are counted by kind. `owned_tensors`: yields
        (kind, tensor) for each tensor of the engine.
        """
        self.begin_step()
        self._operations_to_tally = tally_after
        self._owned_tensors = owned_tensors

    def known_kinds(self) -> dict[int, tuple[_LiveStorage, MemoryKind]]:
        """The live storages, each with its kind as known now, for `restore_kinds`: a tally sets more precise kinds."""
        return {key: (live_storage, live_storage.kind) for key, live_storage in self._live.items()}

    def restore_kinds(self, known_kinds: dict[int, tuple[_LiveStorage, MemoryKind]]) -> None:
        """Set the kinds of storages that are still live back to `known_kinds`, which were taken before a tally."""
        for key, (live_storage, kind) in known_kinds.items():
            if self._live.get(key) is live_storage:
                live_storage.kind = kind

    def tally_bytes_by_kind(self) -> dict[MemoryKind, int]:
        """Live bytes on the device by kind of memory (parameters, gradients, activations and so on), now."""
        self._is_counting = False  # asking for a tensor can be an operation
        owned_tensors = list(self._owned_tensors())
        self._is_counting = True
        for kind, tensor in owned_tensors:
            if device_of(tensor) == self.device and storage_key(tensor.untyped_storage()) in self._live:
                self.track(tensor, kind)
        bytes_by_kind: dict[MemoryKind, int] = {}
        for live_storage in self._live.values():
            bytes_by_kind[live_storage.kind] = bytes_by_kind.get(live_storage.kind, 0) + live_storage.num_bytes
        return {kind: size for kind, size in bytes_by_kind.items() if size}

    def note_peak_with(self, extra_bytes: int) -> None:
        """Note the live bytes as if `extra_bytes` more were live."""
        self.extra_bytes = extra_bytes
        self.note_live_bytes()
        self.extra_bytes = 0

    def note_live_bytes(self) -> None:
        """Append the live bytes to the list of the current phase, and update its peak: called after each operation."""
        if not self._is_counting or self.ignores_operations:
            return
        if self.phase is not self._current_phase:
            self._current_phase = self.phase
            self._current_peak = self.peak_by_phase.setdefault(self.phase, PhasePeak())
            self._operation_to_tally = self._operations_to_tally.get(self.phase, -1)
        peak = self._current_peak
        live_bytes = self.live_bytes + self.extra_bytes
        operation = len(peak.live_after_operation)
        is_highest = live_bytes > peak.total_bytes or peak.operation_index < 0
        if is_highest:
            peak.total_bytes = live_bytes
            peak.operation_index = operation
        peak.live_after_operation.append(live_bytes)
        # Tally where the peak was expected, and again if a later operation exceeds it.
        passed_expected_peak = 0 <= self._operation_to_tally < operation
        if operation == self._operation_to_tally or (is_highest and passed_expected_peak):
            peak.bytes_by_kind = self.tally_bytes_by_kind()
            if self.extra_bytes:
                communication = peak.bytes_by_kind.get(MemoryKind.communication, 0)
                peak.bytes_by_kind[MemoryKind.communication] = communication + self.extra_bytes

    def __enter__(self) -> Any:
        self._resize_reports = resizes_reported(self._on_resize)
        self._resize_reports.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._resize_reports.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, track the tensors that it makes, and note what is live after it."""
        if DTensor in types:
            return NotImplemented  # its local operations come by themselves
        if func is _DEVICE_OPERATION and isinstance(args[0], FakeTensor):  # most calls are of this operation
            self.note_live_bytes()
            return args[0].fake_device
        if func.namespace == "profiler":  # labels of parts of a step, which have no tensors
            self.note_live_bytes()
            with within_no_dispatch_mode():
                return func(*args, **(kwargs or {}))
        with within_no_function_mode():  # reading a property of a tensor must not count as an operation of the step
            out = self.run_operation(func, args, kwargs or {})
            if func.namespace in ("c10d", "_c10d_functional"):
                self._mark_communication(args)
            self._track_output(func, args, out)
        self.note_live_bytes()
        return out

    def run_operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the operation; `StepRecorder` overrides this to record it."""
        return func(*args, **kwargs)

    def _track_output(self, func: Any, args: Any, out: Any) -> None:
        """Track the tensors that an operation returned. The copy of a parameter in another type counts as gathered."""
        if isinstance(out, Tensor):
            self.track(out)
            if func is _CAST_OPERATION and self._is_parameter(args[0]):
                self.track(out, MemoryKind.gathered)
        elif isinstance(out, tuple | list):
            for tensor in out:
                self._track_output(None, (), tensor)

    def _is_parameter(self, tensor: Tensor) -> bool:
        """Whether a tensor's storage is known to hold parameters."""
        live_storage = self._live.get(storage_key(tensor.untyped_storage()))
        return live_storage is not None and live_storage.kind is MemoryKind.parameters

    def _mark_communication(self, operand: Any) -> None:
        """Count what a collective reads and writes as communication, unless it is known to be something else."""
        if isinstance(operand, Tensor):
            live_storage = self._live.get(storage_key(operand.untyped_storage()))
            if live_storage is not None and live_storage.kind in (MemoryKind.activations, MemoryKind.other):
                live_storage.kind = MemoryKind.communication
        elif isinstance(operand, tuple | list):
            for element in operand:
                self._mark_communication(element)
