"""FSDP2 (`fully_shard`): parameters, gradients and optimizer state sharded block by block; hsdp adds replicas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from strategies.activation import apply_checkpointing_and_compile
from strategies.base import (
    Fsdp2Config,
    OptimizerFactory,
    ParameterSource,
    Precision,
    plan_of,
    units_gathered_one_at_a_time,
)
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
from strategies.expert_parallelism import distribute_experts, shard_experts
from strategies.expert_share import expert_share_of_parameter
from strategies.full_params import FsdpFullParameters
from strategies.host_memory import HostMemory, open_host_memory
from strategies.mesh import replica_count, shard_mesh
from strategies.native import LocalRange, NativeEngine
from strategies.parameters import (
    COMPUTE_DTYPE,
    allocate_on_device,
    named_parameters,
    set_parameter_dtypes,
)
from strategies.runtime import Runtime
from strategies.simulation import real_tensors


def index_of_first_local_element(tensor: DTensor) -> int:
    """Index of this rank's first element in the flattened full tensor; `tensor` is sharded along its first dimension."""
    with real_tensors():
        _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    first_row = offsets[0] if offsets else 0  # a 0-d tensor has no offsets
    elements_per_row = 1
    for size in tensor.shape[1:]:
        elements_per_row *= size
    return first_row * elements_per_row


def full_shape_and_start(step_module: nn.Module, name: str, tensor: DTensor) -> tuple[torch.Size, int]:
    """Find where this rank's elements lie in the full parameter, as files have it: (its shape, index of the first element).

    The index counts in the flattened full parameter. Under expert parallelism, `tensor` is the part of one rank of the expert
    group; the full parameter has all experts.
    """
    start = index_of_first_local_element(tensor)
    share = expert_share_of_parameter(step_module, name)
    if share is None:
        return tensor.shape, start
    return share.full_shape(tensor.shape), share.first_own_element(tensor.shape) + start


def check_experts_can_be_sharded(step_module: nn.Module, num_ranks: int, strategy: str) -> None:
    """Raise ConfigError if a layer has fewer experts than there are ranks (`num_ranks`) to shard them over, with what to do.

    FSDP2 shards parameters along their first dimension, which here is the expert. With more ranks than experts, some ranks would
    hold one expert of each layer and others none, for which every all-gather would move padding. `strategy`: its name, for the
    message.
    """
    for name, parameter in named_parameters(step_module):
        if parameter.dim() != 3 or ".experts." not in name:
            continue
        num_experts = parameter.shape[0]
        if num_experts >= num_ranks:
            continue
        # With as many shards, each rank would have at least one expert.
        num_shards = max(divisor for divisor in range(1, num_experts + 1) if num_ranks % divisor == 0)
        raise ConfigError(
            f"strategy={strategy}: {name} holds {num_experts} experts, and {num_ranks} ranks would share them, so that "
            f"{num_ranks - num_experts} ranks held none of them and the others a whole one each; use strategy=hsdp "
            f"strategy.replicate={num_ranks // num_shards}, which shards over {num_shards}, or strategy=zero3, which cuts "
            "anywhere"
        )


class _SharedMemoryAllGather(DefaultAllocMixin, AllGather):
    """Gathers a block's parameters through shared memory, in place of FSDP2's own all-gather."""

    def __init__(self, memory: HostMemory) -> None:
        self.memory = memory

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        self.memory.all_gather(output_tensor, input_tensor)


class _SharedMemoryReduceScatter(DefaultAllocMixin, ReduceScatter):
    """Reduces a block's gradients through shared memory, in place of FSDP2's own reduce-scatter."""

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
        """Sum or average gradients over the ranks, and put this rank's part into `output_tensor`; FSDP2 calls it for each block.

        The signature is FSDP2's. The collective is over when it returns, whatever `async_op` says. All ranks must call.
        """
        assert op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG), op
        self.memory.reduce_scatter(output_tensor, input_tensor, average=op == dist.ReduceOp.AVG)


