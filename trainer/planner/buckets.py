"""Gradient buckets of DeepSpeed (ZeRO 1 and 2) in a shallow model: one with few blocks, simulated in place of a deeper one.

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
def track_bucket_reductions(engine: Any, recorder: LiveBytes, full_trained_elements: int | None) -> Iterator[None]:
    """A context in which `recorder` counts the buffers that DeepSpeed (ZeRO 1 and 2) allocates to reduce gradients.

    DeepSpeed collects gradients in a bucket of a fixed size, and reduces the bucket when it is full. Two methods of its optimizer
    are replaced within the context. For other engines it does nothing.

    `full_trained_elements`: trained elements of the deep model in whose place the engine's model of few blocks is simulated; None
    if the engine's model is simulated for itself, so that each reduction counts as it happens.
    """
    # `engine` is one of ours; DeepSpeed's own is its attribute `engine`.
    optimizer: Any = getattr(getattr(engine, "engine", None), "optimizer", None)
    if optimizer is None or not hasattr(optimizer, "reduce_ipg_grads"):
        yield
        return
    buckets = _RecordedBuckets(optimizer, recorder, full_trained_elements)
    optimizer.reduce_ipg_grads = buckets.reduce
    optimizer.reduce_ready_partitions_and_remove_grads = buckets.on_gradient
    try:
        yield
    finally:
        del optimizer.reduce_ipg_grads
        del optimizer.reduce_ready_partitions_and_remove_grads


class _RecordedBuckets:
    """The two methods that replace those of DeepSpeed's optimizer, to count the buffers of its reductions in a recorder.

    DeepSpeed collects gradients in a bucket, and reduces the bucket when it is full."""

    def __init__(self, optimizer: Any, recorder: LiveBytes, full_trained_elements: int | None) -> None:
        """Remember DeepSpeed's own methods, which the caller then replaces by those of this object.

        `optimizer`: DeepSpeed's ZeRO optimizer. `recorder`: counts the memory of a simulated step.
        """
        self.optimizer = optimizer
        self.recorder = recorder
        self.full_trained_elements = full_trained_elements
        """Trained elements of the deeper model; None if the engine's model is not a shallow one."""
        self._deepspeed_reduce: Callable[..., None] = optimizer.reduce_ipg_grads
        self._deepspeed_on_gradient: Callable[..., None] = optimizer.reduce_ready_partitions_and_remove_grads
        self._num_ranks = torch.distributed.get_world_size(optimizer.dp_process_group)
        self._has_several_buckets = False
        """Whether the gradients of the deeper model fill more than one bucket; False without one."""
        if full_trained_elements is not None:
            self._has_several_buckets = full_trained_elements > optimizer.reduce_bucket_size
        self._is_in_block = False
        """Whether DeepSpeed handles a gradient of a block at the moment."""

    def on_gradient(self, param: Any, group: int) -> None:
        """DeepSpeed calls this when the gradient of `param` is complete, in place of its own method, which is called at the end.

        A shallow model is one of few blocks, simulated in place of a deep one. There, any gradient of a block may be the one that
        fills the bucket. So the recorder notes here what the reduction of a full bucket would take. `group`: the index of the
        parameter's optimizer group.
        """
        # The recorder's phase says which part of the model computes: the index of a block, or a text such as "head".
        is_in_block = isinstance(self.recorder.phase.model_part, int)
        if self.full_trained_elements is not None and self._has_several_buckets and is_in_block:
            # DeepSpeed reduces a gradient that is larger than a bucket alone.
            large_gradients = [gradient.numel() for gradient in self.optimizer.extra_large_param_to_reduce.values()]
            bucket_elements = max(large_gradients, default=self.optimizer.reduce_bucket_size)
            self.recorder.note_peak_with(self._reduction_bytes(bucket_elements, self.full_trained_elements))
        # DeepSpeed may call `reduce` from here, which must know whether a block computes.
        self._is_in_block = is_in_block
        self._deepspeed_on_gradient(param, group)
        self._is_in_block = False

    def reduce(self, *args: Any, **kwargs: Any) -> None:
        """DeepSpeed calls this to reduce the gradients in its buckets, in place of its own method, which is called inside.

        What it allocates is counted as communication. In a model of few blocks, simulated in place of a deep one, the buckets
        count as if they were full. Inside its blocks nothing is counted: `on_gradient` has counted a full bucket instead.
        """
        is_counted_by_gradient = self._has_several_buckets and self._is_in_block
        with self.recorder.counting_as(
            MemoryKind.communication, self._bytes_lacking_to_full_bucket(), ignores_operations=is_counted_by_gradient
        ):
            self._deepspeed_reduce(*args, **kwargs)

    def _bytes_lacking_to_full_bucket(self) -> int:
        """Bytes by which the deeper model's reduction of a bucket takes more than the shallow model's, which is counted anyway.

        0 if the engine's model is not a shallow one.
        """
        if self.full_trained_elements is None:
            return 0
        trained_elements = sum(flat.numel() for flat in self.optimizer.bit16_groups_flat)
        bucket_elements = sum(bucket.elements for bucket in self.optimizer.ipg_buckets.values())
        # The deeper model fills its bucket, if it has as many gradients.
        full_elements = max(bucket_elements, min(self.full_trained_elements, self.optimizer.reduce_bucket_size))
        full_bytes = self._reduction_bytes(full_elements, self.full_trained_elements)
        return full_bytes - self._reduction_bytes(bucket_elements, trained_elements)

    def _reduction_bytes(self, bucket_elements: int, trained_elements: int) -> int:
        """Most bytes that DeepSpeed allocates to reduce a bucket, in a model of `trained_elements` trained elements.

        That is a copy of the part of one rank, and a second copy if gradients are exchanged in another dtype than they have.
        """
        # DeepSpeed has a bucket for each type in which gradients are exchanged; our runs use one type.
        (communicated_dtype,) = self.optimizer.ipg_buckets
        stored_dtype = self.optimizer.bit16_groups_flat[0].dtype
        bytes_per_element = stored_dtype.itemsize
        if communicated_dtype != stored_dtype:
            bytes_per_element += communicated_dtype.itemsize
        elements_per_rank = -(-trained_elements // self._num_ranks)  # rounded up
        return bytes_per_element * min(bucket_elements, elements_per_rank)
