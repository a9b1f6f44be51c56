"""Records the collectives of a step in order, the host's reads from the device, memory traffic, and FLOPs."""

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
from strategies.pinned_memory import HostTensors
from trainer.model import flex_shapes
from trainer.planner import op_cache
from trainer.planner.memory_tracker import LiveBytes, StepPhase, allocated_bytes, device_of

_ROOT = Path(__file__).resolve().parent.parent.parent
_PROJECT_FOLDERS = ("strategies", "trainer")
FAKE_BACKEND = "fake"
"""Of the process groups of a simulated rank (`strategies/simulation.py`)."""
_SIMULATION_PATHS = ("strategies/simulation.py", "trainer/planner/")
"""Code that is not part of a step, though it runs while one is simulated."""


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective between ranks, as this rank calls it."""

    name: str
    """The operation without namespace and overload: `allgather_base`, `allreduce`."""
    ranks: tuple[int, ...]
    """Ranks of the process group."""
    dtype: str
    num_bytes: int
    """Bytes of its largest tensor: all that is gathered or reduced."""
    phase: StepPhase
    is_on_device: bool
    """Whether all its tensors lie on the rank's device."""


@dataclass(slots=True)
class SimulatedStepRecord:
    """What one step did."""

    collectives: list[Collective] = field(default_factory=list)
    host_reads: Counter[str] = field(default_factory=Counter)
    """How often the host waited for a value of the device, by line of the code."""
    bytes_to_host: int = 0
    """Bytes copied from the device to the host."""
    bytes_to_device: int = 0
    """Bytes copied from the host to the device."""
    host_inputs: HostTensors = field(default_factory=HostTensors)
    """Inputs of recomputed blocks that waited on the host."""
    moved_bytes_by_phase: Counter[str] = field(default_factory=Counter)
    """Bytes that operations other than products, attention and collectives read and write on the device, by phase."""
    flops: float = 0.0
    """Floating-point operations of products and attention, those recomputed included."""


