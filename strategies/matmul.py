"""Which library multiplies float32 matrices on CPUs: torch's BLAS, or oneDNN on processors where that is much faster.

torch's published builds use MKL, which leaves AVX-512 unused on AMD processors. oneDNN uses it, and every build has oneDNN for
other types. torch takes oneDNN for float32 products if they may be rounded to bfloat16 on the way. A processor without AMX
computes them in float32 all the same, and `choose_matmul_library` checks that before it takes oneDNN.

The two libraries round differently, so one run must keep one library. `auto` therefore looks the processor up in a table. It
never measures, because other work on the host would influence the choice.

oneDNN compiles a kernel for each shape. That pays for the products of layers and for long documents, but not inside the
attention of one short document after another. `switch_to_blas` and `switch_to_chosen_library` bracket what stays
with BLAS.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MIN_SPEED_RATIO = 1.5
"""`auto` takes oneDNN if it was measured to be at least this many times as fast. Below that, compiling kernels and their memory
cost more than oneDNN gains."""
LONG_DOCUMENT_TOKENS = 512
"""Tokens from which the attention of a document pays for kernels of its own: 1.1 times as fast at 512, although they are
compiled for each call, and 1.8 times at 4,096."""
_MAX_KEPT_KERNELS = "64"
"""Limit of compiled kernels, about 0.4 MiB each. Rows of ever new lengths would fill the default of 1,024, in two caches."""

_onednn_is_chosen = False
"""Whether this process has chosen oneDNN, so that attention of short documents switches to BLAS for a while."""

_CPU_INFO = Path("/proc/cpuinfo")


class Matmul(StrEnum):
    """`auto` takes oneDNN on processors where it was measured to be much faster than BLAS."""

    auto = "auto"
    blas = "blas"
    onednn = "onednn"


@dataclass(frozen=True, slots=True)
class MatmulChoice:
    """The library of this process, `blas` or `onednn`, and why it was taken."""

    library: Matmul
    reason: str

    def __str__(self) -> str:
        return f"{self.library} ({self.reason})"


@dataclass(frozen=True, slots=True)
class Processor:
    """The properties of a processor that decide how fast each library is."""

    vendor: str
    """The kernel's name of it, such as `AuthenticAMD`; empty if the kernel does not say."""
    family: int
    """The vendor's number of the processor's generation; 0 if the kernel does not say."""
    instructions: str
    """The widest instructions that both libraries may use, such as `AVX512`."""
    blas: str
    """The BLAS that this torch was built with, such as `mkl`."""

    def __str__(self) -> str:
        family = f"{self.vendor} family {self.family}" if self.vendor else "this processor"
        return f"{family} with {self.instructions} and BLAS {self.blas}"


@dataclass(frozen=True, slots=True)
class MeasuredRatio:
    """How many times as fast as BLAS oneDNN multiplied on a kind of processor. docs/speed.md says how it was measured."""

    processor: Processor
    name: str
    ratio: float


MEASURED_RATIOS = (
    MeasuredRatio(Processor("AuthenticAMD", 26, "AVX512", "mkl"), "AMD Zen 5", 2.2),
    MeasuredRatio(Processor("AuthenticAMD", 25, "AVX512", "mkl"), "AMD Zen 4", 1.1),
)
"""Measured on quiet machines only. A processor that is not listed keeps BLAS."""


def choose_matmul_library(requested: Matmul) -> MatmulChoice:
    """Choose the library that multiplies float32 matrices on this CPU, torch's BLAS or oneDNN, and switch this process to it.

    Call it before the first product is computed. `requested`: the setting `run.matmul`; `auto` takes oneDNN where it was measured
    to be much faster. Also limits oneDNN's compiled kernels by environment variables, unless the user has set these.
    """
    global _onednn_is_chosen
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's own cache, and torch's of it
        os.environ.setdefault(name, _MAX_KEPT_KERNELS)
    _set_float32_library(onednn=False)  # an earlier run of this process may have left oneDNN
    choice = _choose_by_request_and_processor(requested)
    _onednn_is_chosen = choice.library is Matmul.onednn
    _set_float32_library(onednn=_onednn_is_chosen)
    return choice


def agree_on_matmul_library(choices: list[MatmulChoice], rank: int) -> MatmulChoice:
    """Make all ranks multiply by one library, since they round differently: this rank's choice if all are alike, else BLAS.

    `choices`: those of all ranks, in rank order. `rank`: this rank. Switches this process to BLAS if it must; the choice that
    is returned then names the rank that cannot take oneDNN.
    """
    if len({choice.library for choice in choices}) == 1:
        return choices[rank]
    choose_matmul_library(Matmul.blas)
    # There are two libraries, so some rank has chosen BLAS.
    blas_rank = next(number for number, choice in enumerate(choices) if choice.library is Matmul.blas)
    return MatmulChoice(Matmul.blas, f"rank {blas_rank}: {choices[blas_rank].reason}")


