"""Replicated parameters; gradients are all-reduced while the backward pass runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.nn.parallel import DistributedDataParallel

from strategies.activation import apply_checkpointing_and_compile
from strategies.base import DdpConfig, OptimizerFactory, ParameterSource
from strategies.host_memory import HostMemory, open_host_memory
from strategies.native import NativeEngine
from strategies.simulation import reduce_fake_gradients
from strategies.single import SingleStrategy, load_in_full


class DdpEngine(NativeEngine):
    """Reduces gradients on the last micro-batch of a step, or on each one with `strategy.defer_sync=false`."""

    wrapped: DistributedDataParallel
    defer_sync: bool = True

    def forward(self, batch: dict[str, Any], *, last: bool) -> dict[str, Tensor]:
        # DDP decides in the forward pass whether the coming backward pass synchronises.
        self.wrapped.require_backward_grad_sync = last or not self.defer_sync
        return super().forward(batch, last=last)


def _reduce_bucket(memory: HostMemory, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket of gradients before returning: a thread that sends in the background would take the same core."""
    memory.all_reduce(bucket.buffer(), average=True)
    completed: torch.futures.Future[Tensor] = torch.futures.Future()
    completed.set_result(bucket.buffer())
    return completed


class DdpStrategy(SingleStrategy):
    """Does what `single` does on every rank, and all-reduces the gradients."""

    config: DdpConfig

    def prepare(
        self,
        step_module: nn.Module,
        *,
        source: ParameterSource,
        make_optimizer: OptimizerFactory,
        max_grad_norm: float,
    ) -> NativeEngine:
        """Turn a model on meta into an engine for data parallelism: every rank loads all weights, and DDP wraps the module.

        `source`: where weights come from. `make_optimizer`: builds the optimizer of (plain name, parameter) pairs that train.
        `max_grad_norm`: to which the gradients' global norm is clipped; 0 does not clip. All ranks must call.
        """
        load_in_full(step_module, source, self.precision, self.runtime)
        apply_checkpointing_and_compile(step_module, self.config)
        wrapped = DistributedDataParallel(
            step_module,
            device_ids=[self.runtime.device] if self.runtime.device.type == "cuda" else None,
            bucket_cap_mb=self.config.bucket_mib,
            gradient_as_bucket_view=True,
            forward_sync_buffers=False,
            init_sync=False,
        )
        # CPU ranks of one host all-reduce their gradient buckets through shared memory; None where there is none.
        memory = open_host_memory(self.runtime)
        if self.runtime.simulated:
            reduce_fake_gradients(wrapped)
        elif memory is not None:
            # A lambda has no annotations: torch compares a hook's annotations with types, and ours would be strings.
            wrapped.register_comm_hook(memory, lambda memory, bucket: _reduce_bucket(memory, bucket))
        engine = DdpEngine(
            step_module,
            wrapped,
            make_optimizer=make_optimizer,
            max_grad_norm=max_grad_norm,
            precision=self.precision,
            runtime=self.runtime,
            strategy=self.config.name,
        )
        # null means true here: every rank keeps full gradients anyway, so waiting costs no memory.
        engine.defer_sync = self.config.defer_sync is not False
        engine.host_memory = memory
        return engine