class StepRecorder(LiveBytes):
    """`LiveBytes` that also records collectives, host reads, memory traffic and FLOPs of a step, in `record`.

    `sum_of_squared_lengths`: the sum of the squared lengths of the documents in the current micro-batch, by which attention is
    counted. Whoever takes the step sets it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.record = SimulatedStepRecord()
        self.sum_of_squared_lengths = 0

    def begin_step(self) -> None:
        super().begin_step()
        self.record = SimulatedStepRecord()

    def run_operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one torch operation of the step, and record what it costs: a collective, a host read, a copy, traffic or FLOPs.

        `func`: the operation as torch's dispatcher has it, such as `aten.mm.default`. In a simulation, tensors have no values and
        no other rank exists: a host read returns a placeholder (0 or False), and a collective returns its input at once.
        """
        properties = _operation_properties(func)
        if properties.is_collective:
            self._record_collective(func, args)
        if properties.is_reduce_scatter:
            self._count_copy_of_reduce_scatter(func, args)
        if properties.reads_on_host:  # `Tensor.item`
            if device_of(args[0]) == self.device:  # the host has to wait for it
                self.record.host_reads[_calling_line()] += 1
            if hasattr(args[0], "fake_device"):  # a fake tensor, which has no value
                return _placeholder_value(args[0].dtype)
        # A collective of a simulated rank: as torch's kernel for fake tensors would return it, but faster.
        if properties.returns_input_and_work and op_cache.is_simulating_step():
            return args[0], Work.boxed(FakeWork())
        output, flops, moved_bytes = self._run_or_rebuild(func, args, kwargs, properties)
        if properties.is_copy:
            self._record_host_copy(func, args, output)
        self.record.flops += flops
        self.record.moved_bytes_by_phase[self.phase.name] += moved_bytes
        return output

    def _run_or_rebuild(
        self, func: Any, args: Any, kwargs: Any, properties: _OperationProperties
    ) -> tuple[Any, float, int]:
        """Run a torch operation, or build its output from the cache, since a step repeats operations in block after block.

        Returns (output, FLOPs, bytes read and written on the device). A plain tuple, because this runs for each operation.
        """
        # None if the output may depend on more than shapes and types.
        operation = op_cache.cacheable_operation(func, args, kwargs)
        if operation is not None:
            cached = op_cache.cached_result(operation)
            if cached is not None:
                return op_cache.rebuild_output(cached, operation), cached.flops, cached.moved_bytes
        output = func(*args, **kwargs)
        flops = 0.0
        if properties.has_flops:
            flops = self._num_flops(func, args, kwargs, output)
        # The cost of a product is its arithmetic: its bytes would count it twice.
        moved_bytes = 0
        if not flops and not properties.has_no_traffic:
            moved_bytes = self._device_bytes(args) + self._device_bytes(output)
        if operation is not None:
            op_cache.store_result(operation, output, flops, moved_bytes)
        return output, flops, moved_bytes

    def _device_bytes(self, value: Any) -> int:
        """Bytes on the device of a tensor, or of all tensors in a list."""
        if isinstance(value, Tensor):
            if device_of(value) != self.device:
                return 0
            return value.numel() * value.element_size()
        if isinstance(value, tuple | list):
            return sum(map(self._device_bytes, value))
        return 0

    def _record_collective(self, func: Any, args: Any) -> None:
        """Record a collective of the step, with the ranks of its group and the bytes of its largest tensor.

        That is the whole that is gathered or reduced: its output or its input. `func`: the operation, such as
        `c10d._allgather_base_.default`, which is recorded as `allgather_base`.
        """
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
        group = CollectiveOp.get_process_group(func, args)
        self.record.collectives.append(
            Collective(
                name=func.__name__.partition(".")[0].strip("_"),
                ranks=tuple(torch.distributed.get_process_group_ranks(group)),
                dtype="/".join(dtypes),
                num_bytes=max((tensor.numel() * tensor.element_size() for tensor in tensors), default=0),
                phase=self.phase,
                is_on_device=all(device_of(tensor) == self.device for tensor in tensors),
            )
        )

    def _count_copy_of_reduce_scatter(self, func: Any, args: Any) -> None:
        """Count the copy of the full input that gloo, the backend of CPU ranks, would make in a simulated reduce-scatter.

        A simulated rank has torch's fake backend, which makes none; with real ranks the recorder sees the copy itself.
        """
        if self.device.type != "cpu":
            return
        if torch.distributed.get_backend(CollectiveOp.get_process_group(func, args)) != FAKE_BACKEND:
            return
        full_input = args[1]  # the operation's arguments: output, input, group, ...
        self.note_peak_with(allocated_bytes(full_input.numel() * full_input.element_size()))

    def _record_host_copy(self, func: Any, args: Any, out: Tensor) -> None:
        """Count the bytes of a copy (`out`) if it crosses between the device and the host. `args`: of the operation."""
        # `copy_(target, source)`, but `_to_copy(source)`.
        source = args[1] if func is torch.ops.aten.copy_.default else args[0]
        if not isinstance(source, Tensor) or device_of(source) == device_of(out):
            return
        size = out.numel() * out.element_size()
        if device_of(source) == self.device:
            self.record.bytes_to_host += size
        else:
            self.record.bytes_to_device += size

    def _num_flops(self, func: Any, args: Any, kwargs: Any, out: Any) -> float:
        """Count the floating-point operations of a matrix product or of attention; 0 for other operations.

        Attention, in-place products and experts' products have formulas here, other operations torch's own (`flop_registry`).
        `out`: what the operation returned.
        """
        packet = func.overloadpacket  # the operation without its overload
        name = _qualified_name(func)
        if name.startswith(_ATTENTION_OPERATIONS):
            is_backward = "backward" in name
            query = args[1] if is_backward else args[0]
            return _attention_flops(query, self.sum_of_squared_lengths, is_backward=is_backward)
        if packet is torch.ops.aten.addmm_:  # in place, which torch's registry of formulas lacks
            left, right = args[1:3]
            return 2.0 * left.shape[0] * left.shape[1] * right.shape[1]
        if packet is GROUPED_PRODUCT:
            return _grouped_product_flops(*args[:2])
        if packet in flop_registry:
            count = float(flop_registry[packet](*args, **kwargs, out_val=out))
            # torch's formula for attention counts all pairs of positions. The formulas above allow for causality themselves.
            return count / 2 if _is_causal(func, args, kwargs) else count
        return 0.0


def _attention_flops(query: Tensor, sum_of_squared_lengths: int, *, is_backward: bool) -> float:
    """Count the FLOPs of causal attention over documents, each of which attends within itself alone.

    `query`: `[B, heads, T, head_dim]` of flex attention, `[T, heads, head_dim]` of variable-length attention.
    `sum_of_squared_lengths`: of the documents, in tokens.
    """
    # For each pair of positions, the forward pass has 2 products (scores, and scores times values), the backward pass 5. Each is
    # a multiplication and an addition for each element of a head.
    flops_per_pair = 10 if is_backward else 4
    # A position attends to those before it in its document: half of all pairs.
    causal_pairs = sum_of_squared_lengths / 2
    num_heads = query.shape[1]
    head_dim = query.shape[-1]
    return flops_per_pair * causal_pairs * num_heads * head_dim


