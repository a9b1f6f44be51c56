"""LoRA on linear layers in one autograd function: the update goes into the base output, the input is kept once.

peft computes `base(x) + B(A(x)) * scaling` as separate modules: two more passes over the output forward, one more over the
gradient of the input backward, and casts of the input under autocast. Here both are accumulated by the matrix products
themselves. Parameters, names and files stay peft's; so do all layers that do more than this (dropout, DoRA, quantised or
transposed bases, several adapters).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

ADAPTER = "default"


class _LowRankLinear(torch.autograd.Function):
    """`x @ W.T + bias + scaling * (x @ A.T) @ B.T` for a frozen W; gradients of x, A and B alone.

    x `[..., in]`, W `[out, in]`, A `[r, in]`, B `[out, r]`, all of one data type but A and B, which are cast.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        in_place: bool,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ a.to(x.dtype).T
        out = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        b_typed = b.to(x.dtype).T
        if in_place:
            out.addmm_(low, b_typed, alpha=scaling)
        else:
            out = torch.addmm(out, low, b_typed, alpha=scaling)
        ctx.save_for_backward(rows, weight, a, b, low)
        ctx.scaling = scaling
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        rows, weight, a, b, low = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, _, _ = ctx.needs_input_grad
        g = grad.reshape(-1, grad.shape[-1])
        grad_low = (g @ b.to(g.dtype)).mul_(ctx.scaling)
        grad_x = None
        if needs_x:
            grad_x = (g @ weight).addmm_(grad_low, a.to(g.dtype)).view(*grad.shape[:-1], rows.shape[-1])
        grad_a = (grad_low.T @ rows).to(a.dtype) if needs_a else None
        grad_b = (g.T @ low).mul_(ctx.scaling).to(b.dtype) if needs_b else None
        return grad_x, None, None, grad_a, grad_b, None, None


@cache
def _fused_class() -> type:
    """peft's linear layer with another forward pass; made on first use, since peft is a heavy import."""
    from peft.tuners.lora.layer import Linear

    class FusedLoraLinear(Linear):
        """As peft's layer, with the low-rank product accumulated into the base layer's output."""

        fused = True
        """It uses its children's parameters itself; engines that gather parameters module by module switch this off."""
        overwrites_output = True
        """Whether the base output may be overwritten; selective checkpointing keeps it and switches this off."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            as_usual = self.fused and not (args or kwargs or self.disable_adapters or self.merged)
            if not as_usual or self.active_adapters != [ADAPTER]:
                return super().forward(x, *args, **kwargs)
            base: Any = self.get_base_layer()
            autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
            if autocast:
                x = x.to(torch.get_autocast_dtype(x.device.type))
            weight, bias = base.weight, base.bias
            if weight.dtype != x.dtype:
                if not autocast:
                    return super().forward(x)
                weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
            a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
            scaling = self.scaling[ADAPTER]
            return _LowRankLinear.apply(x, weight, bias, a, b, scaling, self.overwrites_output)  # type: ignore[no-any-return]

    return FusedLoraLinear


def fuse_lora(model: nn.Module) -> int:
    """Give every plain LoRA layer of a PeftModel the fused forward pass, in place; how many there are. Others stay."""
    if not hasattr(model, "peft_config"):
        return 0
    from peft.tuners.lora.layer import Linear

    plain = [m for m in model.modules() if type(m) is Linear and _is_plain(m)]
    for layer in plain:
        layer.__class__ = _fused_class()
    return len(plain)


def _is_plain(layer: Any) -> bool:
    """Whether peft's layer computes `base(x) + B(A(x)) * scaling` and nothing else, on a frozen linear layer."""
    base = layer.get_base_layer()
    return (
        type(base) is nn.Linear
        and not any(p.requires_grad for p in base.parameters())
        and list(layer.lora_A) == [ADAPTER]
        and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
        and not layer.lora_variant
        and not layer.lora_bias.get(ADAPTER, False)
        and layer.lora_A[ADAPTER].bias is None
    )
