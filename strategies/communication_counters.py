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
_OPERATIONS = {
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
"""Names of the operations of `torch.ops.c10d` in our counts."""


@dataclass(slots=True, eq=False)
class CommunicationTotals:
    """What a rank has exchanged while a count was open.

    Compared by identity: two open counts may have the same numbers, and closing one must not close the other.
    """

    sizes: Counter[str] = field(default_factory=Counter)
    """Bytes by collective: the size of the full tensor that is gathered or reduced."""
    waited_s: float | None = None
    """Seconds in collectives through host memory, which no computation hides; None if there were none."""


_open_totals: list[CommunicationTotals] = []


def count_bytes(collective: str, size: int) -> None:
    """Add `size` bytes of a collective to every open count."""
    for totals in _open_totals:
        totals.sizes[collective] += size


def counted_collective(collective: str, full_argument: int) -> Callable[[Any], Any]:
    """Decorator for a method that is a collective of ours (through shared memory): counts its bytes and its seconds.

    `collective`: the name under which bytes count. `full_argument`: which of the method's tensors is the whole that is
    gathered or reduced. The method must return only when the exchange is over.
    """

    def decorate(call: Any) -> Any:
        """The method, which counts only while a count is open."""

        @wraps(call)
        def timed(self: Any, *tensors: Tensor, **kwargs: Any) -> None:
            if not _open_totals:
                call(self, *tensors, **kwargs)
                return
            start = time.perf_counter()
            call(self, *tensors, **kwargs)
            for totals in _open_totals:
                totals.waited_s = (totals.waited_s or 0.0) + time.perf_counter() - start
            count_bytes(collective, tensors[full_argument].nbytes)

        return timed

    return decorate


@contextmanager
def count_communication() -> Iterator[CommunicationTotals]:
    """Count what this rank exchanges inside the context; contexts may be nested, and each counts for itself.

    It does not communicate, and adds some 50 microseconds to a collective.
    """
    totals = CommunicationTotals()
    # Replacing torch's collectives by counting ones twice would count twice.
    outermost = not _open_totals
    _open_totals.append(totals)
    try:
        with collectives_reported(_OPERATIONS, count_bytes) if outermost else nullcontext():
            yield totals
    finally:
        _open_totals.remove(totals)
