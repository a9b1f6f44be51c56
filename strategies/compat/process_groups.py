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

_DUMP_FUNCTION_NAMES = ("_dump_fr_trace_json", "_dump_nccl_trace_json")
"""What reads the flight recorders: a build for GPUs has both, and NCCL's collectives are in the second alone."""


def living_groups() -> list[dist.ProcessGroup]:
    """The process groups that were formed and not destroyed (`distributed_c10d._world`); torch lists them nowhere in public."""
    return list(distributed_c10d._world.pg_map)


def set_group_timeout(timeout: timedelta, group: dist.ProcessGroup) -> None:
    """Set how long the collectives of `group` wait for other ranks. No collective.

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


def recorded_collectives() -> list[dict[str, Any]]:
    """Read the last collectives of this process from torch's flight recorders, the oldest first, to find where a run hangs.

    Each is a dict of torch's, such as {"profiling_name": "nccl:all_reduce", "collective_seq_id": 12, ...}. Empty if nothing is
    recorded. Any thread may call it. They are read as JSON by functions of `torch._C`. The public way writes pickles to files,
    at a time that NCCL's watchdog chooses.
    """
    from torch._C import _distributed_c10d as c10d

    dump_functions = [getattr(c10d, name) for name in _DUMP_FUNCTION_NAMES if hasattr(c10d, name)]
    entries: list[dict[str, Any]] = []
    for dump in dump_functions:
        with_collectives, only_active = True, False
        entries += json.loads(dump(with_collectives, only_active)).get("entries") or []
    entries.sort(key=lambda entry: entry.get("time_created_ns", 0))
    return entries


@contextmanager
def collectives_reported(name_by_operation: Mapping[str, str], report: Callable[[str, int], None]) -> Iterator[None]:
    """Report the bytes of each collective of this process inside the context, whatever code calls it.

    `report(name, num_bytes)` is called when a collective begins. `name_by_operation`: by operation of `torch.ops.c10d`, the name
    under which it is reported; operations that this torch does not have are ignored. `num_bytes`: the size of the largest
    argument (of a list, the sum of its tensors), which is the full tensor that is gathered or reduced.

    The public `torch.library` puts a kernel before those of the backends, for these operations only. A dispatch mode could count
    them too, but it sees every operation of a step, and autograd takes more memory inside a mode: it adds up gradients out of
    place. The flight recorder cannot distinguish gloo's reduce-scatter from an all-reduce, and keeps only the last entries.
    Private are the keys after autograd's (`_after_autograd_keyset`), and `_destroy`, without which a kernel stays until the
    library is garbage-collected.
    """
    library = torch.library.Library("c10d", "IMPL")
    try:
        for operation, name in name_by_operation.items():
            if hasattr(torch.ops.c10d, operation):
                overload = getattr(torch.ops.c10d, operation).default
                library.impl(overload, _reporting_kernel(overload, name, report), "Autograd", with_keyset=True)
        yield
    finally:
        library._destroy()


def _reporting_kernel(operation: Any, name: str, report: Callable[[str, int], None]) -> Callable[..., Any]:
    """Make a kernel for a collective of torch that calls `report(name, bytes of its largest argument)`, then the backend's own.

    `operation`: an overload in `torch.ops.c10d`.
    """

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
    """Replaces the reducer of a DistributedDataParallel module of fake tensors, so that it does not rebuild its buckets.

    DDP rebuilds them in the order in which gradients arrived, for which it would read values that fake tensors do not have.
    """

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False
