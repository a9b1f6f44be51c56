"""What a rank exchanges with others, counted while somebody asks: bytes by collective, as a plan counts them.

Seen are the calls of torch's process groups from Python, which FSDP2, DeepSpeed and the engines here make. What goes around them
says so: the shared memory of a host, and DDP's reducer, which calls its group from C++.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch.distributed as dist
from torch import Tensor

GATHER, REDUCE, SCATTER, EACH = "all_gather", "all_reduce", "reduce_scatter", "all_to_all"
_CALLS = {
    **dict.fromkeys(("allgather", "allgather_coalesced", "_allgather_base"), GATHER),
    **dict.fromkeys(("all_gather_single", "all_gather_single_coalesced", "allgather_into_tensor_coalesced"), GATHER),
    **dict.fromkeys(("allreduce", "allreduce_coalesced"), REDUCE),
    **dict.fromkeys(("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced"), SCATTER),
    **dict.fromkeys(("reduce_scatter_single", "reduce_scatter_single_coalesced"), SCATTER),
    **dict.fromkeys(("alltoall", "alltoall_base", "all_to_all_single"), EACH),
    **{each: each for each in ("broadcast", "reduce", "gather", "scatter", "send", "recv")},
}
"""Methods of a process group, and what they are called here."""


@dataclass(slots=True)
class Exchanged:
    """What a rank exchanged."""

    sizes: Counter[str] = field(default_factory=Counter)
    """Bytes by collective: of the whole that is gathered or reduced."""
    waited_s: float | None = None
    """Seconds in collectives that nothing hides: those through the memory of a host; None where there were none."""


_asking: list[Exchanged] = []


def asked() -> bool:
    """Whether anybody counts."""
    return bool(_asking)


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
    """What this rank exchanges meanwhile. No collective; costs a call of Python for each of them."""
    found = Exchanged()
    kept = {name: call for name, call in vars(dist.ProcessGroup).items() if name in _CALLS}
    _asking.append(found)
    try:
        for name in kept:
            setattr(dist.ProcessGroup, name, _told(getattr(dist.ProcessGroup, name), _CALLS[name]))
        yield found
    finally:
        for name, call in kept.items():
            setattr(dist.ProcessGroup, name, call)
        _asking.remove(found)


def _told(call: Any, collective: str) -> Any:
    @wraps(call)
    def told(group: Any, *args: Any, **kwargs: Any) -> Any:
        tell(collective, max(map(_size, (*args, *kwargs.values())), default=0))
        return call(group, *args, **kwargs)

    return told


def _size(value: Any) -> int:
    """Bytes of a tensor, or of those in lists."""
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0
