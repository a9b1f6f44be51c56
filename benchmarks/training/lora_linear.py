"""LoRA on linear layers: peft's own forward pass, ours in one function a layer, and one for all layers that share an input.

    python benchmarks/training/lora_linear.py [--rounds 101]

CPU milliseconds of forward and backward over 600 tokens, one thread, in alternation, medians. `base` has no adapter, `fused`
is one function a layer, `shared` one for all layers over the same input: what the trainer runs. `--matmul blas` leaves the
products with torch's BLAS where the trainer would take oneDNN.
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
NAMES = {3: ("q_proj", "k_proj", "v_proj"), 2: ("gate_proj", "up_proj"), 1: ("down_proj",)}


class _Layers(nn.Module):
    def __init__(self, width: int, out: int, number: int) -> None:
        super().__init__()
        for name in NAMES[number]:
            setattr(self, name, nn.Linear(width, out, bias=False).requires_grad_(False))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.children()]


def ways(width: int, out: int, number: int, dtype: torch.dtype) -> dict[str, Any]:
    """The four ways as functions of x; the tuned ones hold the same values."""
    import copy

    from peft import LoraConfig, get_peft_model

    from trainer.tuning.fast_lora import fuse_lora

    torch.manual_seed(0)
    bases = _Layers(width, out, number)
    settings = LoraConfig(r=16, lora_alpha=32, target_modules=list(NAMES[number]))
    stock: Any = get_peft_model(copy.deepcopy(bases), settings).to(dtype)  # type: ignore[arg-type]
    for name, parameter in stock.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0, 0.02)
    shared = copy.deepcopy(stock)
    assert fuse_lora(shared) == number
    fused = copy.deepcopy(shared)
    for layer in fused.base_model.model.children():
        layer.shared_input = None
    return {
        "base": bases.to(dtype),
        "peft": stock.base_model.model,
        "fused": fused.base_model.model,
        "shared": shared.base_model.model,
    }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--matmul", default="auto", choices=("auto", "blas", "onednn"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    from strategies import matmul

    print(f"float32 products: {matmul.choose_matmul_library(matmul.Matmul(args.matmul))}\n")
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
        for turn in range(args.rounds):
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
