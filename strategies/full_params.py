"""Gathers parameters on every rank for many forward passes without gradients, such as generation token by token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from strategies.base import FullParameters
from strategies.parameters import FROZEN_MODEL_PREFIXES, named_parameters


class FsdpFullParameters(FullParameters):
    """Gathers what FSDP2 has sharded; with expert parallelism, only the experts that this rank holds.

    `dtype`: the type in which FSDP2 gathers floating-point parameters.
    """

    sharded = True

    def __init__(
        self,
        wrapped: nn.Module,
        dtype: torch.dtype,
        *,
        reshard_after_forward: bool,
        forward_is_collective: bool = False,
    ) -> None:
        """Prepare to gather a model that FSDP2 has sharded; nothing is gathered yet.

        `wrapped`: the step module after `fully_shard`. `dtype`: in which floating-point parameters are gathered.
        `reshard_after_forward`: whether its blocks release their full weights after each forward pass, as set when it was
        wrapped. `forward_is_collective`: whether a pass sends tokens to other ranks all the same, because of expert
        parallelism.
        """
        self.wrapped = wrapped
        self.dtype = dtype
        self.forward_is_collective = forward_is_collective
        self.reshard_after_forward = reshard_after_forward

    def gather_bytes(self) -> int | None:
        """Bytes that all parameters of the trained model take on this rank's device once they are gathered."""
        total = 0
        for _, parameter in named_parameters(self.wrapped):
            # Packed weights are gathered as the bytes they are.
            itemsize = self.dtype.itemsize if parameter.is_floating_point() else parameter.element_size()
            total += parameter.numel() * itemsize
        return total

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """A context in which every rank has all parameters, so that forward passes need no other rank: to generate text, say.

        FSDP2's hooks, which would gather and free each block in each pass, are off inside. All ranks must enter and leave it.
        """
        from torch.distributed.fsdp import FSDPModule

        from strategies.compat.fsdp import without_fsdp_hooks

        # Without those of a teacher or of reward models: only the trained model generates answers.
        sharded_modules: list[FSDPModule] = []
        for name, module in self.wrapped.named_modules():
            if isinstance(module, FSDPModule) and not name.startswith(FROZEN_MODEL_PREFIXES):
                sharded_modules.append(module)
        root: Any = self.wrapped
        try:
            for module in sharded_modules:
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()
            # The root's own hooks may stay: what is gathered, and not to be freed after a forward pass, they leave as it is.
            with without_fsdp_hooks([module for module in sharded_modules if module is not root]):
                yield
        finally:
            for module in sharded_modules:
                module.set_reshard_after_forward(module is not root and self.reshard_after_forward, recurse=False)
                module.reshard()


class ZeroFullParameters(FullParameters):
    """Gathers what ZeRO stage 3 has partitioned. `parameter_offload`: DeepSpeed's object that manages the partitions."""

    sharded = True

    def __init__(self, step_module: nn.Module, parameter_offload: Any) -> None:
        self.step_module = step_module
        self.parameter_offload = parameter_offload

    @property
    def _parameters(self) -> list[Any]:
        return [parameter for _, parameter in named_parameters(self.step_module)]

    def gather_bytes(self) -> int | None:
        """Bytes that all parameters of the trained model take on this rank's device once they are gathered.

        None if they lie on a drive, perhaps because the host has no room for them.
        """
        total = 0
        for parameter in self._parameters:
            if getattr(parameter, "nvme_swapper", None) is not None:
                return None  # on a drive, perhaps because the host has no room for them
            total += parameter.ds_numel * parameter.ds_tensor.element_size()
        return total

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """A context in which every rank has all parameters, so that forward passes need no other rank: to generate text, say.

        DeepSpeed's coordinator, which would fetch and free parameters module by module in each pass, is idle inside. All ranks
        must enter and leave it.
        """
        import deepspeed

        # Every rank begins with everything partitioned and no gather under way.
        self.parameter_offload.partition_all_parameters()
        usual_coordinator = self.parameter_offload.param_coordinator
        try:
            with deepspeed.zero.GatheredParameters(self._parameters):
                self.parameter_offload.param_coordinator = _IdleCoordinator()
                yield
        finally:
            self.parameter_offload.param_coordinator = usual_coordinator


class _IdleCoordinator:
    """Stands in for DeepSpeed's coordinator while everything is gathered.

    The real one fetches and frees parameters module by module, and compares with other ranks which modules ran.
    """

    def reset_step(self) -> None: ...
    def trace_prologue(self, module: nn.Module) -> None: ...
    def is_record_trace(self) -> bool:
        return False

    def fetch_sub_module(self, module: nn.Module, *, forward: bool) -> None: ...
    def release_sub_module(self, module: nn.Module, *, forward: bool) -> None: ...