def _grouped_product_flops(left: Tensor, right: Tensor) -> float:
    """FLOPs of the products of experts: each group of rows of `left`, or of its columns, has a matrix of its own in `right`."""
    matrices = left.shape[0] if left.dim() == right.dim() == 3 else 1
    return 2.0 * matrices * left.shape[-2] * left.shape[-1] * right.shape[-1]


_OPERATIONS_WITHOUT_TRAFFIC = frozenset(
    {"empty", "empty_strided", "empty_like", "new_empty", "detach", "alias", "_unsafe_view"}
)
"""Operations beside views that read and write no values."""
_ATTENTION_OPERATIONS = ("torch_attn::_varlen_attn", flex_shapes.FORWARD)
"""How the names of attention with formulas here begin, forward and backward."""
_PRODUCT_OPERATIONS = (torch.ops.aten.addmm_, GROUPED_PRODUCT)
_COPY_OPERATIONS = (CAST.default, torch.ops.aten.copy_.default)


@dataclass(frozen=True, slots=True)
class _OperationProperties:
    """What is known of an operation, whatever its operands are."""

    is_collective: bool
    """Whether ranks exchange tensors by it."""
    is_reduce_scatter: bool
    """Whether it reduces one tensor and scatters it. Its arguments begin with the output and the whole input."""
    returns_input_and_work: bool
    """Whether it is a collective that returns its first operand, in which it wrote, and a `Work` to wait for."""
    reads_on_host: bool
    """Whether the host waits for its value."""
    is_copy: bool
    """Whether it may copy between the device and the host."""
    has_flops: bool
    """Whether it may be a product or attention."""
    has_no_traffic: bool
    """Whether it reads and writes nothing on the device that counts as memory traffic."""


@cache
def _operation_properties(func: Any) -> _OperationProperties:
    """Look up what a torch operation may cost, whatever its operands are, so that the recorder checks each only once."""
    packet = func.overloadpacket  # the operation without its overload
    has_formula_here = _qualified_name(func).startswith(_ATTENTION_OPERATIONS) or packet in _PRODUCT_OPERATIONS
    return _OperationProperties(
        is_collective=func in collective_ops and func not in sync_ops,
        is_reduce_scatter=_qualified_name(func) == "c10d::_reduce_scatter_base_",
        # `WK_ARG_1`: torch's set of collectives that return (first argument, Work).
        returns_input_and_work=func in CollectiveOp.WK_ARG_1 and func.namespace == "c10d",
        reads_on_host=func is READ_ON_HOST.default,
        is_copy=func in _COPY_OPERATIONS,
        has_flops=has_formula_here or packet in flop_registry,
        has_no_traffic=_has_no_traffic(func),
    )


def _qualified_name(func: Any) -> str:
    """An operation's name with its namespace, without its overload: `aten::empty`."""
    return str(func.name()).partition(".")[0]


def _has_no_traffic(func: Any) -> bool:
    """Whether an operation reads and writes nothing on the device, or is counted as a collective instead."""
    namespace, _, name = _qualified_name(func).partition("::")
    return func.is_view or func in collective_ops or namespace == "prim" or name in _OPERATIONS_WITHOUT_TRAFFIC


def _placeholder_value(dtype: torch.dtype) -> bool | float | int:
    """The value that the host gets for a tensor without values; False and 0 let the code go on as in a normal step."""
    if dtype is torch.bool:
        return False
    return 0.0 if dtype.is_floating_point else 0


def _is_causal(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation was called with `is_causal=True`, by position or by name."""
    names = [argument.name for argument in operation_schema(func).arguments]
    arguments = dict(zip(names, args, strict=False)) | kwargs
    return bool(arguments.get("is_causal", False))


def _calling_line() -> str:
    """Find the line of the project's own code that caused an operation, such as `strategies/native.py:212`, for a report.

    The innermost one that is running; the simulation's own code does not count. `elsewhere` if there is none.
    """
    frame = calling_frame(1)  # the caller of this function
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_ROOT) and path.relative_to(_ROOT).parts[0] in _PROJECT_FOLDERS:
            name = path.relative_to(_ROOT).as_posix()
            if not name.startswith(_SIMULATION_PATHS):
                return f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"
