"""Lists the tensors of an engine by kind: parameters, gradients, optimizer state, gathered parameters, buffers."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from strategies.base import Engine
from strategies.compat.deepspeed import tensors_of_optimizer
from strategies.compat.dispatch import local_part


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


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a distributed tensor; any other as it is."""
    while isinstance(tensor, DTensor):
        tensor = local_part(tensor)
    return tensor


def engine_tensors(engine: Engine) -> Iterator[tuple[MemoryKind, Tensor]]:
    """(kind, tensor) of what `engine` keeps at this moment; a later one for the same storage counts."""
    module = engine.step_module
    yield from ((MemoryKind.parameters, local_tensor(t)) for t in (*module.parameters(), *module.buffers()))
    for parameter in module.parameters():
        if parameter.grad is not None:
            yield MemoryKind.gradients, local_tensor(parameter.grad)
    yield from _sharded(module)
    yield from _partitioned(engine)
    optimizer: Any = getattr(engine, "optimizer", None)
    if optimizer is not None:
        yield from _states(optimizer)
    if (average := getattr(engine, "average", None)) is not None:
        yield from ((MemoryKind.optimizer, local_tensor(value)) for value in average.averages)


def _states(optimizer: Any) -> Iterator[tuple[MemoryKind, Tensor]]:
    for state in optimizer.state.values():
        yield from ((MemoryKind.optimizer, local_tensor(value)) for value in state.values() if torch.is_tensor(value))


def _sharded(module: nn.Module) -> Iterator[tuple[MemoryKind, Tensor]]:
    """What FSDP2 keeps beside the parameters that a module shows."""
    from strategies.compat.fsdp import hidden_tensors

    yield from ((MemoryKind(kind), local_tensor(tensor)) for kind, tensor in hidden_tensors(module))


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
    yield from ((MemoryKind(kind), local_tensor(tensor)) for kind, tensor in tensors_of_optimizer(inner))
