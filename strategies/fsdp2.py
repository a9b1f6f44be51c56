"""FSDP2 (`fully_shard`): parameters, gradients and optimizer state sharded block by block; hsdp adds replicas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from strategies.activation import apply_to_blocks
from strategies.base import Fsdp2Config, OptimizerFactory, ParameterSource, Precision, plan_of
from strategies.compat.fsdp import (
    AllGather,
    DefaultAllocMixin,
    ReduceScatter,
    compute_local_shape_and_global_offset,
    finish_sharding,
    gather_on,
)
from strategies.compat.modules import replace_buffers
from strategies.errors import ConfigError
from strategies.full_params import FsdpFullParameters
from strategies.host_memory import HostMemory, open_host_memory
from strategies.mesh import replica_count, shard_mesh
from strategies.native import NativeEngine
from strategies.parameters import COMPUTE_DTYPE, materialize, meta_context, named_parameters, set_dtypes
from strategies.runtime import Runtime
from strategies.simulation import real_tensors


def dtensor_start(tensor: DTensor) -> int:
    """Index, in the flattened whole, of the first element of a dim-0 shard."""
    with real_tensors():
        _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    row = 1
    for size in tensor.shape[1:]:
        row *= size
    return (offsets[0] if offsets else 0) * row


def check_experts(step_module: nn.Module, ranks: int, strategy: str) -> None:
    """Raise ConfigError where experts would be dealt to more `ranks` than there are of them.

    A parameter is sharded along its first dimension. With more ranks than experts some would hold a whole expert of each
    layer, others nothing, and every gather would move the padding of those.
    """
    for name, parameter in named_parameters(step_module):
        experts = parameter.shape[0] if parameter.dim() == 3 and ".experts." in name else ranks
        if experts < ranks:
            fitting = max(d for d in range(1, experts + 1) if ranks % d == 0)
            raise ConfigError(
                f"strategy={strategy}: {name} holds {experts} experts, and {ranks} ranks would share them, so that "
                f"{ranks - experts} ranks held none of them and the others a whole one each; use strategy=hsdp "
                f"strategy.replicate={ranks // fitting}, which shards over {fitting}, or strategy=zero3, which cuts anywhere"
            )


class _AllGather(DefaultAllocMixin, AllGather):
    """A block's parameters, through the host's memory."""

    def __init__(self, memory: HostMemory) -> None:
        self.memory = memory

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        self.memory.all_gather(output_tensor, input_tensor)


class _ReduceScatter(DefaultAllocMixin, ReduceScatter):
    """A block's gradients, through the host's memory."""

    def __init__(self, memory: HostMemory) -> None:
        self.memory = memory

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        assert op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG), op
        self.memory.reduce_scatter(output_tensor, input_tensor, average=op == dist.ReduceOp.AVG)


class Fsdp2Engine(NativeEngine):
    """Gathers a block's parameters when it runs; keeps everything else sharded."""

    casts_parameters = True
    replicated = False
    defer_sync = True
    wrapped: FSDPModule  # type: ignore[assignment]
    shard_group: dist.ProcessGroup
    """The ranks that hold one replica together."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        sync = last or not self.defer_sync
        self.wrapped.set_is_last_backward(last)
        self.wrapped.set_requires_gradient_sync(sync)
        # Between replicas sums of shards can wait: they take no more memory than the shards.
        self.wrapped.set_requires_all_reduce(last)
        super().backward(loss, last=last)

    def gather(self, *, trainable_only: bool) -> Iterator[tuple[str, Tensor | None]]:
        # What rank 0 then does with the model alone may reshard it there (`state_dict` does, by a hook): all ranks begin alike.
        self._weights_changed()
        yield from super().gather(trainable_only=trainable_only)

    def _weights_changed(self) -> None:
        for module in self.wrapped.modules():  # type: ignore[attr-defined]
            if isinstance(module, FSDPModule):
                module.reshard()

    def _local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def _reduce_norm(self, squared: Tensor) -> Tensor:
        dist.all_reduce(squared, group=self.shard_group)
        return squared

    @property
    def _mesh(self) -> Any:
        return self.trainable[0][1].device_mesh  # type: ignore[attr-defined]

    def _local_range(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        assert isinstance(parameter, DTensor)
        local = parameter.to_local()
        return local.reshape(-1) if local.numel() == 0 else local.view(-1), dtensor_start(parameter)

    def _writes_checkpoint(self) -> bool:
        mesh = self._mesh
        return mesh.ndim == 1 or mesh.get_local_rank("replicate") == 0

    def _full_parameter(self, parameter: nn.Parameter) -> Tensor:
        tensor: Tensor = parameter
        if isinstance(tensor, DTensor):
            if tensor.to_local().device != self.runtime.device:  # offloaded: gather on the device, where NCCL can
                tensor = tensor.to(self.runtime.device)
            return tensor.full_tensor()  # type: ignore[attr-defined]
        return tensor


class Fsdp2Strategy:
    """Shards on the meta device, then loads only this rank's rows."""

    def __init__(self, config: Fsdp2Config, precision: Precision, runtime: Runtime) -> None:
        self.config, self.precision, self.runtime = config, precision, runtime
        self.replicate = replica_count(config, runtime.world_size, runtime.hosts)

    def init_context(self) -> AbstractContextManager[None]:
        return meta_context()

    def prepare(
        self,
        step_module: nn.Module,
        *,
        source: ParameterSource,
        make_optimizer: OptimizerFactory,
        max_grad_norm: float,
    ) -> Fsdp2Engine:
        """Block by block `fully_shard`, then values, then the optimizer. All ranks must call."""
        compute = COMPUTE_DTYPE[self.precision]
        set_dtypes(step_module, trainable=torch.float32, frozen=compute)
        apply_to_blocks(step_module, self.config)
        group = self._shard(step_module, compute)
        memory = self._exchange(step_module, group)
        device = torch.device("cpu") if self.config.cpu_offload else self.runtime.device
        materialize(step_module, device)
        if self.config.cpu_offload:
            replace_buffers(step_module, lambda buffer: buffer.to(self.runtime.device))
        self._fill(step_module, source)
        # Pads uneven shards and pins those on the host, in tensors of their own, which are the ones to keep from here on.
        finish_sharding(step_module)
        engine = Fsdp2Engine(
            step_module,
            step_module,
            make_optimizer=make_optimizer,
            max_grad_norm=max_grad_norm,
            precision=self.precision,
            runtime=self.runtime,
            strategy=self.config.name,
        )
        planned = plan_of(step_module).defer_sync
        engine.defer_sync = self.config.defer_sync is not False if planned is None else planned
        engine.shard_group, engine.host_memory = group, memory
        engine.full_parameters = FsdpFullParameters(
            step_module, compute, reshard_after_forward=self.config.reshard_after_forward
        )
        return engine

    def _shard(self, step_module: nn.Module, compute: torch.dtype) -> dist.ProcessGroup:
        """Wrap blocks and root; the ranks that hold one replica together."""
        check_experts(step_module, self.runtime.world_size // self.replicate, self.config.name)
        mesh = shard_mesh(self.runtime.device, self.runtime, self.replicate)
        offload: OffloadPolicy = OffloadPolicy()
        if self.config.cpu_offload:
            offload = CPUOffloadPolicy(pin_memory=self.runtime.kind == "cuda")
        if self.precision is Precision.fp32:
            policy = MixedPrecisionPolicy()
        else:
            policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
        kwargs: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "offload_policy": offload}
        for block in step_module.shard_units():  # type: ignore[operator]
            fully_shard(block, reshard_after_forward=self.config.reshard_after_forward, **kwargs)
        # The root's own parameters (embeddings, norm, head) are needed first in the backward pass: keep them gathered.
        fully_shard(step_module, reshard_after_forward=False, **kwargs)
        if self.runtime.simulated:
            gather_on(step_module, self.runtime.device)
        with real_tensors():
            return mesh["shard"].get_group()

    def _exchange(self, step_module: nn.Module, group: dist.ProcessGroup) -> HostMemory | None:
        memory = open_host_memory(self.runtime, group)
        for module in step_module.modules():
            if memory is not None and isinstance(module, FSDPModule):
                module.set_custom_all_gather(_AllGather(memory))
                module.set_custom_reduce_scatter(_ReduceScatter(memory))
        return memory

    @torch.no_grad()
    def _fill(self, step_module: nn.Module, source: ParameterSource) -> None:
        for name, parameter in named_parameters(step_module, teacher=True):
            assert isinstance(parameter, DTensor)
            local = parameter.to_local()
            if local.numel():
                start = dtensor_start(parameter)
                values = source.run(name, parameter.shape, start, start + local.numel())
                local.view(-1).copy_(values)