def use_default_matmul_library() -> None:
    """Switch back to torch's own choice."""
    global _onednn_is_chosen
    if _onednn_is_chosen:
        _onednn_is_chosen = False
        _set_float32_library(onednn=False)


def switch_to_blas(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Switch float32 products to BLAS, until `switch_to_chosen_library`. Returns the same tensors, for autograd's graph.

    The backward pass, which runs in the opposite order, switches at the same two places.
    """
    if not _must_switch_library(tensors[0]):
        return tensors
    use_onednn = False
    return _LibrarySwitch.apply(use_onednn, *tensors)  # type: ignore[no-any-return]


def switch_to_chosen_library(tensor: Tensor) -> Tensor:
    """Switch float32 products back from BLAS to the library that this process has chosen. Returns the same tensor."""
    if not _must_switch_library(tensor):
        return tensor
    use_onednn = True
    (same_tensor,) = _LibrarySwitch.apply(use_onednn, tensor)
    return same_tensor  # type: ignore[no-any-return]


def _must_switch_library(tensor: Tensor) -> bool:
    """Whether the products of a tensor are computed by oneDNN, so that there is something to switch."""
    return _onednn_is_chosen and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


class _LibrarySwitch(torch.autograd.Function):
    """The identity, which switches the library. The backward pass comes from the other side, so it switches the other way."""

    @staticmethod
    def forward(ctx: Any, onednn: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.onednn = onednn
        _set_float32_library(onednn=onednn)
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        _set_float32_library(onednn=not ctx.onednn)
        return None, *grads


def _set_float32_library(*, onednn: bool) -> None:
    """Switch float32 products of this process to oneDNN, or to BLAS."""
    torch.set_float32_matmul_precision("medium" if onednn else "highest")


def _choose_by_request_and_processor(requested: Matmul) -> MatmulChoice:
    """Decide which library should multiply float32 matrices in this process, and why; switches nothing.

    BLAS if it is requested, or if oneDNN is missing or would round to bfloat16. Else oneDNN if it is requested; for `auto`, only
    on a processor where it was measured to be much faster.
    """
    if requested is Matmul.blas:
        return MatmulChoice(Matmul.blas, "as asked")
    if not torch.backends.mkldnn.is_available():
        return MatmulChoice(Matmul.blas, "this torch has no oneDNN")
    if not _onednn_keeps_float32():
        return MatmulChoice(Matmul.blas, "oneDNN would round float32 products to bfloat16 here")
    if requested is Matmul.onednn:
        return MatmulChoice(Matmul.onednn, "as asked")
    return _library_by_table(this_processor())


def _library_by_table(processor: Processor) -> MatmulChoice:
    """oneDNN on processors where it was measured to be at least MIN_SPEED_RATIO times as fast; BLAS on all others."""
    measured = next((row for row in MEASURED_RATIOS if row.processor == processor), None)
    if measured is None:
        return MatmulChoice(Matmul.blas, f"oneDNN was not measured on {processor}")
    if measured.ratio < MIN_SPEED_RATIO:
        return MatmulChoice(Matmul.blas, f"oneDNN is only {measured.ratio:.1f} times as fast on {measured.name}")
    return MatmulChoice(Matmul.onednn, f"oneDNN is {measured.ratio:.1f} times as fast on {measured.name}")


@cache
def this_processor() -> Processor:
    """The processor of this host, with the limits that the environment sets on its instructions."""
    vendor, family = _vendor_and_family()
    return Processor(vendor, family, _instructions(), _blas_of_torch())


def _vendor_and_family() -> tuple[str, int]:
    """Read the processor's vendor and the number of its family from /proc/cpuinfo: ("AuthenticAMD", 25); ("", 0) if unknown."""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return "", 0
    fields: dict[str, str] = {}
    for line in lines:
        key, _, text = line.partition(":")
        fields.setdefault(key.strip(), text.strip())
    vendor = fields.get("vendor_id", "")
    family = fields.get("cpu family", "")
    return vendor, int(family) if family.isdecimal() else 0


def _instructions() -> str:
    """The widest instructions of torch's own kernels, or the limit that the environment sets on oneDNN or MKL."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS"):
        limit = os.environ.get(name)
        if limit:
            return f"{name}={limit}"
    return torch.backends.cpu.get_cpu_capability()


def _blas_of_torch() -> str:
    """The BLAS that this torch was built with, as its build settings name it."""
    settings = torch.__config__.show().partition("BLAS_INFO=")[2]
    return settings.partition(",")[0].strip() or "unknown"


def _onednn_keeps_float32() -> bool:
    """Whether oneDNN multiplies float32 without rounding to bfloat16, as it may on a processor with bfloat16 products.

    Tried with a number that bfloat16 cannot represent. Leaves products to BLAS.
    """
    matrix = torch.full((64, 64), 1.0 + 2.0**-12)
    _set_float32_library(onednn=True)
    try:
        same_matrix = matrix @ torch.eye(64)
        return bool((same_matrix == matrix).all())
    finally:
        _set_float32_library(onednn=False)
