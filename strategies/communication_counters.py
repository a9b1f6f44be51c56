"""Counts the bytes that a rank exchanges, by collective, in the terms of a plan.

Collectives of torch's process groups are counted whoever calls them: FSDP2, DeepSpeed, DDP's reducer and the engines
here. Exchange outside process groups reports itself: the shared memory of a host (`strategies/host_memory.py`).
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

GATHER, REDUCE, SCATTER, EACH = "all_gather", "all_reduce", "reduce_scatter", "all_to_all"
_OPERATIONS = {
    **dict.fromkeys(("allgather_", "_allgather_base_", "allgather_coalesced_"), GATHER),
    "allgather_into_tensor_coalesced_": GATHER,
    **dict.fromkeys(("allreduce_", "allreduce_coalesced_"), REDUCE),
    **dict.fromkeys(("reduce_scatter_", "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_"), SCATTER),
    **dict.fromkeys(("alltoall_", "alltoall_base_"), EACH),
    **dict.fromkeys(("gather_", "gather_into_tensor_"), "gather"),
    **dict.fromkeys(("recv_", "recv_any_source_"), "recv"),
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "scatter_": "scatter",
    "send": "send",
}
"""Operations of `torch.ops.c10d`, and what they are called here."""


@dataclass(slots=True, eq=False)
class Exchanged:
    """What a rank exchanged. Two of them are never equal: one that ends must not end another with the same numbers."""

    sizes: Counter[str] = field(default_factory=Counter)
    """Bytes by collective: of the whole that is gathered or reduced."""
    waited_s: float | None = None
    """Seconds in collectives that nothing hides: those through the memory of a host; None where there were none."""


_asking: list[Exchanged] = []


def tell(collective: str, size: int) -> None:
    """This rank takes part in a collective of `size` bytes."""
    for found in _asking:
        found.sizes[collective] += size


def waits(collective: str, whole: int) -> Callable[[Any], Any]:
    """For a method that is a collective, and returns when it is over; `whole`: which of its tensors is gathered or reduced."""

    def decorate(call: Any) -> Any:
        @wraps(call)
        def timed(self: Any, *tensors: Tensor, **kwargs: Any) -> None:
            if not _asking:
                call(self, *tensors, **kwargs)
                return
            begun = time.perf_counter()
            call(self, *tensors, **kwargs)
            for found in _asking:
                found.waited_s = (found.waited_s or 0.0) + time.perf_counter() - begun
            tell(collective, tensors[whole].nbytes)

        return timed

    return decorate


@contextmanager
def counting() -> Iterator[Exchanged]:
    """What this rank exchanges meanwhile. No collective; costs some 50 microseconds for each of them."""
    found = Exchanged()
    first = not _asking
    _asking.append(found)
    try:
        with collectives_reported(_OPERATIONS, tell) if first else nullcontext():
            yield found
    finally:
        _asking.remove(found)
