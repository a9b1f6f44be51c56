"""What a GPU can do, by its capability. torch's own answers also count what is emulated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from strategies.base import Precision

if TYPE_CHECKING:
    import torch

AMPERE, VOLTA = (8, 0), (7, 0)
"""CUDA capabilities of the first GPUs with matrix units for bf16, and for fp16."""
SMALL_SHARED_MEMORY = (((8, 6), (8, 9)), ((12, 0), (12, 1)))
"""Capabilities (from, to) of GPUs whose multiprocessors have little shared memory."""
MAX_FLASH_HEAD = 256
"""Largest head that flash attention has, in torch and in the package flash-attn; sizes are multiples of 8."""
AMD_BF16 = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
"""AMD's architectures with matrix units for bf16: MI100 and later, RDNA 3 and later."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device as its driver describes it."""

    name: str
    capability: tuple[int, int]
    architecture: str | None = None
    """AMD's name of it, such as gfx90a; None on NVIDIA's."""

    @property
    def has_bf16(self) -> bool:
        """Whether matrix products in bf16 are done by the hardware."""
        if self.architecture is not None:
            return self.architecture.startswith(AMD_BF16)
        return self.capability >= AMPERE

    @property
    def has_flash(self) -> bool:
        """Whether flash attention, torch's variable-length kernel included, is built for it: where bf16 is too."""
        return self.has_bf16

    def lacking_heads(self, dropout: float = 0.0) -> tuple[int, int] | None:
        """Sizes of heads (from, to) that flash attention's backward pass has not: small multiprocessors lack shared memory.

        torch's own rule: capabilities 8.6 to 8.9, 12.0 and 12.1 miss 200 to 224, and all above 192 with dropout.
        """
        small = any(first <= self.capability <= last for first, last in SMALL_SHARED_MEMORY)
        if self.architecture is not None or not small:
            return None
        return 193, 224 if dropout == 0.0 else MAX_FLASH_HEAD


def listed_gpus() -> int:
    """NVIDIA's GPUs of this host, as the driver's own files list them: works without torch, and where torch sees none."""
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU behind a device, None for a CPU."""
    import torch

    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    architecture = properties.gcnArchName if torch.version.hip else None
    return Gpu(properties.name, (properties.major, properties.minor), architecture)


def best_precision(gpu: Gpu | None) -> Precision:
    """What `auto` means: bf16 where the hardware has it, else fp16 where it has that, else (and on CPUs) fp32."""
    if gpu is None:
        return Precision.fp32
    if gpu.has_bf16:
        return Precision.bf16
    # AMD's older cards have fast fp16, though no matrix units for it.
    return Precision.fp16 if gpu.architecture is not None or gpu.capability >= VOLTA else Precision.fp32


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies in bf16 (x86 with AVX512_BF16 or AMX, Arm with BF16) and oneDNN may let it."""
    import torch

    from strategies.compat.dispatch import onednn_multiplies_in_bf16

    capabilities = torch.cpu.get_capabilities()
    has_instructions = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
    return has_instructions and onednn_multiplies_in_bf16()


def advice(precision: Precision, device_type: str) -> str | None:
    """What a person should know of a precision on this hardware before waiting for it."""
    if precision is Precision.bf16 and device_type == "cpu" and not cpu_has_bf16():
        return (
            "this processor has no bf16 instructions: each product is emulated, and fp32 is many times as fast here; set "
            "precision=fp32"
        )
    return None
