"""Gathers parameters on every rank for many forward passes without gradients, such as generation token by token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from strategies.base import FullParameters
from strategies.parameters import TEACHER, named_parameters


class FsdpFullParameters(FullParameters):
    """What FSDP2 has sharded. `dtype`: the type in which parameters are gathered."""

    sharded = True

    def __init__(self, wrapped: nn.Module, dtype: torch.dtype, *, reshard_after_forward: bool) -> None:
        self.wrapped, self.dtype, self.reshard_after_forward = wrapped, dtype, reshard_after_forward

    def gather_bytes(self) -> int | None:
        return sum(
            p.numel() * (self.dtype.itemsize if p.is_floating_point() else p.element_size())
            for _, p in named_parameters(self.wrapped)
        )

    @contextmanager
    def gathered(self) -> Iterator[None]:
        from torch.distributed.fsdp import FSDPModule

        from strategies.compat.fsdp import without_fsdp_hooks

        fsdp_modules = [
            (name, module) for name, module in self.wrapped.named_modules() if isinstance(module, FSDPModule)
        ]
        student_parts = [module for name, module in fsdp_modules if not name.startswith(TEACHER)]
        root: Any = self.wrapped
        try:
            for part in student_parts:
                part.set_reshard_after_forward(False, recurse=False)
                part.unshard()
            with without_fsdp_hooks([part for part in student_parts if part is not root]):
                yield
        finally:
            for part in student_parts:
                part.set_reshard_after_forward(part is not root and self.reshard_after_forward, recurse=False)
                part.reshard()


class ZeroFullParameters(FullParameters):
    """What ZeRO stage 3 has partitioned; `offload` is DeepSpeed's keeper of its parameters."""

    sharded = True

    def __init__(self, step_module: nn.Module, offload: Any) -> None:
        self.step_module, self.parameter_offload = step_module, offload

    @property
    def _parameters(self) -> list[Any]:
        return [p for _, p in named_parameters(self.step_module)]

    def gather_bytes(self) -> int | None:
        if any(getattr(p, "nvme_swapper", None) is not None for p in self._parameters):
            return None  # they may be on a drive since the host has no room for them
        return sum(p.ds_numel * p.ds_tensor.element_size() for p in self._parameters)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        import deepspeed

        self.parameter_offload.partition_all_parameters()  # the same beginning on every rank, with nothing under way
        usual_coordinator = self.parameter_offload.param_coordinator
        try:
            with deepspeed.zero.GatheredParameters(self._parameters):
                self.parameter_offload.param_coordinator = _IdleCoordinator()
                yield
        finally:
            self.parameter_offload.param_coordinator = usual_coordinator


class _IdleCoordinator:
    """Stands in for DeepSpeed's coordinator, which fetches and frees by module and compares with other ranks what ran."""

    def reset_step(self) -> None: ...
    def trace_prologue(self, module: nn.Module) -> None: ...
    def is_record_trace(self) -> bool:
        return False

    def fetch_sub_module(self, module: nn.Module, *, forward: bool) -> None: ...
    def release_sub_module(self, module: nn.Module, *, forward: bool) -> None: ...