class Fsdp2Engine(NativeEngine):
    """Gathers a block's parameters while the block runs, and keeps everything else sharded."""

    casts_parameters = True
    is_replicated = False
    defer_sync = True
    wrapped: FSDPModule  # type: ignore[assignment]
    shard_group: dist.ProcessGroup
    """The ranks that together hold one copy of the model."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        sync = last or not self.defer_sync
        self.wrapped.set_is_last_backward(last)
        self.wrapped.set_requires_gradient_sync(sync)
        # The all-reduce between replicas always waits for the last micro-batch: until then, only gradient shards are kept.
        self.wrapped.set_requires_all_reduce(last)
        super().backward(loss, last=last)

    def gather_full_parameters(self, *, trainable_only: bool) -> Iterator[tuple[str, Tensor | None]]:
        # Since the last gather, a hook may have resharded the model on rank 0 only (`state_dict` does so). Reshard it on all
        # ranks, so that all of them take part in the same all-gathers.
        self._after_weight_change()
        yield from super().gather_full_parameters(trainable_only=trainable_only)

    def _after_weight_change(self) -> None:
        for module in self.wrapped.modules():  # type: ignore[attr-defined]
            if isinstance(module, FSDPModule):
                module.reshard()

    def _local_part(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def _sum_squared_norm_over_ranks(self, squared: Tensor) -> Tensor:
        dist.all_reduce(squared, group=self.shard_group)
        return squared

    @property
    def _mesh(self) -> Any:
        return self.trainable[0][1].device_mesh  # type: ignore[attr-defined]

    def _local_range(self, name: str, parameter: nn.Parameter) -> LocalRange:
        assert isinstance(parameter, DTensor)
        local = parameter.to_local()
        # An empty shard may have strides that no view can flatten.
        flat = local.reshape(-1) if local.numel() == 0 else local.view(-1)
        full_shape, start = full_shape_and_start(self.step_module, name, parameter)
        return LocalRange(flat, start=start, full_numel=full_shape.numel())

    def _writes_its_ranges(self) -> bool:
        mesh = self._mesh
        return mesh.ndim == 1 or mesh.get_local_rank("replicate") == 0

    def _full_parameter(self, name: str, parameter: nn.Parameter) -> Tensor:
        """Gather the full tensor of a parameter from its shards, and from the ranks of an expert group if it holds experts.

        A parameter that is not sharded is returned as it is. All ranks must call.
        """
        tensor: Tensor = parameter
        if not isinstance(tensor, DTensor):
            return tensor
        if tensor.to_local().device != self.runtime.device:
            # Offloaded to the host: gather on the device, because NCCL can do it only there.
            tensor = tensor.to(self.runtime.device)
        full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
        share = expert_share_of_parameter(self.step_module, name)
        return full if share is None else share.gather(full)


class Fsdp2Strategy:
    """Shards on the meta device, then loads only this rank's rows."""

    def __init__(self, config: Fsdp2Config, precision: Precision, runtime: Runtime) -> None:
        self.config = config
        self.precision = precision
        self.runtime = runtime
        self.num_replicas = replica_count(config, runtime.world_size, runtime.num_hosts)
        self.expert_mesh: DeviceMesh | None = None
        """The ranks that hold the same experts, with `parallel.experts`; else None."""

    def prepare(
        self,
        step_module: nn.Module,
        *,
        source: ParameterSource,
        make_optimizer: OptimizerFactory,
        max_grad_norm: float,
    ) -> Fsdp2Engine:
        """Turn a model on meta into an engine: shard it block by block by FSDP2, load its weights, build the optimizer.

        `source`: where weights come from. `make_optimizer`: builds the optimizer of (plain name, parameter) pairs that train.
        `max_grad_norm`: to which the gradients' global norm is clipped; 0 does not clip. All ranks must call.
        """
        compute_dtype = COMPUTE_DTYPE[self.precision]
        set_parameter_dtypes(step_module, trainable=torch.float32, frozen=compute_dtype)
        apply_checkpointing_and_compile(step_module, self.config)
        shard_group = self._shard_blocks(step_module, compute_dtype)
        host_memory = open_host_memory(self.runtime, shard_group)
        if host_memory is not None:
            self._route_collectives_through_memory(host_memory, step_module)
        device = torch.device("cpu") if self.config.cpu_offload else self.runtime.device
        allocate_on_device(step_module, device)
        if self.config.cpu_offload:
            replace_buffers(step_module, lambda buffer: buffer.to(self.runtime.device))
        self._load_shards(step_module, source)
        # Pads uneven shards and pins offloaded ones. Both make new tensors, so the optimizer must be built after this.
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
        planned_defer_sync = plan_of(step_module).defer_sync
        if planned_defer_sync is None:  # nobody planned: deferred unless the user set `strategy.defer_sync=false`
            engine.defer_sync = self.config.defer_sync is not False
        else:
            engine.defer_sync = planned_defer_sync
        engine.shard_group = shard_group
        engine.host_memory = host_memory
        engine.full_parameters = FsdpFullParameters(
            step_module,
            compute_dtype,
            reshard_after_forward=self.config.reshard_after_forward,
            forward_is_collective=plan_of(step_module).expert_ranks > 1,
        )
        return engine

    def _fully_shard_policies(self, compute_dtype: torch.dtype) -> dict[str, Any]:
        """The arguments of FSDP2's `fully_shard` about types and offloading, the same for all modules.

        `compute_dtype`: the type in which blocks are gathered, unless the run is in fp32; gradients are reduced in fp32.
        """
        offload_policy: OffloadPolicy = OffloadPolicy()
        if self.config.cpu_offload:
            offload_policy = CPUOffloadPolicy(pin_memory=self.runtime.kind == "cuda")
        if self.precision is Precision.fp32:
            mixed_precision = MixedPrecisionPolicy()
        else:
            mixed_precision = MixedPrecisionPolicy(
                param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        return {"mp_policy": mixed_precision, "offload_policy": offload_policy}

    def _shard_blocks(self, step_module: nn.Module, compute_dtype: torch.dtype) -> dist.ProcessGroup:
        """Let FSDP2 shard the model on meta over the ranks: its experts, each block, and the root with embeddings, norm and head.

        What is sharded as one is gathered as one. `compute_dtype`: the type in which blocks are gathered. Returns the group of
        ranks that together hold one copy of the model. All ranks must call.
        """
        check_experts_can_be_sharded(step_module, self.runtime.world_size // self.num_replicas, self.config.name)
        mesh = shard_mesh(self.runtime.device, self.runtime, self.num_replicas)
        fully_shard_settings = self._fully_shard_policies(compute_dtype)
        self._shard_experts(step_module, fully_shard_settings)  # over a mesh of their own
        fully_shard_settings["mesh"] = mesh
        for block in units_gathered_one_at_a_time(step_module):
            fully_shard(block, reshard_after_forward=self.config.reshard_after_forward, **fully_shard_settings)
        # The root's own parameters (embeddings, norm, head) are needed first in the backward pass: keep them gathered.
        fully_shard(step_module, reshard_after_forward=False, **fully_shard_settings)
        if self.runtime.simulated:
            gather_on(step_module, self.runtime.device)  # by default on the CPU: the simulated group is not for GPUs
        with real_tensors():  # the mesh reads its ranks, which are a small tensor
            return mesh["shard"].get_group()

    def _shard_experts(self, step_module: nn.Module, fully_shard_settings: dict[str, Any]) -> None:
        """With `parallel.experts`: let this rank keep some experts of each layer, and shard those apart from their block.

        They are sharded over the ranks that hold the same experts, which are fewer than those of a block: `expert_mesh` becomes
        their mesh. Without `parallel.experts` nothing happens. `fully_shard_settings`: the arguments of `fully_shard` except the
        mesh. All ranks must call.
        """
        plan = plan_of(step_module)
        if plan.expert_ranks == 1:
            return
        modules = [step_module.get_submodule(name) for name in plan.expert_parallel_modules]
        mesh = distribute_experts(
            modules, self.runtime.device, self.runtime, num_replicas=self.num_replicas, expert_ranks=plan.expert_ranks
        )
        reshard = self.config.reshard_after_forward
        for module in modules:
            shard_experts(
                module, self.runtime.world_size, mesh=mesh, reshard_after_forward=reshard, **fully_shard_settings
            )
        self.expert_mesh = mesh

    def _route_collectives_through_memory(self, memory: HostMemory, step_module: nn.Module) -> None:
        """Let FSDP2's collectives between CPU ranks of one host go through shared memory, which is faster than gloo's sockets.

        `memory`: of the ranks that hold one copy of the model. With `parallel.experts`, modules of experts are sharded over fewer
        ranks, which get a shared memory of their own, since the other ranks do not take part in their collectives. They stay with
        gloo if there is none for them, as for a single rank. All ranks must call.
        """
        expert_memory: HostMemory | None = None
        if self.expert_mesh is not None:
            expert_memory = open_host_memory(self.runtime, self.expert_mesh["shard"].get_group())
        for module in step_module.modules():
            if not isinstance(module, FSDPModule):
                continue
            own_memory = expert_memory if hasattr(module, "expert_share") else memory
            if own_memory is not None:
                module.set_custom_all_gather(_SharedMemoryAllGather(own_memory))
                module.set_custom_reduce_scatter(_SharedMemoryReduceScatter(own_memory))

    @torch.no_grad()
    def _load_shards(self, step_module: nn.Module, source: ParameterSource) -> None:
        """Fill this rank's shard of every parameter with its initial values, reading no more than these from `source`."""
        for name, parameter in named_parameters(step_module, include_frozen_models=True):
            assert isinstance(parameter, DTensor)
            local = parameter.to_local()
            if local.numel():
                full_shape, start = full_shape_and_start(step_module, name, parameter)
                values = source.read_slice(name, full_shape, start, start + local.numel())
                local.view(-1).copy_(values)
