"""LoRA on linear layers: peft's own forward pass, ours in one function a layer, and one for all layers that share an input.

    python benchmarks/training/lora_linear.py [--rounds 101]

CPU milliseconds of forward and backward over 600 tokens, one thread, in alternation, medians. `base` has no adapter. `shared`
computes `x @ A` of all layers in one product and sums the gradients of x inside the products; it is here to say what that
would save: trainers call q, k and v one after the other, so it needs outputs made before they are asked for.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
SHAPES = {"q, k, v of 384": (384, 384, 3), "gate, up of 384": (384, 1024, 2), "down to 384": (1024, 384, 1)}


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scaling: float, *parameters: Tensor) -> tuple[Tensor, ...]:
        n = len(parameters) // 3
        weights, a, b = parameters[:n], torch.cat(parameters[n : 2 * n]), parameters[2 * n :]
        low = x @ a.T
        rank = low.shape[1] // n
        outs = [x @ w.T for w in weights]
        for i, (out, up) in enumerate(zip(outs, b, strict=True)):
            out.addmm_(low[:, i * rank : (i + 1) * rank], up.T, alpha=scaling)
        ctx.save_for_backward(x, low, a, *weights, *b)
        ctx.scaling, ctx.rank = scaling, rank
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        x, low, a, *rest = ctx.saved_tensors
        n = len(grads)
        parts = low.split(ctx.rank, dim=1)
        grad_low = torch.cat([g @ up for g, up in zip(grads, rest[n:], strict=True)], dim=1).mul_(ctx.scaling)
        grad_b = [(g.T @ part).mul_(ctx.scaling) for g, part in zip(grads, parts, strict=True)]
        grad_x = grad_low @ a
        for g, weight in zip(grads, rest[:n], strict=True):
            grad_x.addmm_(g, weight)
        return grad_x, None, *[None] * n, *(grad_low.T @ x).split(ctx.rank), *grad_b


class _Layers(nn.Module):
    def __init__(self, width: int, out: int, number: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, out, bias=False).requires_grad_(False) for _ in range(number)])


def ways(width: int, out: int, number: int, dtype: torch.dtype) -> dict[str, Any]:
    """The four ways as functions of x; the tuned ones hold the same values."""
    import copy

    from peft import LoraConfig, get_peft_model

    from trainer.tuning.fast_lora import fuse_lora

    torch.manual_seed(0)
    bases = _Layers(width, out, number)
    settings = LoraConfig(r=16, lora_alpha=32, target_modules=r"layers\.\d+")
    stock: Any = get_peft_model(copy.deepcopy(bases), settings).to(dtype)  # type: ignore[arg-type]
    for name, parameter in stock.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0, 0.02)
    fused = copy.deepcopy(stock)
    assert fuse_lora(fused) == number
    bases = bases.to(dtype)
    layers = list(copy.deepcopy(stock).base_model.model.layers)
    parameters = [m.base_layer.weight for m in layers] + [m.lora_A["default"].weight for m in layers]
    parameters += [m.lora_B["default"].weight for m in layers]
    return {
        "base": lambda x: [layer(x) for layer in bases.layers],
        "peft": lambda x: [layer(x) for layer in stock.base_model.model.layers],
        "fused": lambda x: [layer(x) for layer in fused.base_model.model.layers],
        "shared": lambda x: _Shared.apply(x, 2.0, *parameters),
    }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=101)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("| layers | type | base | peft | fused | shared | peft / fused | fused / shared |")
    print("| --- " * 8 + "|")
    for (name, (width, out, number)), dtype in [
        (s, d) for s in SHAPES.items() for d in (torch.float32, torch.bfloat16)
    ]:
        found = ways(width, out, number, dtype)
        x = torch.randn(600, width, dtype=dtype, requires_grad=True)
        grads = [torch.randn(600, out, dtype=dtype) for _ in range(number)]
        expected = found["peft"](x)
        for way in ("fused", "shared"):
            assert all(
                torch.allclose(a, b, atol=1e-5 if dtype is torch.float32 else 0.1)
                for a, b in zip(found[way](x), expected, strict=True)
            )
        taken: dict[str, list[float]] = {way: [] for way in found}
        for turn in range(rounds):
            for way in list(found) if turn % 2 else list(found)[::-1]:
                begin = time.process_time()
                torch.autograd.backward(list(found[way](x)), grads)
                taken[way].append((time.process_time() - begin) * 1000)
        ms = {way: median(values) for way, values in taken.items()}
        ratios = [
            median(a / b for a, b in zip(taken[p], taken[q], strict=True))
            for p, q in (("peft", "fused"), ("fused", "shared"))
        ]
        numbers = " | ".join(f"{ms[way]:.1f}" for way in found)
        print(f"| {name} | {str(dtype)[6:]} | {numbers} | {ratios[0]:.2f} | {ratios[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
