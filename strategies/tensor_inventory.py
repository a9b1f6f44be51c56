"""Which tensors an engine keeps, and as what: parameters, gradients, optimizer state, gathered parameters, buffers."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from strategies.base import Engine


class MemoryKind(StrEnum):
    """What bytes are for."""

    parameters = "parameters"
    gradients = "gradients"
    optimizer = "optimizer"
    gathered = "gathered"
    """Parameters of other ranks, while they are needed, and copies in the compute type."""
    communication = "communication"
    """Buffers that collectives read and write."""
    activations = "activations"
    """What the forward pass leaves for the backward pass, and what either makes on its way."""
    logits = "logits"
    """What the output head makes: logits, and gradients of them."""
    other = "other"


def plain(tensor: Tensor) -> Tensor:
    """This rank's part of a distributed tensor; any other as it is."""
    while isinstance(tensor, DTensor):
        tensor = tensor._local_tensor
    return tensor


def owned(engine: Engine) -> Iterator[tuple[MemoryKind, Tensor]]:
    """(kind, tensor) of what `engine` keeps at this moment; a later one for the same storage counts."""
    module = engine.step_module
    yield from ((MemoryKind.parameters, plain(t)) for t in (*module.parameters(), *module.buffers()))
    for parameter in module.parameters():
        if parameter.grad is not None:
            yield MemoryKind.gradients, plain(parameter.grad)
    yield from _sharded(module)
    yield from _partitioned(engine)
    optimizer: Any = getattr(engine, "optimizer", None)
    if optimizer is not None:
        yield from _states(optimizer)
    if (average := getattr(engine, "average", None)) is not None:
        yield from ((MemoryKind.optimizer, plain(value)) for value in average.values)


def _states(optimizer: Any) -> Iterator[tuple[MemoryKind, Tensor]]:
    for state in optimizer.state.values():
        yield from ((MemoryKind.optimizer, plain(value)) for value in state.values() if torch.is_tensor(value))


def _sharded(module: Any) -> Iterator[tuple[MemoryKind, Tensor]]:
    """What FSDP2 keeps beside the parameters that a module shows."""
    from torch.distributed.fsdp import FSDPModule

    for each in module.modules():
        if not isinstance(each, FSDPModule):
            continue
        for group in each._get_fsdp_state()._fsdp_param_groups:
            for reduced in getattr(group.comm_ctx, "reduce_scatter_states", ()):  # none before the first pass
                yield MemoryKind.communication, reduced.reduce_scatter_input
            for parameter in group.fsdp_params:
                yield from ((MemoryKind.gathered, t) for t in parameter.all_gather_outputs)
                yield MemoryKind.parameters, parameter._sharded_param_data
                whole = getattr(parameter, "_unsharded_param", None)
                if whole is not None:
                    yield MemoryKind.gathered, plain(whole)
                    if whole.grad is not None:
                        yield MemoryKind.gradients, plain(whole.grad)
                if parameter.unsharded_accumulated_grad is not None:
                    yield MemoryKind.gradients, plain(parameter.unsharded_accumulated_grad)
                if parameter.sharded_param.grad is not None:
                    yield MemoryKind.gradients, plain(parameter.sharded_param.grad)


def _partitioned(engine: Any) -> Iterator[tuple[MemoryKind, Tensor]]:
    """What DeepSpeed keeps."""
    inner = getattr(getattr(engine, "engine", None), "optimizer", None)
    if inner is None:
        return
    for parameter in engine.step_module.parameters():
        if hasattr(parameter, "ds_tensor"):
            yield MemoryKind.gathered, parameter
            yield MemoryKind.parameters, parameter.ds_tensor
    yield from _states(inner.optimizer)
    for kind, names in _KEPT.items():
        for name in names:
            yield from ((kind, t) for t in _tensors(getattr(inner, name, None)))


_KEPT = {
    MemoryKind.parameters: ("bit16_groups_flat", "bf16_groups_flat", "fp16_partitioned_groups_flat"),
    MemoryKind.optimizer: (
        "single_partition_of_fp32_groups",
        "fp32_groups_flat_partition",
        "fp32_partitioned_groups_flat",
    ),
    MemoryKind.gradients: (
        "averaged_gradients",
        "fp32_groups_gradients_flat",
        "fp32_groups_gradient_flat_partition",
        "grad_partitions_flat_buffer",
        "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition",
        "temp_grad_gpu_buffer",
        "averaged_gradients",
    ),
    MemoryKind.communication: ("ipg_buckets", "_DeepSpeedZeroOptimizer_Stage3__ipg_bucket_flat_buffer", "ipg_buffer"),
}
"""Attributes of DeepSpeed's optimizers, tensors or collections of them, by what they hold."""


def _tensors(value: Any) -> Iterator[Tensor]:
    if torch.is_tensor(value):
        yield plain(value)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif hasattr(value, "buffer"):  # a bucket
        yield from _tensors(value.buffer)
