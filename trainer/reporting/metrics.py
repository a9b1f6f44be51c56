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
from strategies.runtime import Runtime, peak_memory_gib_by_metric, sum_over_ranks
from trainer.reporting import expert_load, gpu_meters
from trainer.reporting.block_times import BlockTimer
from trainer.reporting.gpu_peaks import peak_tflops
from trainer.reporting.run_record import REFERENCE_TFLOPS
from trainer.reporting.step_times import PARTS, PartTimes, timed_engine

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
    epoch: float = 0.0
    """Passes over the training data since the start of the run."""
    facts: dict[str, float] = field(default_factory=dict)
    """See `StepBatch.facts`."""
    round_s: float = 0.0
    """See `StepBatch.round_s`."""
    expert_tokens: Tensor | None = None
    """int64 `[layers, experts]`: how many tokens chose each expert on this rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankTime:
    """What one rank computed in the first step of an interval."""

    seconds: float
    """In its blocks' forward passes, without what they wait for; 0 if they are not timed."""
    tokens: float
    """Tokens of this rank in that step."""
    step_s: float
    """Seconds of a step in the interval before, as this rank took its time; 0 in the first."""

    @property
    def seconds_per_token(self) -> float:
        """Seconds for a token."""
        return self.seconds / max(1.0, self.tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMeasurements:
    """What one rank measured of itself in an interval, as a row of numbers that a reduction can carry to all ranks."""

    peaks_gib: dict[str, float]
    """Peaks of memory in GiB, as `peak_memory_gib_by_metric` names them; every rank has the same names in the same order."""
    time: RankTime
    gpu_means: list[float]
    """`GpuWatcher.means`; empty if the rank has no GPU."""

    def to_row(self) -> list[float]:
        """The numbers in the order peaks, time, GPU."""
        return [*self.peaks_gib.values(), self.time.seconds, self.time.tokens, self.time.step_s, *self.gpu_means]

    def of_row(self, row: list[float]) -> RankMeasurements:
        """The measurements of another rank, from its `to_row`. Its peaks have the same names as this rank's."""
        num_peaks = len(self.peaks_gib)
        seconds, tokens, step_s = row[num_peaks : num_peaks + 3]
        return RankMeasurements(
            peaks_gib=dict(zip(self.peaks_gib, row[:num_peaks], strict=True)),
            time=RankTime(seconds=seconds, tokens=tokens, step_s=step_s),
            gpu_means=row[num_peaks + 3 :],
        )


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
    """Largest of all ranks' peaks of memory up to the last flush, as `peak_memory_gib_by_metric` names them."""
    start_s: float | None = None
    """Age of this process at the first step; None before it, and where the system does not tell."""
    parts: PartTimes | None = None
    """Times the parts of steps, where that was asked for."""
    evaluation_s: float = 0.0
    """Seconds of that for the evaluation before the first step."""
    block_timer: BlockTimer | None = None
    """Times what this rank's blocks compute, in the first step of each interval."""
    expert_ranks: int = 1
    """Ranks over which the experts of a layer are distributed."""
    communication_totals: CommunicationTotals | None = None
    """What this rank exchanged in the step that was counted; None before it, and of a single rank."""
    by_rank: list[RankTime] = field(default_factory=list)
    """What each rank computed in the last interval, by rank; equal on all ranks."""
    gpu: gpu_meters.GpuWatcher | None = None
    """Looks at this rank's GPU; None where it has none."""
    _gpu_metrics: dict[str, float] = field(default_factory=dict)
    """What all ranks' GPUs did in the last interval, as rows have it."""
    _records: list[StepRecord] = field(default_factory=list)
    _steps: int = 0
    """Taken in this attempt."""
    _clock: float = field(default_factory=time.perf_counter)
    _intervals: list[tuple[float, float, float]] = field(default_factory=list)
    """(tokens, supervised tokens, seconds) of a mean step of each flushed interval."""

    def begin(self, evaluation_s: float) -> None:
        """Start the clock of steps, and the measurements of this rank's GPU. Called before the first step.

        `evaluation_s`: seconds that the evaluation before it took.
        """
        self.start_s = process_age_s()
        self.evaluation_s = evaluation_s
        if self.runtime.kind == "cuda":
            self.gpu = gpu_meters.GpuWatcher(self.runtime.device)
            self.gpu.start()
        self.restart_clock()

    def timing(self, engine: Engine) -> Engine:
        """An engine that does the same, with its forward passes, backward passes and updates timed for the rows."""
        self.parts = PartTimes(self.runtime.device)
        return timed_engine(engine, self.parts)

    def watch(self, blocks: list[nn.Module], *, expert_ranks: int = 1) -> None:
        """Time what these blocks compute from now on, in a run of several ranks. `expert_ranks`: as the attribute."""
        self.expert_ranks = expert_ranks
        if self.runtime.world_size > 1:
            self.block_timer = BlockTimer(self.runtime.device)
            self.block_timer.watch(blocks, has_collectives_inside=self.runtime.sequence_size > 1)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around each step: time the blocks in the first one of an interval, and count what one of an attempt exchanges."""
        self._steps += 1
        if self.block_timer is not None:
            is_first_of_interval = not self._records
            self.block_timer.is_on = is_first_of_interval
        # Counting costs a little in each collective, so it is on in one step of an attempt only.
        if self._steps != COUNTED_IN or self.runtime.world_size == 1:
            yield
        else:
            with count_communication() as self.communication_totals:
                yield
        # What the blocks compute between steps (evaluations, answers of a round) is no part of a step.
        if self.block_timer is not None:
            self.block_timer.is_on = False

    def restart_clock(self) -> None:
        """Leave out the time since the last flush (evaluation, checkpoint) from the speed of the next steps."""
        self._clock = time.perf_counter()

    def add(self, record: StepRecord) -> None:
        """Keep one step's record; reads nothing from the device."""
        self._records.append(record)

    @property
    def num_buffered_steps(self) -> int:
        """Steps not yet flushed."""
        return len(self._records)

    def flush(self) -> list[dict[str, Any]]:
        """The rows of the steps since the last flush, one for each step, equal on all ranks.

        A collective: all ranks must call, after the same steps. This is where the host waits for the device.
        """
        records = self._records
        self._records = []
        if not records:
            return []
        terms = sorted(records[0].local_sums)  # of the loss, such as `kl` and `loss`
        experts = [record.expert_tokens for record in records if record.expert_tokens is not None]
        # Everything that is summed over ranks goes into one table, for one reduction: a row for each step, with the columns
        # sums of the terms, tokens of each expert, seconds of the step's parts, wait for data, tokens.
        table = self._sums_on_device(records, terms, experts)
        host_columns = self._host_columns(records)
        num_host_columns = host_columns.shape[1]
        table = torch.cat([table, host_columns.to(table.device)], dim=1)
        table, measurements_by_rank = self._sum_and_gather(table, self._own_measurements(records[0].local_tokens))
        self._keep_measurements(measurements_by_rank)
        grad_norms = torch.stack([record.result.grad_norm for record in records]).tolist()
        skipped = torch.stack([record.result.skipped for record in records]).tolist()

        # The device has just caught up, so the interval's wall time is true even where single steps' would not be.
        step_s = (time.perf_counter() - self._clock) / len(records)
        self._clock = time.perf_counter()
        # Writing and scoring answers is no training: speeds are those of the rest.
        round_s = sum(record.round_s for record in records) / len(records)
        train_s = max(step_s - round_s, 1e-9)
        mean_tokens = sum(record.tokens for record in records) / len(records)
        mean_supervised_tokens = sum(record.supervised_tokens for record in records) / len(records)
        self._intervals.append((mean_tokens, mean_supervised_tokens, train_s))

        # The columns apart again, now of all ranks together.
        term_sums = table[:, : len(terms)].tolist()
        part_seconds = table[:, -num_host_columns:-2].tolist()
        waits_s = table[:, -2].tolist()
        expert_tokens = None
        if experts:
            expert_tokens = table[:, len(terms) : -num_host_columns].view(len(records), *experts[0].shape)
            self.expert_tokens = expert_tokens.sum(0)

        rows = []
        for number, record in enumerate(records):
            sums = dict(zip(terms, term_sums[number], strict=True))
            row = self._row(record, sums, waits_s[number], grad_norms[number], train_s)
            if round_s:
                row |= {"step_s": step_s, "train_s": train_s}
            row |= record.facts
            if expert_tokens is not None:
                row |= expert_load.expert_metrics(expert_tokens[number], self.expert_ranks)
            # Without timed parts there is nothing to zip: the means over ranks of what was timed.
            for part, seconds in zip(PARTS, part_seconds[number], strict=False):
                row[part] = seconds / self.runtime.world_size
            row |= self.peaks
            if skipped[number]:
                row["skipped"] = 1
            rows.append(row)
        rows[-1] |= self._gpu_metrics  # once an interval
        return rows

    def _sums_on_device(self, records: list[StepRecord], terms: list[str], experts: list[Tensor]) -> Tensor:
        """This rank's sums of the steps of a logging interval, on the device: float64 [steps, terms + layers * experts].

        One table, so that a single reduction sums everything over ranks. `terms`: the loss terms of the first columns.
        `experts`: for each step, tokens by layer and expert; empty for a model without experts.
        """
        sums_by_step = []
        for record in records:
            sums_by_step.append(torch.stack([record.local_sums[term].double() for term in terms]))
        table = torch.stack(sums_by_step)
        if not experts:
            return table
        tokens_by_expert = torch.stack(experts).double().flatten(start_dim=1)
        return torch.cat([table, tokens_by_expert], dim=1)

    def _host_columns(self, records: list[StepRecord]) -> Tensor:
        """What the host knows of each step of this rank: float64 [steps, parts + 2].

        The columns are the seconds of the step's parts (none if they are not timed), of the wait for data, and the tokens.
        """
        if self.parts is None:
            part_seconds: list[list[float]] = [[] for _ in records]
        else:
            part_seconds = self.parts.read()
        step_columns = []
        for record, seconds in zip(records, part_seconds, strict=True):
            step_columns.append([*seconds, record.wait_s, float(record.local_tokens)])
        return torch.tensor(step_columns, dtype=torch.float64)

    def _own_measurements(self, tokens: int) -> RankMeasurements:
        """What this rank measured of itself since the last flush. `tokens`: its tokens of the interval's first step."""
        return RankMeasurements(
            peaks_gib=peak_memory_gib_by_metric(self.runtime.device),
            time=RankTime(
                seconds=0.0 if self.block_timer is None else self.block_timer.read(),
                tokens=tokens,
                step_s=self._intervals[-1][-1] if self._intervals else 0.0,
            ),
            gpu_means=[] if self.gpu is None else self.gpu.means(),
        )

    def _sum_and_gather(self, table: Tensor, own: RankMeasurements) -> tuple[Tensor, list[RankMeasurements]]:
        """(the sum of all ranks' `table`, on the host; each rank's measurements, in rank order). All ranks must call.

        One reduction does both. To gather by a sum, each rank fills its own row of a table of zeros with a row for each rank.
        """
        own_row = own.to_row()
        rows = torch.zeros(self.runtime.world_size, len(own_row), dtype=table.dtype)
        rows[self.runtime.rank] = torch.tensor(own_row, dtype=table.dtype)
        reduced = sum_over_ranks(torch.cat([table.view(-1), rows.view(-1).to(table.device)])).cpu()
        summed_table, gathered_rows = reduced.split([table.numel(), rows.numel()])
        measurements_by_rank = [own.of_row(row) for row in gathered_rows.view_as(rows).tolist()]
        return summed_table.view(table.shape), measurements_by_rank

    def _keep_measurements(self, measurements_by_rank: list[RankMeasurements]) -> None:
        """Set `peaks`, `by_rank` and `_gpu_metrics` to what all ranks measured in this interval."""
        self.peaks = {}
        for name in measurements_by_rank[0].peaks_gib:
            self.peaks[name] = max(measurements.peaks_gib[name] for measurements in measurements_by_rank)
        self.by_rank = [measurements.time for measurements in measurements_by_rank]
        gpu_means_by_rank = [measurements.gpu_means for measurements in measurements_by_rank]
        self._gpu_metrics = gpu_meters.row_metrics(gpu_means_by_rank) if gpu_means_by_rank[0] else {}

    def speed(self) -> dict[str, float]:
        """Tokens a second, MFU and seconds of a step: medians over logging intervals. Empty before the first flush.

        The first interval is left out if there are others.
        """
        intervals = self._counted_intervals()
        if not intervals:
            return {}
        values_by_rate: dict[str, list[float]] = {}
        for tokens, supervised_tokens, step_s in intervals:
            rates = self._rates(tokens, step_s)
            rates |= {"supervised_tokens_per_s": supervised_tokens / step_s, "step_s": step_s}
            for name, value in rates.items():
                values_by_rate.setdefault(name, []).append(value)
        medians = {name: median(values) for name, values in values_by_rate.items()}
        return {"intervals": len(intervals), **medians}

    def step_s(self) -> float | None:
        """Seconds of a step, as `speed` takes its median; None before the first flush."""
        intervals = self._counted_intervals()
        return median(step_s for *_, step_s in intervals) if intervals else None

    def _counted_intervals(self) -> list[tuple[float, float, float]]:
        """The intervals whose speed counts: all but the first if there are others, since it fills caches and chooses kernels."""
        return self._intervals[1:] or self._intervals

    def _rates(self, tokens: float, step_s: float) -> dict[str, float]:
        """Speeds of a step with this many tokens, all ranks together, that took `step_s` seconds.

        `mfu`, the model FLOPs utilisation, is there if the peak of the device is known.
        """
        world_size = self.runtime.world_size
        rates = {"tokens_per_s": tokens / step_s, "tokens_per_s_per_rank": tokens / step_s / world_size}
        if self.reference_tflops:
            peak_flops = self.reference_tflops * 1e12
            rates["mfu"] = self.flops_per_token * tokens / step_s / world_size / peak_flops
        return rates

    def _row(
        self, record: StepRecord, sums: dict[str, float], wait_s: float, grad_norm: float, step_s: float
    ) -> dict[str, Any]:
        """A step's row of `metrics.jsonl`.

        `sums`: each term of the loss (`loss`, `kl`, `loss/SOURCE`), summed over tokens and ranks, and the shares `router/...` and
        `logits/...`. `wait_s`: seconds that all ranks together waited for data. `step_s`: mean seconds of a step in the interval.
        """
        loss_count = record.counts["loss"] or 1  # a step without a single target has a loss of 0
        row: dict[str, Any] = {
            "step": record.step,
            "loss": sums["loss"] / loss_count,
            "grad_norm": grad_norm,
            "lr": record.lr,
            "epoch": record.epoch,
            "tokens": record.total_tokens,
            "step_tokens": record.tokens,
            "supervised_tokens": record.total_supervised_tokens,
            **self._rates(record.tokens, step_s),
            "supervised_tokens_per_s": record.supervised_tokens / step_s,
            "step_s": step_s,
            "data_wait_s": wait_s / self.runtime.world_size,
            "balance": record.balance,
        }
        # By source of the data, such as `loss/web`, which is divided by the source's own count.
        for source, tokens in record.source_tokens.items():
            row[f"step_tokens/{source}"] = tokens
        for source, count in record.source_counts.items():
            if count and f"loss/{source}" in sums:
                row[f"loss/{source}"] = sums[f"loss/{source}"] / count
        # Metrics of the objective, such as `kl`.
        for name in self.metrics:
            row[name] = sums[name] / loss_count
        # These are shares of the whole batch already: nothing is left to divide by.
        for name, share in sums.items():
            if name.startswith(("router/", "logits/")):
                row[name] = share
        return row


def process_age_s() -> float | None:
    """Seconds since this process was started, to a hundredth; None where the system does not tell (it does on Linux)."""
    try:
        status = Path("/proc/self/stat").read_text(encoding="utf-8")
        # Field 22, `starttime`, in ticks since boot (proc(5)). The second field is a name in brackets that may hold blanks.
        fields_after_name = status.rsplit(")", 1)[1].split()
        start_ticks = int(fields_after_name[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def reference_tflops(configured: float | None, device: torch.device) -> tuple[float | None, str]:
    """The peak speed that MFU is measured against: (TFLOP/s of one device, where the figure comes from).

    - `configured` (`logging.reference_tflops`), if it is set.
    - On a GPU, the figure of its data sheet; None if the GPU is not known, with what to set instead of the source.
    - On a CPU, the speed of a matrix product, which is measured now.
    """
    if configured is not None:
        return configured, REFERENCE_TFLOPS
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        tflops = peak_tflops(name)
        if not tflops:
            return tflops, f"the peak of {name} is not known: set {REFERENCE_TFLOPS}"
        return tflops, f"data sheet, dense bf16 or fp16, {name}"
    return measured_matmul_tflops(), f"fp32 matrix product measured at start, {torch.get_num_threads()} threads"


def measured_matmul_tflops(size: int = 768) -> float:
    """TFLOP/s of a matrix product [size, size] x [size, size] in fp32 on this CPU, the best of four."""
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
    """Model FLOPs of forward and backward for one token, causal attention included (the count of Kaplan et al. 2020).

    `width`: of the hidden states. `mean_length`: tokens of a document. Each weight costs 2 in the forward pass and 2 in the
    backward pass for the gradient of its input; a trained one 2 more for its own gradient.
    """
    frozen_matmul_parameters = matmul_parameters - trainable_matmul_parameters
    attention_flops = 6.0 * layers * width * mean_length
    return 6.0 * trainable_matmul_parameters + 4.0 * frozen_matmul_parameters + attention_flops
