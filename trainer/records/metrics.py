"""Per-step numbers: buffered on the device, read and summed over ranks once a logging interval."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from strategies.base import StepResult
from strategies.runtime import Runtime, dist_sum, peak_memory_gib

# Dense bf16/fp16 peak TFLOP/s of one device, from the makers' data sheets (no sparsity).
KNOWN_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A10": 125.0,
    "V100": 125.0,
}


@dataclass(slots=True)
class StepRecord:
    """What one step leaves behind; tensors stay on the device until the flush."""

    step: int
    lr: float
    tokens: int
    supervised_tokens: int
    total_tokens: int
    """Tokens since the start of the run."""
    total_supervised_tokens: int
    counts: dict[str, float]
    local_sums: dict[str, Tensor]
    result: StepResult
    local_tokens: int
    wait_s: float
    source_tokens: dict[str, int] = field(default_factory=dict)
    """See `StepBatch.source_tokens`."""
    source_counts: dict[str, float] = field(default_factory=dict)
    """See `StepBatch.source_counts`."""
    balance: float = 1.0
    """See `StepBatch.balance`."""


@dataclass(slots=True)
class Meter:
    """Collects step records and turns them into rows."""

    runtime: Runtime
    flops_per_token: float
    reference_tflops: float | None
    metrics: tuple[str, ...] = ()
    """Terms of the objective that are logged beside the loss, each divided by the loss's count."""
    _records: list[StepRecord] = field(default_factory=list)
    _clock: float = field(default_factory=time.perf_counter)

    def restart_clock(self) -> None:
        """Leave out the time since the last flush (evaluation, checkpoint) from the speed of the next steps."""
        self._clock = time.perf_counter()

    def add(self, record: StepRecord) -> None:
        """Keep one step's record; reads nothing from the device."""
        self._records.append(record)

    @property
    def pending(self) -> int:
        """Steps not yet flushed."""
        return len(self._records)

    def flush(self) -> list[dict[str, Any]]:
        """Rows of the buffered steps, equal on all ranks. All ranks must call; this is where the device is waited for."""
        records, self._records = self._records, []
        if not records:
            return []
        terms = sorted(records[0].local_sums)
        table = torch.stack([torch.stack([r.local_sums[t].double() for t in terms]) for r in records])
        waits = torch.tensor([[r.wait_s, float(r.local_tokens)] for r in records], dtype=torch.float64)
        table = torch.cat([table, waits.to(table.device)], dim=1)
        table = dist_sum(table).cpu()
        norms = torch.stack([r.result.grad_norm for r in records]).tolist()
        skipped = torch.stack([r.result.skipped for r in records]).tolist()
        # The device has just caught up, so the interval's wall time is true even where single steps' would not be.
        seconds = (time.perf_counter() - self._clock) / len(records)
        self._clock = time.perf_counter()
        memory = peak_memory_gib(self.runtime.device)
        return [
            self._row(r, dict(zip(terms, sums, strict=False)), sums[-2], norm, skip, seconds, memory)
            for r, sums, norm, skip in zip(records, table.tolist(), norms, skipped, strict=True)
        ]

    def _row(
        self,
        r: StepRecord,
        sums: dict[str, float],
        wait: float,
        norm: float,
        skip: float,
        seconds: float,
        memory: float,
    ) -> dict[str, Any]:
        world = self.runtime.world_size
        row: dict[str, Any] = {
            "step": r.step,
            "loss": sums["loss"] / (r.counts["loss"] or 1),
            "grad_norm": norm,
            "lr": r.lr,
            "tokens": r.total_tokens,
            "step_tokens": r.tokens,
            "supervised_tokens": r.total_supervised_tokens,
            "tokens_per_s": r.tokens / seconds,
            "tokens_per_s_per_rank": r.tokens / seconds / world,
            "supervised_tokens_per_s": r.supervised_tokens / seconds,
            "step_s": seconds,
            "memory_gib": memory,
            "data_wait_s": wait / world,
            "balance": r.balance,
        }
        row |= {f"step_tokens/{name}": tokens for name, tokens in r.source_tokens.items()}
        apart = {f"loss/{name}": count for name, count in r.source_counts.items() if count}
        row |= {name: sums[name] / count for name, count in apart.items() if name in sums}
        row |= {name: sums[name] / (r.counts["loss"] or 1) for name in self.metrics}
        if self.reference_tflops:
            achieved = self.flops_per_token * r.tokens / seconds / world
            row["mfu"] = achieved / (self.reference_tflops * 1e12)
        if skip:
            row["skipped"] = 1
        return row


def reference_tflops(configured: float | None, device: torch.device) -> tuple[float | None, str]:
    """(peak TFLOP/s of one device, where the figure comes from)."""
    if configured is not None:
        return configured, "logging.reference_tflops"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        match = next((v for k, v in KNOWN_TFLOPS.items() if k in name), None)
        return (
            match,
            f"data sheet, dense bf16, {name}" if match else f"unknown for {name}: set logging.reference_tflops",
        )
    return measured_matmul_tflops(), f"fp32 matrix product measured at start, {torch.get_num_threads()} threads"


def measured_matmul_tflops(size: int = 768) -> float:
    """TFLOP/s of a square fp32 product on this CPU, the best of a few."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


def flops_per_token(
    *, matmul_parameters: int, trainable_matmul_parameters: int, layers: int, width: int, mean_length: float
) -> float:
    """Model FLOPs of forward and backward for one token, causal attention included (the count of Kaplan et al. 2020).

    6 per trained weight; frozen weights need no gradient of their own, so 4.
    """
    frozen = matmul_parameters - trainable_matmul_parameters
    return 6.0 * trainable_matmul_parameters + 4.0 * frozen + 6.0 * layers * width * mean_length
