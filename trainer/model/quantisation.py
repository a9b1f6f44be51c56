"""Quantised bases: frozen layers in 4 or 8 bits, computed with in the type of the run (experts: `quantised_experts.py`).

The numbers are bitsandbytes' own (its `quantize_4bit` and `int8_vectorwise_quant`), the layer is not: everything a weight
consists of, codes and scales, lies in one flat tensor of bytes under the weight's own name. Strategies then load, shard,
gather and free it like any other parameter, and no state lies beside it that sharding could lose. Nothing ever changes the
bytes: bitsandbytes' own layer packs its weight anew in eval mode on CPUs with bf16 instructions, after which a sharded
weight, gathered again, is read in the wrong layout.

QLoRA: Dettmers et al. 2023, arXiv:2305.14314. Row-wise int8: Dettmers et al. 2022, arXiv:2208.07339, for weights only:
activations are not rounded, which is what bitsandbytes trains with on CPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strategies.errors import ConfigError
from strategies.simulation import cached_tensor
from trainer.model.compat import names_kept_in_float32
from trainer.model.config import Quantisation
from trainer.model.rules import missing_package

BLOCK_ELEMENTS = 64
"""Consecutive elements of a 4-bit weight that share a scale."""
SCALE_BLOCK_ELEMENTS = 256
"""Consecutive scales that share a scale, with double quantisation."""
INT8_STEP = 1.0 / 127.0
"""An int8 code is the share of its row's largest absolute value (the scale), in steps of this."""
ALIGNMENT_BYTES = 16
"""Bytes to which the whole is padded, so that any shard of it starts at a whole element."""
NOTABLE_SHARE = 0.05
"""Share of a model's parameters that are not stored quantised, from which on it is said."""


