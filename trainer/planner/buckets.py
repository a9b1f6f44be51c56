"""Gradient buckets of DeepSpeed (ZeRO 1 and 2) in a shallow model that stands for a deeper one.

Which gradient fills a bucket, and how full it was, does not repeat with the blocks, so the memory of a reduction is
not linear in their number. In a shallow model each gradient of a block therefore counts as if it filled a bucket,
which is the most that the whole model can take there. The reductions themselves count only outside blocks, as if of
full buckets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from strategies.tensor_inventory import MemoryKind
from trainer.planner.memory_tracker import LiveBytes


@contextmanager
def bucketed(engine: Any, recorder: LiveBytes, whole: int | None) -> Iterator[None]:
    """Tells `recorder` of the reductions of `engine` while entered. `whole`: trained elements of the model that the engine's
    stands for; None where it stands for itself, and each reduction counts as it comes.
    """
    inner: Any = getattr(getattr(engine, "engine", None), "optimizer", None)
    if inner is None or not hasattr(inner, "reduce_ipg_grads"):
        yield
        return
    watched = _Buckets(inner, recorder, whole)
    inner.reduce_ipg_grads, inner.reduce_ready_partitions_and_remove_grads = watched.reduce, watched.ready
    try:
        yield
    finally:
        del inner.reduce_ipg_grads, inner.reduce_ready_partitions_and_remove_grads


class _Buckets:
    """DeepSpeed's optimizer, whose reductions are watched."""

    def __init__(self, inner: Any, recorder: LiveBytes, whole: int | None) -> None:
        self.inner, self.recorder, self.whole = inner, recorder, whole
        self._reduce: Callable[..., None] = inner.reduce_ipg_grads
        self._ready: Callable[..., None] = inner.reduce_ready_partitions_and_remove_grads
        self._ranks = torch.distributed.get_world_size(inner.dp_process_group)
        self._fills = whole is not None and whole > inner.reduce_bucket_size
        """Whether the whole model has more than one bucket."""
        self._arriving = False

    def ready(self, param: Any, group: int) -> None:
        """A gradient is there."""
        self._arriving = isinstance(self.recorder.moment.place, int)
        if self._fills and self._arriving:
            alone = [each.numel() for each in self.inner.extra_large_param_to_reduce.values()]
            self.recorder.suppose(self._taken(max(alone, default=self.inner.reduce_bucket_size), self.whole or 0))
        self._ready(param, group)
        self._arriving = False

    def reduce(self, *args: Any, **kwargs: Any) -> None:
        """What is in the buckets is reduced."""
        recorder, made = self.recorder, self.recorder.made
        recorder.made = MemoryKind.communication
        if self.whole is not None:
            trained = sum(flat.numel() for flat in self.inner.bit16_groups_flat)
            content = sum(bucket.elements for bucket in self.inner.ipg_buckets.values())
            most = max(content, min(self.whole, self.inner.reduce_bucket_size))
            recorder.more = self._taken(most, self.whole) - self._taken(content, trained)
            recorder.hidden = self._fills and self._arriving
        self._reduce(*args, **kwargs)
        recorder.made, recorder.more, recorder.hidden = made, 0, False

    def _taken(self, content: int, trained: int) -> int:
        """Bytes that the reduction of a bucket takes at most, in a model of so many trained elements: a copy of what goes to one
        rank, and one more in the type in which it is exchanged.
        """
        (exchanged,), kept = self.inner.ipg_buckets, self.inner.bit16_groups_flat[0].dtype
        each = kept.itemsize + (exchanged.itemsize if exchanged != kept else 0)
        return each * min(content, -(-trained // self._ranks))
