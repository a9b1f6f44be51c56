"""Per-step metrics: buffered on the device, read and summed over ranks once a logging interval."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from strategies.base import Engine, StepResult
from strategies.communication_counters import CommunicationTotals, count_communication
from strategies.runtime import Runtime, dist_sum, peak_memory_gib
from trainer.reporting import expert_load, gpu_meters
from trainer.reporting.block_times import Busy
from trainer.reporting.gpu_peaks import peak_tflops
from trainer.reporting.step_times import PARTS, PartTimes, timed

COUNTED_IN = 2
"""The step of an attempt whose exchange is counted: in the first, engines still find out what they need when."""


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
    expert_tokens: Tensor | None = None
    """int64 `[layers, experts]`: how many tokens chose each expert on this rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankTime:
    """What one rank computed in the step of an interval that is looked at."""

    seconds: float
    """In its blocks' forward passes, without what they wait for; 0 where they are not timed."""
    tokens: float
    """Its own of that step."""
    step_s: float
    """Seconds of a step in the interval before, as this rank took its time; 0 in the first."""

    @property
    def each(self) -> float:
        """Seconds for a token."""
        return self.seconds / max(1.0, self.tokens)


@dataclass(slots=True)
class Meter:
    """Collects step records and turns them into rows."""

    runtime: Runtime
    flops_per_token: float
    reference_tflops: float | None
    metrics: tuple[str, ...] = ()
    """Terms of the objective that are logged beside the loss, each divided by the loss's count."""
    expert_tokens: Tensor | None = None
    """`[layers, experts]`: how many tokens chose each expert in the last interval, all ranks together."""
    peaks: dict[str, float] = field(default_factory=dict)
    """Largest of all ranks' peaks of memory up to the last flush, as `peak_memory_gib` names them."""
    start_s: float | None = None
    """Age of this process at the first step; None before it, and where the system does not tell."""
    parts: PartTimes | None = None
    """Times the parts of steps, where that was asked for."""
    evaluation_s: float = 0.0
    """Seconds of that for the evaluation before the first step."""
    busy: Busy | None = None
    """Times what this rank's blocks compute, in the first step of each interval."""
    exchanged: CommunicationTotals | None = None
    """What this rank exchanged in the step that was counted; None before it, and of a single rank."""
    by_rank: list[RankTime] = field(default_factory=list)
    """What it came to in the last interval, by rank; equal on all ranks."""
    gpu: gpu_meters.GpuWatcher | None = None
    """Looks at this rank's GPU; None where it has none."""
    _gpus: dict[str, float] = field(default_factory=dict)
    """What all ranks' GPUs did in the last interval, as rows have it."""
    _records: list[StepRecord] = field(default_factory=list)
    _steps: int = 0
    """Taken in this attempt."""
    _clock: float = field(default_factory=time.perf_counter)
    _intervals: list[tuple[float, float, float]] = field(default_factory=list)
    """(tokens, supervised tokens, seconds) of a mean step of each flushed interval."""

    def begin(self, evaluation_s: float) -> None:
        """The first step is about to be taken, after an evaluation of so many seconds."""
        self.start_s, self.evaluation_s = process_age_s(), evaluation_s
        if self.runtime.kind == "cuda":
            self.gpu = gpu_meters.GpuWatcher(self.runtime.device)
            self.gpu.start()
        self.restart_clock()

    def timing(self, engine: Engine) -> Engine:
        """The engine with the parts of its steps timed, for the rows from now on."""
        self.parts = PartTimes(self.runtime.device)
        return timed(engine, self.parts)

    def watch(self, blocks: list[nn.Module]) -> None:
        """Time what these blocks compute from now on, in a run of several ranks."""
        if self.runtime.world_size > 1:
            self.busy = Busy(self.runtime.device)
            self.busy.watch(blocks)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step: the first one of an interval is looked at, and what one of an attempt exchanges is counted."""
        self._steps += 1
        if self.busy is not None:
            self.busy.on = not self._records
        if self._steps != COUNTED_IN or self.runtime.world_size == 1:
            yield
            return
        with count_communication() as self.exchanged:
            yield

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
        experts = [r.expert_tokens for r in records if r.expert_tokens is not None]
        if experts:
            table = torch.cat([table, torch.stack(experts).double().flatten(1)], dim=1)
        parts: list[list[float]] = [[] for _ in records] if self.parts is None else self.parts.read()
        waits = torch.tensor(
            [[*took, r.wait_s, float(r.local_tokens)] for r, took in zip(records, parts, strict=True)],
            dtype=torch.float64,
        )
        table, last = torch.cat([table, waits.to(table.device)], dim=1), waits.shape[1]
        table, memory = self._over_ranks(table, records[0].local_tokens)
        norms = torch.stack([r.result.grad_norm for r in records]).tolist()
        skipped = torch.stack([r.result.skipped for r in records]).tolist()
        # The device has just caught up, so the interval's wall time is true even where single steps' would not be.
        seconds = (time.perf_counter() - self._clock) / len(records)
        self._clock = time.perf_counter()
        tokens, supervised = (
            sum(getattr(r, of) for r in records) / len(records) for of in ("tokens", "supervised_tokens")
        )
        self._intervals.append((tokens, supervised, seconds))
        rows = [
            self._row(r, dict(zip(terms, sums, strict=True)), wait, norm, seconds)
            for r, sums, wait, norm in zip(
                records, table[:, : len(terms)].tolist(), table[:, -2].tolist(), norms, strict=True
            )
        ]
        if experts:
            tokens = table[:, len(terms) : -last].view(len(records), *experts[0].shape)
            self.expert_tokens = tokens.sum(0)
            for row, each in zip(rows, tokens, strict=True):
                row |= expert_load.of_step(each)
        for row, took in zip(rows, table[:, -last:-2].tolist(), strict=True):
            row |= {part: seconds / self.runtime.world_size for part, seconds in zip(PARTS, took, strict=False)}
        for row, skip in zip(rows, skipped, strict=True):
            row |= memory | ({"skipped": 1} if skip else {})
        rows[-1] |= self._gpus
        return rows

    def _over_ranks(self, table: Tensor, tokens: int) -> tuple[Tensor, dict[str, float]]:
        """The sum of all ranks' `table`, on the host, and the largest of their peaks of memory, in one reduction.

        With it goes what each rank computed, for `by_rank`.
        """
        peaks = peak_memory_gib(self.runtime.device)
        own = RankTime(
            seconds=0.0 if self.busy is None else self.busy.read(),
            tokens=tokens,
            step_s=self._intervals[-1][-1] if self._intervals else 0.0,
        )
        seen = [] if self.gpu is None else self.gpu.take()
        values = [*peaks.values(), own.seconds, own.tokens, own.step_s, *seen]
        places = torch.zeros(self.runtime.world_size, len(values), dtype=table.dtype)
        places[self.runtime.rank] = torch.tensor(values, dtype=table.dtype)
        both = dist_sum(torch.cat([table.view(-1), places.view(-1).to(table.device)])).cpu()
        summed, found = both.split([table.numel(), places.numel()])
        found = found.view_as(places)
        self.peaks = dict(zip(peaks, found.amax(0).tolist(), strict=False))
        self.by_rank = [
            RankTime(seconds=seconds, tokens=tokens, step_s=step_s)
            for seconds, tokens, step_s in found[:, len(peaks) : len(values) - len(seen)].tolist()
        ]
        self._gpus = gpu_meters.told(found[:, len(values) - len(seen) :].tolist()) if seen else {}
        return summed.view(table.shape), self.peaks

    def speed(self) -> dict[str, float]:
        """What the run did in a second: the median of its logging intervals, without the first where there are others."""
        usual = self._usual()
        if not usual:
            return {}
        found = [
            {**self._speed(tokens, seconds), "supervised_tokens_per_s": supervised / seconds, "step_s": seconds}
            for tokens, supervised, seconds in usual
        ]
        return {"intervals": len(usual), **{key: median(each[key] for each in found) for key in found[0]}}

    def step_s(self) -> float | None:
        """Seconds of a step, as `speed` takes its median; None before the first flush."""
        return median(seconds for *_, seconds in usual) if (usual := self._usual()) else None

    def _usual(self) -> list[tuple[float, float, float]]:
        return self._intervals[1:] or self._intervals

    def _speed(self, tokens: float, seconds: float) -> dict[str, float]:
        """Of a step of `tokens`, all ranks together, that took `seconds`."""
        world = self.runtime.world_size
        values = {"tokens_per_s": tokens / seconds, "tokens_per_s_per_rank": tokens / seconds / world}
        if self.reference_tflops:
            values["mfu"] = self.flops_per_token * tokens / seconds / world / (self.reference_tflops * 1e12)
        return values

    def _row(self, r: StepRecord, sums: dict[str, float], wait: float, norm: float, seconds: float) -> dict[str, Any]:
        row: dict[str, Any] = {
            "step": r.step,
            "loss": sums["loss"] / (r.counts["loss"] or 1),
            "grad_norm": norm,
            "lr": r.lr,
            "tokens": r.total_tokens,
            "step_tokens": r.tokens,
            "supervised_tokens": r.total_supervised_tokens,
            **self._speed(r.tokens, seconds),
            "supervised_tokens_per_s": r.supervised_tokens / seconds,
            "step_s": seconds,
            "data_wait_s": wait / self.runtime.world_size,
            "balance": r.balance,
        }
        row |= {f"step_tokens/{name}": tokens for name, tokens in r.source_tokens.items()}
        apart = {f"loss/{name}": count for name, count in r.source_counts.items() if count}
        row |= {name: sums[name] / count for name, count in apart.items() if name in sums}
        row |= {name: sums[name] / (r.counts["loss"] or 1) for name in self.metrics}
        row |= {
            name: value for name, value in sums.items() if name.startswith(("router/", "logits/"))
        }  # parts of the whole
        return row


def process_age_s() -> float | None:
    """Seconds since this process was started, to a hundredth; None where the system does not tell (it does on Linux)."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def reference_tflops(configured: float | None, device: torch.device) -> tuple[float | None, str]:
    """(peak TFLOP/s of one device, where the figure comes from)."""
    if configured is not None:
        return configured, "logging.reference_tflops"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        figure = peak_tflops(name)
        known = f"data sheet, dense bf16 or fp16, {name}"
        return figure, known if figure else f"the peak of {name} is not known: set logging.reference_tflops"
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