@dataclass(frozen=True, slots=True)
class QuantisationScheme:
    """How a weight `[out, in]` becomes bytes and back; what it makes depends on the values alone, not on the device."""

    kind: Quantisation
    is_double_quantised: bool = True
    """Whether the scales of 4-bit blocks are quantised too (to 8 bits)."""

    @classmethod
    def from_settings(cls, kind: Quantisation, is_double_quantised: bool) -> QuantisationScheme | None:
        """The scheme of these settings, None where nothing is quantised."""
        return None if kind is Quantisation.none else cls(kind, is_double_quantised)

    def __str__(self) -> str:
        nested = self.kind is not Quantisation.int8 and self.is_double_quantised
        return f"{self.kind}{' with double quantisation' if nested else ''}"

    def num_bytes_of_parts(self, shape: tuple[int, int]) -> list[int]:
        """Bytes of each part of a quantised weight of this shape, in the order in which they lie:

        - int8: codes (a byte an element), scales (float32, one a row).
        - 4 bits: codes (two elements a byte), scales (float32, one a block).
        - 4 bits with double quantisation: codes, scales of the scales (float32), an offset (one float32), scales (a byte a
          block).
        """
        num_elements = shape[0] * shape[1]
        if self.kind is Quantisation.int8:
            return [num_elements, 4 * shape[0]]
        code_bytes = math.ceil(num_elements / 2)
        num_scales = math.ceil(num_elements / BLOCK_ELEMENTS)
        if not self.is_double_quantised:
            return [code_bytes, 4 * num_scales]
        num_scales_of_scales = math.ceil(num_scales / SCALE_BLOCK_ELEMENTS)
        return [code_bytes, 4 * num_scales_of_scales, 4, num_scales]

    def num_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of the whole, padding included."""
        return math.ceil(sum(self.num_bytes_of_parts(shape)) / ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    @torch.no_grad()
    def quantise(self, weight: Tensor) -> Tensor:
        """Quantise a weight `[out, in]`: its codes, then its scales, then zeros up to `num_bytes`, as uint8 `[num_bytes]`.

        Done on the CPU, where the same values always give the same bytes.
        """
        from bitsandbytes import functional as bnb

        weight = weight.cpu().contiguous()
        if self.kind is Quantisation.int8:
            # bitsandbytes quantises float16 alone to int8.
            codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
            pieces = [codes, scales]
        else:
            codes, state = bnb.quantize_4bit(
                weight.float(),
                blocksize=BLOCK_ELEMENTS,
                compress_statistics=self.is_double_quantised,
                quant_type=str(self.kind),
            )
            pieces = [codes, state.absmax]
            if self.is_double_quantised:
                # With double quantisation `absmax` is the 8-bit codes of the scales, and `state2` their own scales.
                pieces = [codes, state.state2.absmax, state.offset, state.absmax]
        flat = [piece.reshape(-1).contiguous().view(torch.uint8) for piece in pieces]
        sizes = [len(piece) for piece in flat]
        shape = (weight.shape[0], weight.shape[1])
        assert sizes == self.num_bytes_of_parts(shape)
        # Zeros up to a multiple of `ALIGNMENT_BYTES`.
        padding = torch.zeros(self.num_bytes(shape) - sum(sizes), dtype=torch.uint8)
        return torch.cat([*flat, padding])

    @torch.no_grad()
    def dequantise(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Make the weight `[out, in]` of `shape` that the bytes `packed` stand for, in `dtype`, on their device.

        An empty one on meta. It is rounded: `quantise` has made the bytes of a weight that had more bits.
        """
        from bitsandbytes import functional as bnb

        if packed.is_meta:
            return torch.empty(shape, dtype=dtype, device=packed.device)
        part_sizes = self.num_bytes_of_parts(shape)
        without_padding = packed.detach()[: sum(part_sizes)]
        parts = without_padding.split(part_sizes)  # `num_bytes_of_parts` says which they are
        codes = parts[0]
        if self.kind is Quantisation.int8:
            row_scales = as_float32(parts[1])[:, None] * INT8_STEP
            return (codes.view(torch.int8).view(shape) * row_scales).to(dtype)
        if self.is_double_quantised:
            _, scales_of_scales, offset, quantised_scales = parts
            block_scales = quantised_scales.contiguous()
            nested: dict[str, Any] = {
                "offset": as_float32(offset)[0],
                "state2": bnb.QuantState(
                    absmax=as_float32(scales_of_scales),
                    blocksize=SCALE_BLOCK_ELEMENTS,
                    code=scale_code_values(packed.device),
                    dtype=torch.float32,
                ),
            }
        else:
            block_scales = as_float32(parts[1])
            nested = {}
        state = bnb.QuantState(
            absmax=block_scales,
            shape=torch.Size(shape),
            code=code_values(str(self.kind), packed.device),
            blocksize=BLOCK_ELEMENTS,
            quant_type=str(self.kind),
            dtype=dtype,
            **nested,
        )
        return bnb.dequantize_4bit(codes.contiguous()[:, None], state)

    def round_trip(self, weight: Tensor) -> Tensor:
        """The rounded values that the model computes with in the place of `weight [out, in]`, float32."""
        shape = (weight.shape[0], weight.shape[1])
        return self.dequantise(self.quantise(weight), shape, torch.float32)


def as_float32(raw_bytes: Tensor) -> Tensor:
    """The float32 numbers that a tensor of bytes holds, four bytes each."""
    # A copy: within a shared buffer the bytes may start anywhere.
    return raw_bytes.clone().view(torch.float32)


@cached_tensor
def code_values(kind: str, device: torch.device) -> Tensor:
    """The number that each of the 16 codes of a 4-bit weight stands for. `kind`: `nf4` or `fp4`."""
    from bitsandbytes import functional as bnb

    return bnb.get_4bit_type(kind, device=device)


@cached_tensor
def scale_code_values(device: torch.device) -> Tensor:
    """The number that each of the 256 codes of a scale stands for, with double quantisation."""
    from bitsandbytes import functional as bnb

    return bnb.create_dynamic_map().to(device)


