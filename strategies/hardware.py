"""What a GPU can do in hardware, by its capability. torch's own answers also count what is emulated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from strategies.base import Precision

if TYPE_CHECKING:
    import torch

AMPERE_CAPABILITY = (8, 0)
"""CUDA capability of the first GPUs with matrix units for bf16."""
VOLTA_CAPABILITY = (7, 0)
"""CUDA capability of the first GPUs with matrix units for fp16."""
CAPABILITIES_WITH_SMALL_SHARED_MEMORY = (((8, 6), (8, 9)), ((12, 0), (12, 1)))
"""Ranges of capabilities, (first, last), of GPUs whose multiprocessors have little shared memory."""
MAX_FLASH_HEAD_SIZE = 256
"""Largest size of a head for flash attention, in torch and in the package flash-attn. Sizes are multiples of 8."""
SMALLEST_UNSUPPORTED_FLASH_HEAD_SIZE, LARGEST_UNSUPPORTED_FLASH_HEAD_SIZE = 193, 224
"""Sizes between which GPUs with little shared memory have no backward pass of flash attention; with dropout up to
`MAX_FLASH_HEAD_SIZE`."""
AMD_BF16_ARCHITECTURES = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
"""AMD's architectures with matrix units for bf16: MI100 and later, RDNA 3 and later."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device as its driver describes it."""

    name: str
    capability: tuple[int, int]
    architecture: str | None = None
    """AMD's name of its architecture, such as gfx90a; None for NVIDIA's GPUs."""

    @property
    def has_bf16(self) -> bool:
        """Whether the hardware has matrix units for bf16."""
        if self.architecture is not None:
            return self.architecture.startswith(AMD_BF16_ARCHITECTURES)
        return self.capability >= AMPERE_CAPABILITY

    @property
    def has_flash(self) -> bool:
        """Whether flash attention is built for it, torch's variable-length kernel included: the same GPUs that have bf16."""
        return self.has_bf16

    def unsupported_flash_head_sizes(self, dropout: float = 0.0) -> tuple[int, int] | None:
        """The sizes of an attention head that flash attention cannot train on this GPU: (smallest, largest); None without any.

        It lacks their backward pass. By torch's own rule, NVIDIA's GPUs with little shared memory (capabilities 8.6 to 8.9, 12.0
        and 12.1) cannot do the sizes 193 to 224, and with dropout in attention all sizes above 192.
        """
        is_nvidia = self.architecture is None
        has_little_shared_memory = any(
            first <= self.capability <= last for first, last in CAPABILITIES_WITH_SMALL_SHARED_MEMORY
        )
        if not is_nvidia or not has_little_shared_memory:
            return None
        largest = LARGEST_UNSUPPORTED_FLASH_HEAD_SIZE if dropout == 0.0 else MAX_FLASH_HEAD_SIZE
        return SMALLEST_UNSUPPORTED_FLASH_HEAD_SIZE, largest


def count_nvidia_gpus() -> int:
    """Number of NVIDIA's GPUs of this host, from the driver's own files. Works without torch, and if torch sees none of them."""
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def gpu_of_device(device: torch.device) -> Gpu | None:
    """The GPU behind a device, None for a CPU."""
    import torch

    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    architecture = properties.gcnArchName if torch.version.hip else None
    return Gpu(properties.name, (properties.major, properties.minor), architecture)


def best_precision(gpu: Gpu | None) -> Precision:
    """What `precision=auto` means on a GPU: bf16 if the hardware has it, else fp16 if that is fast, else fp32.

    `gpu`: None for a CPU, on which it means fp32.
    """
    if gpu is None:
        return Precision.fp32
    if gpu.has_bf16:
        return Precision.bf16
    # AMD's older cards have no matrix units, but their fp16 is fast.
    has_fast_fp16 = gpu.architecture is not None or gpu.capability >= VOLTA_CAPABILITY
    return Precision.fp16 if has_fast_fp16 else Precision.fp32


def cpu_has_bf16() -> bool:
    """Whether this processor has bf16 products (x86 with AVX512_BF16 or AMX, Arm with BF16), and oneDNN may use them."""
    import torch

    from strategies.compat.dispatch import onednn_multiplies_in_bf16

    capabilities = torch.cpu.get_capabilities()
    has_instructions = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
    return has_instructions and onednn_multiplies_in_bf16()


def slow_precision_warning(precision: Precision, device_type: str) -> str | None:
    """Warn of bf16 on a processor that must emulate it, in words for the user; None for every other precision and device.

    `device_type`: of the run, `cpu` or `cuda`.
    """
    if precision is Precision.bf16 and device_type == "cpu" and not cpu_has_bf16():
        return (
            "this processor has no bf16 instructions: each product is emulated, and fp32 is many times as fast here; set "
            "precision=fp32"
        )
    return None
