"""Per-step metrics: buffered on the device, read and summed over ranks once a logging interval."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from strategies.base import Engine, StepResult
from strategies.communication_counters import CommunicationTotals, count_communication
from strategies.runtime import Runtime, peak_memory_gib_by_metric, sum_over_ranks
from trainer.reporting import expert_load, gpu_meters
from trainer.reporting.block_times import BlockTimer
from trainer.reporting.step_times import STEP_PARTS, StepPartTimes, timed_engine

COUNTED_STEP = 2
"""Number of the step of an attempt whose communication is counted. In the first, engines still find out what they need when."""


@dataclass(slots=True)
class StepRecord:
    """The numbers of one step, as this rank has them; tensors stay on the device until the flush."""

    step: int
    lr: float
    tokens: int
    supervised_tokens: int
    total_tokens: int
    """Tokens since the start of the run."""
    total_supervised_tokens: int
    counts: dict[str, float]
    """What terms of the loss are divided by, of all ranks together, such as {"loss": 4096.0} target tokens."""
    local_sums: dict[str, Tensor]
    """Sums of this rank by term, such as `loss` and `kl`; each a tensor of one number."""
    result: StepResult
    local_tokens: int
    """Tokens of this rank."""
    wait_s: float
    """Seconds that this rank waited for data."""
    source_tokens: dict[str, int] = field(default_factory=dict)
    """See `StepBatch.source_tokens`."""
    source_counts: dict[str, float] = field(default_factory=dict)
    """See `StepBatch.source_counts`."""
    balance: float = 1.0
    """See `StepBatch.parallel_efficiency`."""
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
        """Seconds that the blocks computed for each token of this rank."""
        return self.seconds / max(1.0, self.tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMeasurements:
    """What one rank measured of itself in an interval, as a row of numbers that a reduction can carry to all ranks."""

    peaks_gib: dict[str, float]
    """Peaks of memory in GiB, as `peak_memory_gib_by_metric` names them; every rank has the same names in the same order."""
    block_time: RankTime
    gpu_means: list[float]
    """`GpuWatcher.means`; empty if the rank has no GPU."""

    def to_row(self) -> list[float]:
        """The numbers in the order peaks, block time, GPU."""
        block_time = [self.block_time.seconds, self.block_time.tokens, self.block_time.step_s]
        return [*self.peaks_gib.values(), *block_time, *self.gpu_means]

    def from_row(self, row: list[float]) -> RankMeasurements:
        """The measurements of another rank, from its `to_row`. Its peaks have the same names as this rank's."""
        num_peaks = len(self.peaks_gib)
        seconds, tokens, step_s = row[num_peaks : num_peaks + 3]
        return RankMeasurements(
            peaks_gib=dict(zip(self.peaks_gib, row[:num_peaks], strict=True)),
            block_time=RankTime(seconds=seconds, tokens=tokens, step_s=step_s),
            gpu_means=row[num_peaks + 3 :],
        )


class _MeanStep(NamedTuple):
    """Means over the steps of one logging interval."""

    tokens: float
    supervised_tokens: float
    train_s: float
    """Seconds of a step, without writing and scoring answers."""