class _QuantisedProduct(torch.autograd.Function):
    """`x @ weight.T` with a weight made for the moment, in the forward pass and again in the backward pass.

    What is kept between the two is the parameter itself: an engine that frees it meanwhile gathers it again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scheme: QuantisationScheme, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.settings = scheme, shape
        return F.linear(x, scheme.dequantise(packed, shape, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (packed,) = ctx.saved_tensors
        scheme, shape = ctx.settings
        return grad @ scheme.dequantise(packed, shape, grad.dtype), None, None, None


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose `weight` is the bytes of `QuantisationScheme.quantise`, `[num_bytes]` uint8."""

    scheme: QuantisationScheme
    packed_elements: dict[str, int]
    """How many elements of the model a parameter of this layer stands for."""

    @classmethod
    def of_linear(cls, layer: nn.Linear, scheme: QuantisationScheme) -> QuantisedLinear:
        """Make the quantised layer that replaces `layer`: its weight is bytes on meta, to be filled later; it keeps bias and
        hooks.
        """
        # Without `__init__`, which would make new parameters and forget what others have set on the layer.
        quantised = cls.__new__(cls)
        quantised.__dict__.update(layer.__dict__)
        quantised._parameters = dict(layer._parameters)
        quantised.scheme = scheme
        quantised.packed_elements = {"weight": layer.in_features * layer.out_features}
        num_bytes = scheme.num_bytes((layer.out_features, layer.in_features))
        packed = torch.empty(num_bytes, dtype=torch.uint8, device="meta")
        quantised.weight = nn.Parameter(packed, requires_grad=False)
        return quantised

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`, in the type of `x`, or that of autocast."""
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out = _QuantisedProduct.apply(x, self.weight, self.scheme, self.shape)
        return out if self.bias is None else out + self.bias.to(out.dtype)


def quantise_layers(
    model: nn.Module,
    scheme: QuantisationScheme,
    *,
    output_head: nn.Module | None,
    kept_prefixes: tuple[str, ...],
    base_name: Callable[[str], str],
) -> dict[str, tuple[int, ...]]:
    """Replace the frozen linear layers of a tuned model on meta by quantised ones, in place (QLoRA).

    Returns their old shapes by base name. Not replaced: `output_head`, modules under `kept_prefixes`, and those that the
    architecture keeps in float32 (T5's `wo`). The latter stay as transformers leaves them: their blocks convert activations to
    the type of the stored weight. `base_name`: gives the name of a parameter in the model before tuning.

    Raises ConfigError if nothing can be replaced, or if a package is missing.
    """
    missing = missing_package()
    if missing is not None:
        raise ConfigError(f"model.quantisation={scheme.kind}: {missing}, or set model.quantisation=none")
    shapes: dict[str, tuple[int, ...]] = {}
    kept_in_float32 = names_kept_in_float32(model)
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or module is output_head or _trains(name, module):
            continue
        weight = base_name(f"{name}.weight")
        is_replaced = weight in shapes  # under another name of the same base weight
        if kept_in_float32 & set(name.split(".")) or is_replaced or weight.startswith(kept_prefixes):
            continue
        parent, _, key = name.rpartition(".")
        quantised = QuantisedLinear.of_linear(module, scheme)
        setattr(model.get_submodule(parent), key, quantised)
        shapes[weight] = quantised.shape
    if not shapes:
        raise ConfigError(
            f"model.quantisation={scheme.kind}: this architecture has no linear layers of the kind that is quantised here "
            "(GPT-2's are convolutions); set model.quantisation=none"
        )
    return shapes


def unquantised_note(meta_model: nn.Module, uncounted_names: set[str]) -> str | None:
    """A note for the user on the matrices that stay unquantised, with their size and the largest of them; None if they are few.

    `meta_model`: the model before it is quantised. `uncounted_names`: of its parameters that do not count: quantised ones,
    and those that are meant to stay as they are. "Few": less than `NOTABLE_SHARE` of all parameters.
    """
    sizes = {}
    for name, parameter in meta_model.named_parameters():
        if parameter.dim() > 1 and name not in uncounted_names and not name.endswith("bias"):
            sizes[name] = parameter.numel()
    num_unquantised = sum(sizes.values())
    share = num_unquantised / sum(parameter.numel() for parameter in meta_model.parameters())
    if share < NOTABLE_SHARE:
        return None
    largest = max(sizes, key=lambda name: sizes[name])
    return (
        f"linear layers, and experts that compute by transformers' interface: {num_unquantised:,} parameters ({share:.0%}) stay "
        f"as they are, {num_unquantised * 2 / 2**30:.2f} GiB in 16 bits ({largest} the largest)"
    )


def _trains(name: str, module: nn.Module) -> bool:
    """Whether a layer is an adapter's own, or one that is trained in full (and its original)."""
    name_parts = name.split(".")
    is_trained_in_full = "modules_to_save" in name_parts or "original_module" in name_parts
    return is_trained_in_full or any(p.requires_grad for p in module.parameters())
