"""Lists the tensors of an engine by kind: parameters, gradients, optimizer state, gathered parameters, buffers."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from strategies.base import Engine
from strategies.compat.deepspeed import zero_optimizer_tensors
from strategies.compat.dispatch import local_part


class MemoryKind(StrEnum):
    """What memory is used for."""

    parameters = "parameters"
    gradients = "gradients"
    optimizer = "optimizer"
    gathered = "gathered"
    """Parameters that were gathered from other ranks, while they are needed, and copies in the compute type."""
    communication = "communication"
    """Buffers that collectives read and write."""
    activations = "activations"
    """What the forward pass saves for the backward pass, and temporary tensors of both."""
    logits = "logits"
    """Logits, and their gradients."""
    other = "other"


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a distributed tensor; any other tensor as it is."""
    while isinstance(tensor, DTensor):
        tensor = local_part(tensor)
    return tensor


def engine_tensors(engine: Engine) -> Iterator[tuple[MemoryKind, Tensor]]:
    """List all tensors that `engine` keeps at this moment as (kind of memory, tensor): weights, gradients, optimizer state, ...

    A simulation counts live bytes by kind with it. Tensors may share a storage: the last kind that comes for it counts.
    """
    module = engine.step_module
    for tensor in (*module.parameters(), *module.buffers()):
        yield MemoryKind.parameters, local_tensor(tensor)
    for parameter in module.parameters():
        if parameter.grad is not None:
            yield MemoryKind.gradients, local_tensor(parameter.grad)
    # Storages that FSDP2 and DeepSpeed gather into are those of parameters for a while: these kinds come later, and count.
    yield from _fsdp_tensors(module)
    yield from _deepspeed_tensors(engine)
    optimizer: Any = getattr(engine, "optimizer", None)
    if optimizer is not None:
        yield from _optimizer_states(optimizer)
    weight_average: Any = getattr(engine, "weight_average", None)
    if weight_average is not None:
        for tensor in weight_average.averages:
            yield MemoryKind.optimizer, local_tensor(tensor)


def _optimizer_states(optimizer: Any) -> Iterator[tuple[MemoryKind, Tensor]]:
    for state in optimizer.state.values():
        for entry in state.values():
            if torch.is_tensor(entry):
                yield MemoryKind.optimizer, local_tensor(entry)


def _fsdp_tensors(module: nn.Module) -> Iterator[tuple[MemoryKind, Tensor]]:
    """What FSDP2 keeps beside the parameters that modules show."""
    from strategies.compat.fsdp import fsdp_internal_tensors

    for kind, tensor in fsdp_internal_tensors(module):
        yield MemoryKind(kind), local_tensor(tensor)


def _deepspeed_tensors(engine: Any) -> Iterator[tuple[MemoryKind, Tensor]]:
    """List what DeepSpeed keeps: gathered parameters, this rank's partitions, and what is inside its optimizer.

    Nothing for engines without DeepSpeed. A parameter that is not gathered now is empty, and adds no bytes.
    """
    # DeepSpeed's own engine is the attribute `engine` of ours.
    zero_optimizer = getattr(getattr(engine, "engine", None), "optimizer", None)
    if zero_optimizer is None:
        return
    for parameter in engine.step_module.parameters():
        if hasattr(parameter, "ds_tensor"):
            yield MemoryKind.gathered, parameter
            yield MemoryKind.parameters, parameter.ds_tensor
    yield from _optimizer_states(zero_optimizer.optimizer)
    for kind, tensor in zero_optimizer_tensors(zero_optimizer):
        yield MemoryKind(kind), local_tensor(tensor)
