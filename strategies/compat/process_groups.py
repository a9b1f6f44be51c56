"""Process groups of torch: which there are, how long they wait, what they did last.

Read in torch 2.13.0 and 2.15.0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

_RECORDERS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")
"""What reads the flight recorders: a build for GPUs has both, and NCCL's exchanges are in the second alone."""


def living_groups() -> list[dist.ProcessGroup]:
    """The process groups that were formed and not destroyed (`distributed_c10d._world`); torch lists them nowhere in public."""
    return list(distributed_c10d._world.pg_map)


def set_group_timeout(timeout: timedelta, group: dist.ProcessGroup) -> None:
    """Let the collectives of `group` wait so long for other ranks. No collective.

    `_set_pg_timeout` until torch 2.14. The public `dist.set_timeout` came later and is deprecated since 2.15; it stays the first
    choice while it is there.
    """
    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
    set_timeout(timeout, group)


def default_store() -> dist.Store:
    """The store with which the job's first group was formed (`_get_default_store`); a group gives it to nobody in public."""
    return distributed_c10d._get_default_store()


def make_fake_backend_known() -> None:
    """Let `init_process_group` know the backend `fake`, which answers at once and needs no network.

    Importing `torch.testing._internal.distributed.fake_pg` registers it; there is no public way.
    """
    from torch.testing._internal.distributed import fake_pg  # noqa: F401


def recorded_exchanges() -> list[dict[str, Any]]:
    """What the flight recorders of this process have, the oldest first; empty where nothing is recorded. For any thread.

    They are read as JSON by functions of `torch._C`. What is public writes pickles to files, when NCCL's watchdog wants to.
    """
    from torch._C import _distributed_c10d as c10d

    readers = [getattr(c10d, name) for name in _RECORDERS if hasattr(c10d, name)]
    entries: list[dict[str, Any]] = []
    for read in readers:
        entries += json.loads(read(True, False)).get("entries") or []
    entries.sort(key=lambda entry: entry.get("time_created_ns", 0))
    return entries


@contextmanager
def collectives_reported(names: Mapping[str, str], report: Callable[[str, int], None]) -> Iterator[None]:
    """Within it, `report(name, num_bytes)` is called as each collective of this process begins, whoever calls it.

    `names`: the operations of `torch.ops.c10d` that are reported, and under what name; those that this torch does not have are
    passed over. `num_bytes` is the size of the largest of an operation's arguments, that of a list the sum of its tensors: the
    whole that is gathered or reduced.

    The public `torch.library` puts a kernel before those of the backends, for these operations alone. A dispatch mode counts the
    same, but sees every operation of a step, and autograd takes more memory while a mode is at work: it adds up gradients out
    of place. The flight recorder does not know gloo's sum of shards from an all-reduce, and forgets. Private are the keys after
    autograd's (`_after_autograd_keyset`) and the end of a library (`_destroy`): without it a kernel stays until it is collected.
    """
    library = torch.library.Library("c10d", "IMPL")
    try:
        for operation, name in names.items():
            if hasattr(torch.ops.c10d, operation):
                overload = getattr(torch.ops.c10d, operation).default
                library.impl(overload, _reporting(overload, name, report), "Autograd", with_keyset=True)
        yield
    finally:
        library._destroy()


def _reporting(operation: Any, name: str, report: Callable[[str, int], None]) -> Callable[..., Any]:
    """The kernel that reports `operation` and calls those of the backends."""

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        report(name, max(map(_num_bytes, (*args, *kwargs.values())), default=0))
        return operation.redispatch(keys & torch._C._after_autograd_keyset, *args, **kwargs)

    return kernel


def _num_bytes(argument: Any) -> int:
    """Bytes of a tensor, or of those in nested lists."""
    if isinstance(argument, torch.Tensor):
        return argument.nbytes
    if isinstance(argument, list | tuple):
        return sum(map(_num_bytes, argument))
    return 0


class ReducerWithoutRebuild:
    """Stands in for the reducer of a DistributedDataParallel module of fake tensors.

    DDP makes its buckets anew by the order in which gradients came. That order is the one thing it reads of them.
    """

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False
