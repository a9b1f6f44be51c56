"""Quantised weights of a layer's experts, stored expert by expert in 4 or 8 bits.

A weight `[experts, ., .]` becomes one flat tensor of bytes, expert after expert, each as `QuantisationScheme.quantise` writes a
matrix of that shape. A rank therefore quantises and reads only the experts that it holds. For a product, a layer's
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
    INT8_STEP,
    SCALE_BLOCK_ELEMENTS,
    QuantisationScheme,
    as_float32,
    code_values,
    scale_code_values,
)
from trainer.tuning.expert_parts import expert_modules_by_name, expert_weight_names

Shape = tuple[int, int, int]
"""Of a weight: (experts, rows, columns)."""
MAX_ELEMENTS_PER_CALL = 2**31 - 1
"""Elements that bitsandbytes' kernels for GPUs count in one call; of more they would make some, and leave the rest undefined."""


@dataclass(frozen=True, slots=True)
class QuantisedExperts:
    """How the weights of one module of experts are stored."""

    scheme: QuantisationScheme
    shapes: dict[str, Shape]
    """By the parameter's name in the module."""

    def dequantise(self, name: str, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """Dequantise the weight `[experts, ., .]` that the bytes `packed` of the parameter `name` stand for.

        `packed` may hold some of the layer's experts, as the shard of a rank does; the result then has as many.
        """
        matrix = self.shapes[name][1:]
        experts = packed.numel() // self.scheme.num_bytes(matrix)
        return dequantise_experts(self.scheme, packed, (experts, *matrix), dtype)


def num_bytes(scheme: QuantisationScheme, shape: Shape) -> int:
    """Bytes of all experts."""
    return shape[0] * scheme.num_bytes(shape[1:])


def quantise_experts_slice(
    scheme: QuantisationScheme, shape: Shape, start: int, stop: int, read_expert: Callable[[int], Tensor]
) -> Tensor:
    """Quantise a rank's shard of a layer's experts: bytes `[start, stop)` of the quantised weight.

    Reads only the experts in them. The shard may begin and end within an expert. `shape`: of the weight, (experts, rows,
    columns). `read_expert(i)` returns the matrix of expert i. An empty uint8 tensor for an empty range.
    """
    expert_bytes = scheme.num_bytes(shape[1:])
    first_expert = start // expert_bytes
    end_expert = math.ceil(stop / expert_bytes)
    packed = [scheme.quantise(read_expert(expert)) for expert in range(first_expert, end_expert)]
    # The empty tensor is for a rank that holds nothing.
    joined = torch.cat([torch.zeros(0, dtype=torch.uint8), *packed])
    offset = start - first_expert * expert_bytes
    return joined[offset : offset + stop - start]


@torch.no_grad()
def dequantise_experts(scheme: QuantisationScheme, packed: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Dequantise a weight `[experts, ., .]` of `shape` from its bytes `packed`, on their device; on meta an empty one.

    Equal to each expert's `QuantisationScheme.dequantise`, but without a call for each where rows are whole blocks. An expert's
    bytes are int8 codes and a scale for each row, or 4-bit codes and scales of blocks.
    """
    num_experts, matrix = shape[0], (shape[1], shape[2])
    if packed.is_meta:
        return torch.empty(shape, dtype=dtype, device=packed.device)
    expert_bytes = packed.detach().view(num_experts, -1)
    part_sizes = scheme.num_bytes_of_parts(matrix)
    parts = expert_bytes[:, : sum(part_sizes)].split(part_sizes, dim=1)  # each [experts, bytes], without the padding
    if scheme.kind is Quantisation.int8:
        codes, row_scales = parts
        scales = as_float32(row_scales.contiguous()).view(num_experts, -1, 1) * INT8_STEP
        return (codes.contiguous().view(torch.int8).view(shape) * scales).to(dtype)
    if matrix[1] % BLOCK_ELEMENTS:  # then on CPUs bitsandbytes reads a row's scales by the row's place in the whole
        return torch.stack([scheme.dequantise(packed_expert, matrix, dtype) for packed_expert in expert_bytes])
    # bitsandbytes takes a limited number of elements in one call.
    experts_per_call = max(1, MAX_ELEMENTS_PER_CALL // (matrix[0] * matrix[1]))
    if experts_per_call < num_experts:
        weight = torch.empty(shape, dtype=dtype, device=packed.device)
        for part, packed_part in zip(weight.split(experts_per_call), expert_bytes.split(experts_per_call), strict=True):
            part.copy_(dequantise_experts(scheme, packed_part.reshape(-1), (len(packed_part), *matrix), dtype))
        return weight
    from bitsandbytes import functional as bnb

    codes = parts[0]
    state = bnb.QuantState(
        absmax=_block_scales(scheme, parts).reshape(-1),
        shape=torch.Size((num_experts * matrix[0], matrix[1])),
        code=code_values(str(scheme.kind), packed.device),
        blocksize=BLOCK_ELEMENTS,
        quant_type=str(scheme.kind),
        dtype=dtype,
    )
    return bnb.dequantize_4bit(codes.reshape(-1, 1), state).view(shape)


def _block_scales(scheme: QuantisationScheme, parts: tuple[Tensor, ...]) -> Tensor:
    """The scales by which 4-bit codes are multiplied, one a block of codes, for all experts: float32 `[experts, blocks]`.

    `parts`: as in `num_bytes_of_parts`, each `[experts, bytes]`. With double quantisation a scale is the value of its 8-bit
    code, times the scale of its group of scales, plus an offset.
    """
    if not scheme.is_double_quantised:
        return as_float32(parts[1].contiguous())
    _, scales_of_scales, offsets, scale_codes = parts
    num_experts = len(scale_codes)
    group_scales = as_float32(scales_of_scales.contiguous()).view(num_experts, -1)
    group_scales = group_scales.repeat_interleave(SCALE_BLOCK_ELEMENTS, dim=1)
    values = scale_code_values(scale_codes.device)[scale_codes.long()]
    return values * group_scales[:, : values.shape[1]] + as_float32(offsets.contiguous()).view(num_experts, 1)


def round_trip_experts(scheme: QuantisationScheme, weight: Tensor) -> Tensor:
    """What the model computes with in the place of `weight [experts, ., .]`, float32."""
    return torch.stack([scheme.round_trip(expert) for expert in weight])


def quantise_experts(
    model: nn.Module, scheme: QuantisationScheme, *, kept_in_float32: set[str], base_name: Callable[[str], str]
) -> dict[str, Shape]:
    """Replace the frozen weights of experts by quantised bytes (uint8), in place, on meta; returns old shapes by base name.

    Values are quantised later, when a rank reads its shard. Experts stay as they are if they train, if a part of their name
    (between dots) is in `kept_in_float32`, or if their module computes in a way of its own, so that `expert_modules_by_name`
    leaves it out.

    `base_name`: gives the name of a parameter in the model before tuning, as its files have it.
    """
    shape_by_name: dict[str, Shape] = {}
    modules: dict[str, Any] = dict(expert_modules_by_name(model))
    for name, module in modules.items():
        parameters = {key: getattr(module, key) for key in expert_weight_names(module)}
        trains = any(parameter.requires_grad for parameter in parameters.values())
        if trains or kept_in_float32 & set(name.split(".")):
            continue
        shapes: dict[str, Shape] = {key: tuple(p.shape) for key, p in parameters.items()}  # type: ignore[misc]
        module.packed_experts = QuantisedExperts(scheme, shapes)
        # By this, counts of the model's parameters count elements and not bytes.
        module.packed_elements = {key: p.numel() for key, p in parameters.items()}
        for key, shape in shapes.items():
            packed = torch.empty(num_bytes(scheme, shape), dtype=torch.uint8, device="meta")
            setattr(module, key, nn.Parameter(packed, requires_grad=False))
            shape_by_name[base_name(f"{name}.{key}")] = shape
    return shape_by_name