@dataclass(slots=True)
class Meter:
    """Buffers the records of steps, measures speed and memory, and turns both into rows of `metrics.jsonl`."""

    runtime: Runtime
    flops_per_token: float
    reference_tflops: float | None
    objective_metrics: tuple[str, ...] = ()
    """Terms of the objective that are logged beside the loss, each divided by the loss's count."""
    expert_tokens: Tensor | None = None
    """`[layers, experts]`: how many tokens chose each expert in the last interval, all ranks together."""
    peaks: dict[str, float] = field(default_factory=dict)
    """Largest of all ranks' peaks of memory up to the last flush, as `peak_memory_gib_by_metric` names them."""
    seconds_until_first_step: float | None = None
    """Age of this process at the first step; None before it, and where the system does not tell."""
    part_times: StepPartTimes | None = None
    """Times the parts of steps (`logging.step_parts`); None if that is off."""
    evaluation_s: float = 0.0
    """Seconds of `seconds_until_first_step` that the evaluation before the first step took."""
    block_timer: BlockTimer | None = None
    """Times what this rank's blocks compute, in the first step of each interval."""
    expert_ranks: int = 1
    """Ranks over which the experts of a layer are distributed."""
    communication_totals: CommunicationTotals | None = None
    """What this rank exchanged in the step that was counted; None before it, and of a single rank."""
    times_by_rank: list[RankTime] = field(default_factory=list)
    """What each rank computed in the last interval, by rank; equal on all ranks."""
    gpu_watcher: gpu_meters.GpuWatcher | None = None
    """Looks at this rank's GPU; None where it has none."""
    _gpu_metrics: dict[str, float] = field(default_factory=dict)
    """What all ranks' GPUs did in the last interval, as rows have it."""
    _records: list[StepRecord] = field(default_factory=list)
    _num_steps: int = 0
    """Steps taken by this process."""
    _interval_began_at: float = field(default_factory=time.perf_counter)
    _mean_steps: list[_MeanStep] = field(default_factory=list)
    """The mean step of each flushed interval, the earliest first."""

    def start_clock(self, evaluation_s: float) -> None:
        """Start to measure: the clock of steps, and a thread that reads this rank's GPU. Called before the first step of a start.

        `evaluation_s`: seconds that the evaluation before the first step took. They are reported apart from those of starting.
        """
        self.seconds_until_first_step = process_age_s()
        self.evaluation_s = evaluation_s
        if self.runtime.kind == "cuda":
            self.gpu_watcher = gpu_meters.GpuWatcher(self.runtime.device)
            self.gpu_watcher.start()
        self.restart_clock()

    def wrap_with_timing(self, engine: Engine) -> Engine:
        """Wrap the engine so that the parts of each step are timed (`logging.step_parts`): forward, backward, optimizer.

        Sets `part_times`, from which rows get `forward_s`, `backward_s` and `optimizer_s`.
        """
        self.part_times = StepPartTimes(self.runtime.device)
        return timed_engine(engine, self.part_times)

    def time_blocks(self, blocks: list[nn.Module], *, expert_ranks: int = 1) -> None:
        """Time the forward passes of the model's blocks by hooks, so that a rank that computes more slowly is found.

        With one rank there is nobody to compare with, and nothing is timed. `expert_ranks`: ranks over which the experts of
        a layer are distributed, for the metrics of how even their load is.
        """
        self.expert_ranks = expert_ranks
        if self.runtime.world_size > 1:
            self.block_timer = BlockTimer(self.runtime.device)
            self.block_timer.watch(blocks, has_collectives_inside=self.runtime.sequence_size > 1)

    @contextmanager
    def measuring_step(self) -> Iterator[None]:
        """A context around each step that switches on what is measured in some steps only, since measuring costs a little.

        The blocks are timed in the first step of each logging interval. With several ranks, the collectives of step
        `COUNTED_STEP` of this process are counted, which sets `communication_totals`.
        """
        self._num_steps += 1
        if self.block_timer is not None:
            is_first_of_interval = not self._records
            self.block_timer.is_on = is_first_of_interval
        # Counting costs a little in each collective, so it is on in one step of a process only.
        if self._num_steps != COUNTED_STEP or self.runtime.world_size == 1:
            yield
        else:
            with count_communication() as self.communication_totals:
                yield
        # What the blocks compute between steps (evaluations, answers of a round) is no part of a step.
        if self.block_timer is not None:
            self.block_timer.is_on = False

    def restart_clock(self) -> None:
        """Leave out the time since the last flush (evaluation, checkpoint) from the speed of the next steps."""
        self._interval_began_at = time.perf_counter()

    def add(self, record: StepRecord) -> None:
        """Keep one step's record; reads nothing from the device."""
        self._records.append(record)

    @property
    def num_buffered_steps(self) -> int:
        """Steps not yet flushed."""
        return len(self._records)

    def flush(self) -> list[dict[str, Any]]:
        """Turn the steps since the last flush into rows of `metrics.jsonl`, once a logging interval: one row for each step.

        Rows are equal on all ranks. A collective: all ranks must call, after the same steps. Here the host waits for the device.
        """
        records = self._records
        self._records = []
        if not records:
            return []
        term_names = sorted(records[0].local_sums)  # of the loss, such as `kl` and `loss`
        expert_tokens_by_step = [record.expert_tokens for record in records if record.expert_tokens is not None]
        # Everything that is summed over ranks goes into one table, for one reduction: a row for each step, with the columns
        # sums of the terms, tokens of each expert, seconds of the step's parts (forward, backward, update), wait for data,
        # tokens.
        table = self._sums_on_device(records, term_names, expert_tokens_by_step)
        host_columns = self._host_measurements(records)
        num_host_columns = host_columns.shape[1]
        table = torch.cat([table, host_columns.to(table.device)], dim=1)
        table, measurements_by_rank = self._sum_and_gather(table, self._own_measurements(records[0].local_tokens))
        self._set_measurements(measurements_by_rank)
        grad_norms = torch.stack([record.result.grad_norm for record in records]).tolist()
        skipped = torch.stack([record.result.skipped for record in records]).tolist()

        # The device has just caught up, so the interval's wall time is true even where single steps' would not be.
        step_s = (time.perf_counter() - self._interval_began_at) / len(records)
        self._interval_began_at = time.perf_counter()
        # Writing and scoring answers is no training: speeds are those of the rest.
        round_s = sum(record.round_s for record in records) / len(records)
        train_s = max(step_s - round_s, 1e-9)
        mean_tokens = sum(record.tokens for record in records) / len(records)
        mean_supervised_tokens = sum(record.supervised_tokens for record in records) / len(records)
        mean_step = _MeanStep(
            tokens=mean_tokens,
            supervised_tokens=mean_supervised_tokens,
            train_s=train_s,
        )
        self._mean_steps.append(mean_step)

        # Split the columns of the table, which are sums over all ranks now.
        term_sums = table[:, : len(term_names)].tolist()
        part_seconds = table[:, -num_host_columns:-2].tolist()
        waits_s = table[:, -2].tolist()
        expert_tokens = None
        if expert_tokens_by_step:
            expert_columns = table[:, len(term_names) : -num_host_columns]
            # [steps, layers, experts]
            expert_tokens = expert_columns.view(len(records), *expert_tokens_by_step[0].shape)
            self.expert_tokens = expert_tokens.sum(0)

        rows = []
        for index, record in enumerate(records):
            sums = dict(zip(term_names, term_sums[index], strict=True))
            row = self._row_of_step(record, sums, waits_s[index], grad_norms[index], train_s)
            if round_s:
                row |= {"step_s": step_s, "train_s": train_s}
            row |= record.facts
            if expert_tokens is not None:
                row |= expert_load.expert_metrics(expert_tokens[index], self.expert_ranks)
            # Means over ranks. Not strict: there are no seconds if the parts of steps are not timed.
            for part, seconds in zip(STEP_PARTS, part_seconds[index], strict=False):
                row[part] = seconds / self.runtime.world_size
            row |= self.peaks
            if skipped[index]:
                row["skipped"] = 1
            rows.append(row)
        rows[-1] |= self._gpu_metrics  # once an interval
        return rows

    def _sums_on_device(
        self, records: list[StepRecord], term_names: list[str], expert_tokens_by_step: list[Tensor]
    ) -> Tensor:
        """Put this rank's sums of each step into one table, so that a single reduction sums everything over ranks.

        Returns float64 [steps, terms + layers * experts], on the device: the terms of the loss in the order of `term_names`,
        then how many tokens chose each expert. `expert_tokens_by_step`: [layers, experts] a step; empty for a model without
        experts.
        """
        sums_by_step = []
        for record in records:
            sums_by_step.append(torch.stack([record.local_sums[term].double() for term in term_names]))
        table = torch.stack(sums_by_step)
        if not expert_tokens_by_step:
            return table
        tokens_by_expert = torch.stack(expert_tokens_by_step).double().flatten(start_dim=1)
        return torch.cat([table, tokens_by_expert], dim=1)

    def _host_measurements(self, records: list[StepRecord]) -> Tensor:
        """What this rank's host measured of each step, to be summed over ranks: float64 [steps, parts + 2], on the CPU.

        The columns are the seconds of the step's parts (`STEP_PARTS`: forward, backward, update; none if they are not
        timed), of the wait for data, and the tokens.
        """
        if self.part_times is None:
            part_seconds: list[list[float]] = [[] for _ in records]
        else:
            part_seconds = self.part_times.take_seconds_by_step()
        step_columns = []
        for record, seconds in zip(records, part_seconds, strict=True):
            step_columns.append([*seconds, record.wait_s, float(record.local_tokens)])
        return torch.tensor(step_columns, dtype=torch.float64)

    def _own_measurements(self, tokens: int) -> RankMeasurements:
        """What this rank measured of itself since the last flush, for all ranks: memory, computing time, and its GPU.

        `tokens`: its tokens of the interval's first step, the one whose blocks are timed.
        """
        return RankMeasurements(
            peaks_gib=peak_memory_gib_by_metric(self.runtime.device),
            block_time=RankTime(
                seconds=0.0 if self.block_timer is None else self.block_timer.read(),
                tokens=tokens,
                step_s=self._mean_steps[-1].train_s if self._mean_steps else 0.0,
            ),
            gpu_means=[] if self.gpu_watcher is None else self.gpu_watcher.means(),
        )

    def _sum_and_gather(self, table: Tensor, own: RankMeasurements) -> tuple[Tensor, list[RankMeasurements]]:
        """Sum `table` over all ranks, and collect what each rank measured of itself (`own`), in one reduction.

        Returns the sum, on the host, and the measurements in rank order. All ranks must call. To gather by a sum, each rank
        fills its own row of a table of zeros that has a row for each rank.
        """
        own_row = own.to_row()
        rows = torch.zeros(self.runtime.world_size, len(own_row), dtype=table.dtype)
        rows[self.runtime.rank] = torch.tensor(own_row, dtype=table.dtype)
        reduced = sum_over_ranks(torch.cat([table.view(-1), rows.view(-1).to(table.device)])).cpu()
        summed_table, gathered_rows = reduced.split([table.numel(), rows.numel()])
        measurements_by_rank = [own.from_row(row) for row in gathered_rows.view_as(rows).tolist()]
        return summed_table.view(table.shape), measurements_by_rank

    def _set_measurements(self, measurements_by_rank: list[RankMeasurements]) -> None:
        """Keep what the ranks measured of themselves in this interval, in rank order.

        `peaks` gets the largest memory of any rank, `times_by_rank` the computing time of each, `_gpu_metrics` what rows
        show of the GPUs (empty without).
        """
        self.peaks = {}
        for name in measurements_by_rank[0].peaks_gib:
            self.peaks[name] = max(measurements.peaks_gib[name] for measurements in measurements_by_rank)
        self.times_by_rank = [measurements.block_time for measurements in measurements_by_rank]
        gpu_means_by_rank = [measurements.gpu_means for measurements in measurements_by_rank]
        self._gpu_metrics = gpu_meters.gpu_metrics_of_row(gpu_means_by_rank) if gpu_means_by_rank[0] else {}

    def median_speeds(self) -> dict[str, float]:
        """How fast the run trained, for its last lines and its record: medians over logging intervals, of each one's mean step.

        {"intervals": 9, "tokens_per_s": 5100.0, "mfu": 0.41, "step_s": 0.8, ...}. Empty before the first flush. The first
        interval, which warms up, is left out if there are others.
        """
        mean_steps = self._mean_steps_after_warmup()
        if not mean_steps:
            return {}
        values_by_name: dict[str, list[float]] = {}
        for mean_step in mean_steps:
            speeds = self._speeds_of_step(mean_step.tokens, mean_step.train_s)
            speeds |= {
                "supervised_tokens_per_s": mean_step.supervised_tokens / mean_step.train_s,
                "step_s": mean_step.train_s,
            }
            for name, value in speeds.items():
                values_by_name.setdefault(name, []).append(value)
        medians = {name: median(values) for name, values in values_by_name.items()}
        return {"intervals": len(mean_steps), **medians}

    def median_step_s(self) -> float | None:
        """Median seconds of a step over logging intervals, without writing and scoring answers; None before the first flush."""
        mean_steps = self._mean_steps_after_warmup()
        return median(mean_step.train_s for mean_step in mean_steps) if mean_steps else None

    def _mean_steps_after_warmup(self) -> list[_MeanStep]:
        """The mean steps of all intervals but the first, which fills caches and chooses kernels, if there are others."""
        return self._mean_steps[1:] or self._mean_steps

    def _speeds_of_step(self, tokens: float, step_s: float) -> dict[str, float]:
        """The speeds that a row shows: {"tokens_per_s": 5100.0, "tokens_per_s_per_rank": 1275.0, "mfu": 0.41}.

        `tokens`: of the step, all ranks together. `step_s`: seconds that it took. `mfu` (the share of the device's peak that
        the model's own arithmetic reaches) is missing if that peak is not known.
        """
        world_size = self.runtime.world_size
        speeds = {"tokens_per_s": tokens / step_s, "tokens_per_s_per_rank": tokens / step_s / world_size}
        if self.reference_tflops:
            peak_flops = self.reference_tflops * 1e12
            speeds["mfu"] = self.flops_per_token * tokens / step_s / world_size / peak_flops
        return speeds

    def _row_of_step(
        self, record: StepRecord, sums: dict[str, float], wait_s: float, grad_norm: float, step_s: float
    ) -> dict[str, Any]:
        """Write a step's row of `metrics.jsonl`, which trackers get too: {"step": 40, "loss": 1.7, "lr": 1e-4, ...}.

        `sums`: each term of the loss (`loss`, `kl`, `loss/SOURCE`), summed over tokens and ranks, and the shares
        `router/...` and `logits/...`. `wait_s`: seconds that all ranks together waited for data. `step_s`: mean seconds of a
        step in the interval.
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
            **self._speeds_of_step(record.tokens, step_s),
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
        for name in self.objective_metrics:
            row[name] = sums[name] / loss_count
        # These are shares of the whole batch already: nothing is left to divide by.
        for name, share in sums.items():
            if name.startswith(("router/", "logits/")):
                row[name] = share
        return row


def process_age_s() -> float | None:
    """Seconds since this process was started, to a hundredth, to tell how long a run takes to its first step.

    None where the system does not tell; Linux does.
    """
    try:
        status = Path("/proc/self/stat").read_text(encoding="utf-8")
        # Field 22, `starttime`, in ticks since boot (proc(5)). The second field is a name in brackets that may hold blanks.
        fields_after_name = status.rsplit(")", 1)[1].split()
        start_ticks = int(fields_after_name[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
