"""Process groups of torch: which there are, how long they wait, what they did last.

Read in torch 2.13.0 and 2.15.0.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

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
