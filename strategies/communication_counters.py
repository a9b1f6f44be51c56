"""Counts the bytes that a rank exchanges, by collective, under the names that plans use.

Collectives of torch's process groups are counted whoever calls them: FSDP2, DeepSpeed, DDP's reducer or the engines here. The
shared memory of a host (`strategies/host_memory.py`) is outside process groups, and reports its collectives itself.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from torch import Tensor

from strategies.compat.process_groups import collectives_reported

ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, ALL_TO_ALL = "all_gather", "all_reduce", "reduce_scatter", "all_to_all"
_COLLECTIVE_BY_OPERATION = {
    **dict.fromkeys(("allgather_", "_allgather_base_", "allgather_coalesced_"), ALL_GATHER),
    "allgather_into_tensor_coalesced_": ALL_GATHER,
    **dict.fromkeys(("allreduce_", "allreduce_coalesced_"), ALL_REDUCE),
    **dict.fromkeys(("reduce_scatter_", "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_"), REDUCE_SCATTER),
    **dict.fromkeys(("alltoall_", "alltoall_base_"), ALL_TO_ALL),
    **dict.fromkeys(("gather_", "gather_into_tensor_"), "gather"),
    **dict.fromkeys(("recv_", "recv_any_source_"), "recv"),
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "scatter_": "scatter",
    "send": "send",
}
"""By operation of `torch.ops.c10d`, the name of the collective under which its bytes are counted."""


@dataclass(slots=True, eq=False)
class CommunicationTotals:
    """The bytes that a rank has exchanged within a context of `count_communication`.

    Compared by identity: totals of two nested contexts may have the same numbers, and ending one must not end the other.
    """

    bytes_by_collective: Counter[str] = field(default_factory=Counter)
    """Of each collective the size of the full tensor that is gathered or reduced."""
    waited_s: float | None = None
    """Seconds in collectives through host memory, which no computation hides; None if there were none."""


_active_totals: list[CommunicationTotals] = []
"""The totals of all contexts of `count_communication` that are entered now."""


def count_bytes(collective: str, size: int) -> None:
    """Add `size` bytes of a collective, such as `all_gather`, to the totals of every entered context."""
    for totals in _active_totals:
        totals.bytes_by_collective[collective] += size


def counted_collective(collective: str, full_argument_index: int) -> Callable[[Any], Any]:
    """Make a decorator for methods that are collectives through shared memory, which counts their bytes and seconds.

    Only while a context of `count_communication` is entered, which by itself sees torch's own alone. `collective`: the
    name under which bytes are counted, such as `all_gather`. `full_argument_index`: which of the method's tensor arguments is the
    full tensor, gathered or to be reduced. The method must return only when the collective is complete.
    """

    def with_counters(method: Any) -> Any:

        @wraps(method)
        def counted_method(self: Any, *tensors: Tensor, **kwargs: Any) -> None:
            if not _active_totals:
                method(self, *tensors, **kwargs)
                return
            began_at = time.perf_counter()
            method(self, *tensors, **kwargs)
            for totals in _active_totals:  # those of the entered contexts of `count_communication`
                totals.waited_s = (totals.waited_s or 0.0) + time.perf_counter() - began_at
            count_bytes(collective, tensors[full_argument_index].nbytes)

        return counted_method

    return with_counters


@contextmanager
def count_communication() -> Iterator[CommunicationTotals]:
    """Count the bytes that this rank exchanges within the context, whoever calls the collectives; yields the running totals.

    Contexts may be nested; each counts for itself, and inner ones must end before the outermost. It does not communicate, and
    adds some 50 microseconds to a collective.
    """
    totals = CommunicationTotals()
    # Only the outermost context replaces torch's collectives by counting ones: replaced twice, they would count twice.
    is_outermost = not _active_totals
    _active_totals.append(totals)
    try:
        with collectives_reported(_COLLECTIVE_BY_OPERATION, count_bytes) if is_outermost else nullcontext():
            yield totals
    finally:
        _active_totals.remove(totals)
