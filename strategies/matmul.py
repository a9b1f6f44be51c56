"""Which library multiplies float32 matrices on CPUs: torch's BLAS, or oneDNN where that is much faster.

torch's published builds take MKL, which leaves AVX-512 unused on AMD processors; oneDNN, which every build has for other
types, uses it. torch takes oneDNN for float32 products where it may round them to bfloat16 on the way; a processor
without AMX computes them in float32 all the same, and `choose` makes sure of that before it says yes.

oneDNN compiles a kernel for each shape. That pays for the products of layers and for long documents, not for those inside
the attention of one short document after another: `in_blas` and `as_chosen` bracket what stays with BLAS.
"""

from __future__ import annotations

import os
import time
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

FASTER = 1.5
"""`auto` takes oneDNN where it is this many times as fast: more than noise, so that a resumed run chooses alike."""
LONG = 512
"""Tokens of a document from which its attention pays for kernels of its own: 1.1 times as fast at 512 although they are
compiled for each call, 1.8 times at 4,096."""
_KEPT_KERNELS = "64"
"""Compiled products kept, about 0.4 MiB each. Rows of ever new lengths would fill the 1,024 that are the default, twice."""

_onednn = False
"""Whether this process has chosen oneDNN."""


class Matmul(StrEnum):
    """`auto` takes oneDNN where it computes in float32 and is much faster than BLAS."""

    auto = "auto"
    blas = "blas"
    onednn = "onednn"


def choose(asked: Matmul) -> str:
    """Settle the library for this process, on a CPU, before its first product; what was chosen, for the record."""
    global _onednn
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's own cache, and torch's of it
        os.environ.setdefault(name, _KEPT_KERNELS)
    _use(onednn=False)
    _onednn, why = _judge(asked)
    _use(onednn=_onednn)
    return f"{'onednn' if _onednn else 'blas'} ({why})"


def agree(chosen: list[str], rank: int) -> str:
    """Settle for one library where ranks have chosen different ones, by what each wrote for the record; what to write now.

    `auto` measures, and other hosts, or other work on this one, measure otherwise; replicas would drift apart by rounding.
    """
    if len({text.split()[0] for text in chosen}) == 1:
        return chosen[rank]
    choose(Matmul.blas)
    return "blas (ranks measured differently)"


def restore() -> None:
    """Leave the process with torch's own choice."""
    global _onednn
    if _onednn:
        _onednn = False
        _use(onednn=False)


def in_blas(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same tensors; products computed from them are BLAS's, forward and backward, as far as `as_chosen`."""
    return _Switch.apply(False, *tensors) if _switches(tensors[0]) else tensors  # type: ignore[no-any-return]


def as_chosen(tensor: Tensor) -> Tensor:
    """The same tensor; products computed from it are the chosen library's again."""
    return _Switch.apply(True, tensor)[0] if _switches(tensor) else tensor


def _switches(tensor: Tensor) -> bool:
    return _onednn and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


class _Switch(torch.autograd.Function):
    """Identity that changes the library; gradients pass the stretch in the other direction and change it back."""

    @staticmethod
    def forward(ctx: Any, onednn: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.onednn = onednn
        _use(onednn=onednn)
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        _use(onednn=not ctx.onednn)
        return None, *grads


def _use(*, onednn: bool) -> None:
    torch.set_float32_matmul_precision("medium" if onednn else "highest")


def _judge(asked: Matmul) -> tuple[bool, str]:
    """Whether to take oneDNN, and why."""
    if asked is Matmul.blas:
        return False, "as asked"
    if not torch.backends.mkldnn.is_available():
        return False, "this torch has no oneDNN"
    if not _is_float32():
        return False, "oneDNN would round float32 products to bfloat16 here"
    if asked is Matmul.onednn:
        return True, "as asked"
    ratio = _speedup()
    return ratio >= FASTER, f"oneDNN is {ratio:.1f} times as fast here"


def _is_float32() -> bool:
    """Whether oneDNN keeps the 24 bits of float32, in a product of odd numbers that bfloat16 could not hold."""
    odd = torch.full((64, 64), 1.0 + 2.0**-12)
    _use(onednn=True)
    try:
        return bool(((odd @ torch.eye(64)) == odd).all())
    finally:
        _use(onednn=False)


def _speedup(size: int = 512, rounds: int = 5) -> float:
    """How many times as fast as BLAS oneDNN multiplies: the best of rounds in turn, about 20 ms in all."""
    a = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    best = {False: float("inf"), True: float("inf")}
    try:
        for _ in range(rounds):
            for onednn in best:
                _use(onednn=onednn)
                start = time.perf_counter()
                a @ a
                best[onednn] = min(best[onednn], time.perf_counter() - start)
    finally:
        _use(onednn=False)
    return best[False] / best[True]
