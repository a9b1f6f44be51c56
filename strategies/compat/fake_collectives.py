"""Collectives of fake tensors. To import this module gives torch's collectives their shapes: `fake_collectives` registers them.

Read in torch 2.13.0 and 2.15.0. `torch.distributed._tools` is where torch itself keeps its lists of collectives and which of
their operands are tensors and groups; they have no public address.
"""

from __future__ import annotations

from torch._C._distributed_c10d import FakeWork, Work
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.testing._internal.distributed.fake_pg import FakeStore

__all__ = ["CollectiveOp", "FakeStore", "FakeWork", "Work", "collective_ops", "sync_ops"]
"""`FakeWork` and `Work` are the handles of collectives, `FakeStore` the store that the process group `fake` is formed with."""
