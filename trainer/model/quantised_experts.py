"""Quantised weights of a layer's experts, stored expert by expert in 4 or 8 bits.

A weight `[experts, ., .]` becomes one flat tensor of bytes, expert after expert, each as `Scheme.pack` writes a
matrix of that shape. A rank therefore packs and reads only the experts that it holds. For a product, a layer's
experts are dequantised to the run's type; nothing of that is kept for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.model.config import Quantisation
from trainer.model.quantisation import (
    BLOCK_ELEMENTS,
    SCALE_BLOCK_ELEMENTS,
    Scheme,
    as_float32,
    code_values,
    scale_code_values,
)
from trainer.tuning.expert_parts import expert_modules_by_name, expert_weight_names

Shape = tuple[int, int, int]
MAX_ELEMENTS_PER_CALL = 2**31 - 1
"""Elements that bitsandbytes' kernels for GPUs count in one call; of more they would make some, and leave the rest undefined."""


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """How the weights of one module of experts are stored."""

    scheme: Scheme
    shapes: dict[str, Shape]
    """By the parameter's name in the module."""

    def unpack(self, name: str, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight `[experts, ., .]` that the bytes of `name` stand for: of as many experts as they hold."""
        matrix = self.shapes[name][1:]
        experts = packed.numel() // self.scheme.num_bytes(matrix)
        return unpack_stack(self.scheme, packed, (experts, *matrix), dtype)


def num_bytes(scheme: Scheme, shape: Shape) -> int:
    """Bytes of all experts."""
    return shape[0] * scheme.num_bytes(shape[1:])


def pack_slice(scheme: Scheme, shape: Shape, start: int, stop: int, expert: Callable[[int], Tensor]) -> Tensor:
    """Bytes `[start, stop)` of the packed weight of a layer's experts, for which only the experts in them are packed.

    `shape`: of the weight, `[experts, ., .]`. `expert(i)` returns the matrix of expert i.
    """
    expert_bytes = scheme.num_bytes(shape[1:])
    first = start // expert_bytes
    end = math.ceil(stop / expert_bytes)
    packed = [scheme.pack(expert(number)) for number in range(first, end)]
    # The empty tensor is for a rank that holds nothing.
    joined = torch.cat([torch.zeros(0, dtype=torch.uint8), *packed])
    offset = start - first * expert_bytes
    return joined[offset : offset + stop - start]


@torch.no_grad()
def unpack_stack(scheme: Scheme, packed: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    """The weight `[experts, ., .]`, on the device of `packed`; on meta its shape.

    Equal to each expert's `Scheme.unpack`, without a call for each where rows are whole blocks.
    """
    count, matrix = shape[0], (shape[1], shape[2])
    if packed.is_meta:
        return torch.empty(shape, dtype=dtype, device=packed.device)
    rows = packed.detach().view(count, -1)
    sizes = scheme.part_bytes(matrix)
    pieces = rows[:, : sum(sizes)].split(sizes, dim=1)
    if scheme.kind is Quantisation.int8:
        scales = as_float32(pieces[1].contiguous()).view(count, -1, 1) * (1.0 / 127.0)
        return (pieces[0].contiguous().view(torch.int8).view(shape) * scales).to(dtype)
    if matrix[1] % BLOCK_ELEMENTS:  # then on CPUs bitsandbytes reads a row's scales by the row's place in the whole
        return torch.stack([scheme.unpack(row, matrix, dtype) for row in rows])
    if (experts_per_call := max(1, MAX_ELEMENTS_PER_CALL // (matrix[0] * matrix[1]))) < count:
        weight = torch.empty(shape, dtype=dtype, device=packed.device)
        for part, packed_part in zip(weight.split(experts_per_call), rows.split(experts_per_call), strict=True):
            part.copy_(unpack_stack(scheme, packed_part.reshape(-1), (len(packed_part), *matrix), dtype))
        return weight
    from bitsandbytes import functional as bnb

    if scheme.is_double_quantised:
        coarse_scales = (
            as_float32(pieces[1].contiguous()).view(count, -1).repeat_interleave(SCALE_BLOCK_ELEMENTS, dim=1)
        )
        scale_codes = scale_code_values(packed.device)[pieces[3].long()]
        scales = scale_codes * coarse_scales[:, : scale_codes.shape[1]] + as_float32(pieces[2].contiguous()).view(
            count, 1
        )
    else:
        scales = as_float32(pieces[1].contiguous())
    state = bnb.QuantState(
        absmax=scales.reshape(-1),
        shape=torch.Size((count * matrix[0], matrix[1])),
        code=code_values(str(scheme.kind), packed.device),
        blocksize=BLOCK_ELEMENTS,
        quant_type=str(scheme.kind),
        dtype=dtype,
    )
    return bnb.dequantize_4bit(pieces[0].reshape(-1, 1), state).view(shape)


def round_trip_stack(scheme: Scheme, weight: Tensor) -> Tensor:
    """What the model computes with in the place of `weight [experts, ., .]`, float32."""
    return torch.stack([scheme.round_trip(expert) for expert in weight])


def quantise_experts(
    model: nn.Module, scheme: Scheme, *, kept_in_float32: set[str], base_name: Callable[[str], str]
) -> dict[str, Shape]:
    """Replace the frozen weights of experts by packed bytes (uint8), in place, on meta; returns their old shapes by base name.

    Experts stay as they are if they train, if they compute in a way of their own, or if a part of their name (between dots) is in
    `kept_in_float32`.
    """
    shape_by_name: dict[str, Shape] = {}
    modules: dict[str, Any] = dict(expert_modules_by_name(model))
    for name, module in modules.items():
        parameters = {key: getattr(module, key) for key in expert_weight_names(module)}
        trains = any(parameter.requires_grad for parameter in parameters.values())
        if trains or kept_in_float32 & set(name.split(".")):
            continue
        shapes: dict[str, Shape] = {key: tuple(p.shape) for key, p in parameters.items()}  # type: ignore[misc]
        module.packed_experts = PackedExperts(scheme, shapes)
        module.packed_elements = {key: p.numel() for key, p in parameters.items()}
        for key, shape in shapes.items():
            packed = torch.empty(num_bytes(scheme, shape), dtype=torch.uint8, device="meta")
            setattr(module, key, nn.Parameter(packed, requires_grad=False))
            shape_by_name[base_name(f"{name}.{key}")] = shape
    return shape_by_name
