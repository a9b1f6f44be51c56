"""What MFU (model FLOPs utilisation) is made of: the arithmetic of a token, and the peak speed that it is measured against."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from trainer.reporting.gpu_peaks import peak_tflops
from trainer.reporting.run_record import REFERENCE_TFLOPS_KEY


class ReferenceSpeed(NamedTuple):
    """The peak speed that MFU is measured against."""

    tflops: float | None
    """TFLOP/s of one device; None if it is not known."""
    source: str
    """Where the figure comes from, as text."""


def reference_tflops(configured: float | None, device: torch.device) -> ReferenceSpeed:
    """The peak speed of one device that MFU (the share of the peak that a run reaches) is measured against, with its source.

    - `configured` (`logging.reference_tflops`), if it is set.
    - On a GPU, the figure of its data sheet; None if the GPU is not known, with what to set instead of the source.
    - On a CPU, the speed of a matrix product, which is measured now.
    """
    if configured is not None:
        return ReferenceSpeed(configured, REFERENCE_TFLOPS_KEY)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        tflops = peak_tflops(name)
        if not tflops:
            return ReferenceSpeed(tflops, f"the peak of {name} is not known: set {REFERENCE_TFLOPS_KEY}")
        return ReferenceSpeed(tflops, f"data sheet, dense bf16 or fp16, {name}")
    source = f"fp32 matrix product measured at start, {torch.get_num_threads()} threads"
    return ReferenceSpeed(measured_matmul_tflops(), source)


def measured_matmul_tflops() -> float:
    """Measure what this CPU can do at best, as no data sheet says it: TFLOP/s of an fp32 product of 768 x 768 matrices."""
    size = 768
    left = torch.randn(size, size)
    right = torch.randn(size, size)
    best_s = float("inf")
    for _ in range(4):  # the first one wakes threads up, and others share the machine
        start = time.perf_counter()
        left @ right
        best_s = min(best_s, time.perf_counter() - start)
    flops = 2 * size**3  # a multiplication and an addition for each of size^3 products
    return flops / best_s / 1e12


def flops_per_token(
    *, matmul_parameters: int, trainable_matmul_parameters: int, layers: int, width: int, mean_length: float
) -> float:
    """Arithmetic that training on one token needs, in FLOPs, from which MFU is computed (the count of Kaplan et al. 2020).

    Of the forward and the backward pass, causal attention included; recomputation does not count. `width`: of the hidden
    states. `mean_length`: tokens of a document. Each weight costs 2 in the forward pass and 2 in the backward pass for the
    gradient of its input; a trained one 2 more for its own gradient.
    """
    frozen_matmul_parameters = matmul_parameters - trainable_matmul_parameters
    # Scores and their product with the values cost 2 each for a pair of tokens, the backward pass twice that, and a token attends
    # to half of its document on average: 3 * (2 + 2) / 2.
    attention_flops = 6.0 * layers * width * mean_length
    return 6.0 * trainable_matmul_parameters + 4.0 * frozen_matmul_parameters + attention_flops
