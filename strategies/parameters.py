"""Parameters on their way from the meta device to values: names, data types, materialising, filling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from strategies.base import ParameterSource, Precision

PREFIX = "model."
"""The step module holds the model under this attribute; a plain name is the rest."""
TEACHER = "teacher."
"""Under this attribute it may hold a frozen model, whose parameters keep this prefix."""

COMPUTE_DTYPE = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


def meta_context() -> AbstractContextManager[None]:
    """Build a module with its parameters on the meta device and its buffers (rotary tables, masks) real."""
    from accelerate import init_empty_weights

    return init_empty_weights(include_buffers=False)


def named_parameters(step_module: nn.Module, *, teacher: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
    """Every distinct parameter under its plain name: that of the model's own state dict. A tied one comes once.

    Those of a frozen model beside it come only with `teacher`.
    """
    for name, parameter in step_module.named_parameters():
        if teacher or not name.startswith(TEACHER):
            yield name.removeprefix(PREFIX), parameter


def element_counts(step_module: nn.Module) -> dict[str, int]:
    """Elements of the model behind each distinct parameter, whole, by plain name; a packed weight stands for more or
    fewer than it has bytes (`packed_elements` of its module says how many)."""
    counts: dict[str, int] = {}
    for name, parameter in named_parameters(step_module):
        owner, _, key = name.rpartition(".")
        packed: Any = getattr(step_module.get_submodule(PREFIX + owner), "packed_elements", {}) if owner else {}
        counts[name] = packed.get(key) or getattr(parameter, "ds_numel", parameter.numel())
    return counts


def trainable_parameters(step_module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The distinct parameters that train, under plain names, in module order."""
    return [(name, p) for name, p in named_parameters(step_module) if p.requires_grad]


def replace_parameters(module: nn.Module, make: Callable[[nn.Parameter], torch.Tensor]) -> None:
    """Replace every parameter by `make(parameter)`, keeping ties and requires_grad."""
    made: dict[int, nn.Parameter] = {}
    keep_alive = []  # an id is only unique while its object lives
    for owner in module.modules():
        for name, old in list(owner._parameters.items()):
            if old is None:
                continue
            if id(old) not in made:
                keep_alive.append(old)
                made[id(old)] = nn.Parameter(make(old), requires_grad=old.requires_grad)
            owner._parameters[name] = made[id(old)]


def set_dtypes(step_module: nn.Module, *, trainable: torch.dtype, frozen: torch.dtype) -> None:
    """Give meta parameters their storage type. Non-floating (quantised) parameters keep theirs."""

    def retyped(p: nn.Parameter) -> torch.Tensor:
        if not p.is_floating_point():
            return p.data
        return torch.empty_like(p.data, dtype=trainable if p.requires_grad else frozen)

    replace_parameters(step_module, retyped)


def materialize(step_module: nn.Module, device: torch.device) -> None:
    """Allocate meta parameters on `device`, unfilled, and move buffers there."""
    replace_parameters(step_module, lambda p: torch.empty_like(p.data, device=device) if p.is_meta else p.data)
    for owner in step_module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = buffer.to(device)


@torch.no_grad()
def fill_whole(step_module: nn.Module, source: ParameterSource) -> None:
    """Load every parameter in full (strategies that replicate)."""
    for name, parameter in named_parameters(step_module, teacher=True):
        values = source.run(name, parameter.shape, 0, parameter.numel())
        parameter.view(-1).copy_(values)
