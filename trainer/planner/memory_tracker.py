"""Tracks live bytes through a step, by storage, on real tensors as on fake ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
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
    """A part of a step in which one part of the model computes: `forward 0: block 3` is one, in each pass of a micro-batch."""

    name: str
    """The pass: `forward`, `backward`, `update`, or `between` steps."""
    micro_batch_index: int
    """The micro-batch, from 0."""
    model_part: int | str
    """The index of the block that computes, or `before` (the blocks), `teacher` (any of its blocks), `head`, `after`.

    A negative index counts from the last block, -1. Phases of models of different depths are compared by it.
    """

    def __str__(self) -> str:
        if not self.is_in_pass:
            return self.name
        where = f"block {self.model_part}" if isinstance(self.model_part, int) else self.model_part
        return f"{self.name} {self.micro_batch_index}: {where}"

    @property
    def is_in_pass(self) -> bool:
        """Whether it is part of a forward or backward pass; not of the update, nor between steps."""
        return self.name not in ("update", "between")

    def with_block_from_start(self, num_blocks: int) -> StepPhase:
        """The phase in a model of `num_blocks` blocks, with the index of a block that was counted from the last (-1) from 0."""
        if isinstance(self.model_part, int) and self.model_part < 0:
            return replace(self, model_part=num_blocks + self.model_part)
        return self


@dataclass(slots=True)
class PhasePeak:
    """The most bytes that were live at once in a phase, and after which of its operations that was."""

    total_bytes: int = 0
    operation_index: int = -1
    """The number of that operation within the phase, from 0; -1 before the first one."""
    bytes_by_kind: dict[MemoryKind, int] = field(default_factory=dict)
    """Bytes of the peak by kind of memory; empty in a step that is not tallied."""
    live_after_operation: list[int] = field(default_factory=list, repr=False, compare=False)
    """Live bytes after each operation of the phase, in order."""


@dataclass(slots=True)
class _LiveStorage:
    """Memory of the device that is allocated, and what it holds."""

    num_bytes: int
    kind: MemoryKind
    reference: Any
    """Weak reference to the storage, whose callback ends the count when the storage is freed."""


class LiveBytes(TorchDispatchMode):
    """Counts bytes on `device` while it is entered, from what is made within it and what is shown to it.

    `phase` is set from outside; the peak of each phase is in `peak_by_phase`. After `begin_tallied_step`, bytes are also counted
    by kind of memory (a tally) after the given operations, which an earlier step found to be the highest of their phases, and
    after later ones that are higher. An allocation is a storage, which tensors may share; it is live until Python frees it.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin with nothing live. `device`: whose memory is counted; tensors elsewhere are not."""
        super().__init__()
        self.device = device
        self.live_bytes = 0
        self.phase = StepPhase("between", 0, "before")
        self.peak_by_phase: dict[StepPhase, PhasePeak] = {}
        self.kind_of_new_tensors = MemoryKind.other
        """The kind of new tensors, unless more is known of them."""
        self.extra_bytes = 0
        """Bytes that count beside those that are live: those of a reduction that only the deeper model would make."""
        self.ignores_operations = False
        """Whether operations count in no phase for now."""
        self._current_phase: StepPhase | None = None
        """The phase that `_current_peak` and `_operation_to_tally` are of."""
        self._current_peak = PhasePeak()
        self._operation_to_tally = -1
        """The operation after which to tally by kind; -1: none."""
        self._live: dict[int, _LiveStorage] = {}
        """Live storages by `storage_key`."""
        self._operations_to_tally: dict[StepPhase, int] = {}
        """By phase, the operation after which an earlier step had its peak; empty in a step that is not tallied."""
        self._owned_tensors: Callable[[], Iterable[tuple[MemoryKind, Tensor]]] = lambda: ()
        """Yields the engine's tensors (parameters, gradients, optimizer state), each with its kind."""
        self._resize_reports: AbstractContextManager[None] = nullcontext()
        self._is_counting = True
        """False while the tracker itself runs operations."""

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
        """Count the memory of a tensor as live from now on, until Python frees it.

        Tensors that share a storage count once; those elsewhere than on `device` do not count. `kind`: what it holds; None if
        nothing special is known: a new storage then gets `kind_of_new_tensors`.
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
        """Count a storage with its new size; called after each `storage.resize_`, while the tracker is entered.

        FSDP2 frees and fills the buffers into which it gathers weights by resizing them, without a new tensor.
        """
        live_storage = self._live.get(storage_key(storage))
        if live_storage is None:
            return
        size = allocated_bytes(storage.nbytes())
        self.live_bytes += size - live_storage.num_bytes
        live_storage.num_bytes = size
        live_storage.kind = MemoryKind.gathered
        self.note_live_bytes()

    # -- through a step ------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Forget the peaks so far, and count the operations of each phase from 0."""
        self.peak_by_phase = {}
        self._operations_to_tally = {}
        self._current_phase = None

    def begin_tallied_step(
        self,
        operations_to_tally: dict[StepPhase, int],
        owned_tensors: Callable[[], Iterable[tuple[MemoryKind, Tensor]]],
    ) -> None:
        """Begin a step whose live bytes are also counted by kind (parameters, activations, ...), about once a phase.

        After each operation, that would take too long. `operations_to_tally`: by phase, the number of the operation after
        which it is done, since the phase is expected to peak there. `owned_tensors`: yields (kind, tensor) for each tensor of
        the engine.
        """
        self.begin_step()
        self._operations_to_tally = operations_to_tally
        self._owned_tensors = owned_tensors

    def known_kinds(self) -> dict[int, tuple[_LiveStorage, MemoryKind]]:
        """The live storages by `storage_key`, each with its kind as known now. For `restore_kinds`: a tally changes kinds."""
        return {key: (live_storage, live_storage.kind) for key, live_storage in self._live.items()}

    def restore_kinds(self, known_kinds: dict[int, tuple[_LiveStorage, MemoryKind]]) -> None:
        """Set the kinds of storages that are still live back to `known_kinds`, which were taken before a tally."""
        for key, (live_storage, kind) in known_kinds.items():
            if self._live.get(key) is live_storage:
                live_storage.kind = kind

    def tally_bytes_by_kind(self) -> dict[MemoryKind, int]:
        """Count the bytes that are live on the device now by kind of memory: {parameters: 2e9, activations: 5e8, ...}.

        A storage that the engine owns (weights, gradients, optimizer state) gets the kind of its tensor there: when it was
        allocated, only its phase was known.
        """
        self._is_counting = False  # asking for a tensor can be an operation
        try:
            owned_tensors = list(self._owned_tensors())
        finally:
            self._is_counting = True
        for kind, tensor in owned_tensors:
            if device_of(tensor) == self.device and storage_key(tensor.untyped_storage()) in self._live:
                self.track(tensor, kind)
        bytes_by_kind: dict[MemoryKind, int] = {}
        for live_storage in self._live.values():
            bytes_by_kind[live_storage.kind] = bytes_by_kind.get(live_storage.kind, 0) + live_storage.num_bytes
        return {kind: size for kind, size in bytes_by_kind.items() if size}

    @contextmanager
    def counting_as(
        self, kind: MemoryKind, extra_bytes: int = 0, *, ignores_operations: bool = False
    ) -> Iterator[None]:
        """A context for what an engine does beside the model, such as reducing gradients: new tensors in it count as `kind`.

        `extra_bytes`: counted as live beside what is there. `ignores_operations`: what is live after operations within the
        context counts in no phase.
        """
        earlier_kind = self.kind_of_new_tensors
        self.kind_of_new_tensors = kind
        self.extra_bytes = extra_bytes
        self.ignores_operations = ignores_operations
        try:
            yield
        finally:
            self.kind_of_new_tensors = earlier_kind
            self.extra_bytes = 0
            self.ignores_operations = False

    def note_peak_with(self, extra_bytes: int) -> None:
        """Note the live bytes as if `extra_bytes` more were live."""
        self.extra_bytes = extra_bytes
        self.note_live_bytes()
        self.extra_bytes = 0

    def note_live_bytes(self) -> None:
        """Note how many bytes are live after an operation: append them to the list of the current phase, and update its peak.

        In a step that began by `begin_tallied_step`, bytes are also counted by kind at the operation at which the phase is
        expected to peak, and at each later one that is higher.
        """
        if not self._is_counting or self.ignores_operations:
            return
        if self.phase is not self._current_phase:
            self._current_phase = self.phase
            self._current_peak = self.peak_by_phase.setdefault(self.phase, PhasePeak())
            self._operation_to_tally = self._operations_to_tally.get(self.phase, -1)
        peak = self._current_peak
        # `extra_bytes`: what only the deeper model, in whose place this one is simulated, would hold at the moment.
        live_bytes = self.live_bytes + self.extra_bytes
        operation = len(peak.live_after_operation)  # its number within the phase
        is_highest = live_bytes > peak.total_bytes or peak.operation_index < 0
        if is_highest:
            peak.total_bytes = live_bytes
            peak.operation_index = operation
        peak.live_after_operation.append(live_bytes)
        # Tally where the peak was expected, and again if a later operation exceeds it.
        passed_expected_peak = 0 <= self._operation_to_tally < operation
        if operation == self._operation_to_tally or (is_highest and passed_expected_peak):
            peak.bytes_by_kind = self.tally_bytes_by_kind()
            if self.extra_bytes:  # of a reduction, whose buffers are communication
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
        """Run an operation, track the tensors that it makes, note what is live after it; torch calls this inside the mode.

        Each call counts as one operation of its phase, also one that makes nothing: operations are matched by their number.
        """
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
