"""Reads the files of a run directory, and computes the numbers that are compared."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from launch.compare.interval import Interval
from strategies import atomic_io
from strategies.errors import ConfigError, StorageError
from trainer.checkpoints.layout import checkpoint_dirs_of, checkpoints_in
from trainer.config.resuming import KINDS_OF_CHANGE, flatten_settings
from trainer.reporting.metric_names import POSITION_METRICS
from trainer.reporting.metric_rows import METRICS_FILE, MetricRows, read_rows
from trainer.reporting.run_record import (
    MAX_RECORD_BYTES,
    RUN_RECORD,
    MeasuredCost,
    PredictedCost,
    Receipt,
    RunRecord,
    read_run_record,
)
from trainer.reporting.settings_file import read_settings_tree
from trainer.reporting.status import RunState, read_failure, read_status

BYTES_PER_GIB = 2**30


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """One run as it recorded itself, read from the files of its directory (or from W&B); what it never wrote is empty."""

    directory: Path
    config: dict[str, Any]
    """Leaves of `config.yaml` by dotted key."""
    identity: dict[str, dict[str, Any]]
    """`identity.json`: what the run was computed from, by kind (`data`, `order`, `objective` ...)."""
    record: RunRecord
    """`run.json`; an empty record if there is none."""
    status: dict[str, Any]
    failure: dict[str, Any]
    steps: dict[int, dict[str, Any]]
    """Rows of `metrics.jsonl` by step, in its order."""
    evaluations: dict[int, dict[str, float]]
    """Held-out metrics by step; 0 is before the first."""
    events: tuple[dict[str, Any], ...] = ()
    """Lines of `events.jsonl`: steps that stood out."""
    unreadable_lines: int = 0
    """Lines of both files that are no rows, and are left out; of a run in W&B's files, damaged places that were skipped."""
    metrics_written_at: float = 0.0
    """When `metrics.jsonl` was last written, in seconds since 1970; 0 if it was not."""

    @property
    def state(self) -> str:
        """`done`, `failed`, `preempted`, `running`, or `not started` if the run left no status."""
        return str(self.status.get("state") or ("failed" if self.failure else "not started"))

    @property
    def unfinished_state(self) -> str | None:
        """State and last step of a run that is not done, such as `failed at step 3`, or `not started`; None if it is done."""
        if self.state == RunState.done:
            return None
        # While a run trains, its status may still have the step of the start or of a resume. The rows have the last one.
        last_step = max(self.status.get("step") or self.failure.get("step") or 0, max(self.steps, default=0))
        return f"{self.state} at step {last_step}" if last_step else self.state

    @property
    def reason(self) -> str | None:
        """State, last step and the reason why the run ended, on one line: `failed at step 3: out of memory`.

        Of a run that is running: when it was last seen. None for a run that is done.
        """
        if self.state == RunState.running:
            last_seen_at = max(self.status.get("time") or 0, self.metrics_written_at)
            last_seen = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(last_seen_at))
            return f"{self.unfinished_state}, last seen at {last_seen}"
        message = self.status.get("reason") or self.failure.get("message")
        if not self.unfinished_state or not message:
            return self.unfinished_state
        one_line = " ".join(str(message).split())
        return f"{self.unfinished_state}: {one_line}"


@dataclass(frozen=True, slots=True)
class RunMeasurements:
    """The numbers of one run that a comparison shows: speed, memory, times, losses. None where the run did not get so far.

    They are of all ranks together, in GiB and seconds. A receipt is what a run recorded in `run.json` of its plan and its
    costs.
    """

    steps: int
    loss: float | None
    """Of the last step."""
    tokens_per_s: float | None
    """This and the next three: medians over the steps behind the first logging interval."""
    supervised_tokens_per_s: float | None
    mfu: float | None
    step_s: float | None
    tokens_per_s_quartiles: Interval | None
    """The lower and the upper quartile: half of the steps lie between them."""
    warmup_steps: int
    """Steps left out of the medians, the first logging interval's as a rule; 0 where there are no others."""
    memory_gib: float | None
    """The largest peak of all ranks and steps."""
    memory_reserved_gib: float | None
    """The largest memory that the allocator reserved, of all ranks and steps; on GPUs only."""
    checkpoint_gib: float | None
    """The newest checkpoint that still lies there, or in `checkpoint.fallback_dir`."""
    checkpoint_s: float | None
    """Until the last one of the last attempt was published. This and the next four: from the receipt in `run.json`."""
    start_s: float | None
    """From the start of the last attempt to its first step."""
    evaluation_before_s: float | None
    """Seconds of `start_s` that the evaluation before the first step took."""
    planned_gib: float | None
    """Memory that the plan expected a rank to take."""
    planned_by: str | None
    """How `planned_gib` was computed, in words."""
    exchanged_gib: float | None = None
    """What rank 0 exchanged in a step, from the receipt. Each collective counts the whole tensor that is gathered or reduced."""
    planned_exchanged_gib: float | None = None
    """What the plan at the start predicted for `exchanged_gib`."""
    exchanged_bytes: dict[str, float] = field(default_factory=dict)
    """`exchanged_gib` by collective, in bytes."""
    exposed_s: float | None = None
    """Seconds of that step in which it waited for exchange. docs/reference/comparisons.md says on which devices that is known."""
    metrics_before_training: dict[str, float] = field(default_factory=dict)
    """Held-out metrics before the first step."""
    metrics_at_end: dict[str, float] = field(default_factory=dict)
    """Held-out metrics of the last evaluation."""

    @property
    def start_without_evaluation_s(self) -> float | None:
        """Seconds that the run took to start: up to its first step, without the evaluation before it. None if not known."""
        if self.start_s is None:
            return None
        return self.start_s - (self.evaluation_before_s or 0)


def is_run_directory(directory: Path) -> bool:
    """Whether the directory is that of a run, which has a `config.yaml` before it starts."""
    return (directory / "config.yaml").is_file()


def read_recorded_run(run_dir: Path) -> RecordedRun:
    """Read everything that a run wrote into its directory, for a comparison or a report.

    Files that the run did not get to write count as empty. Raises ConfigError if it is no run directory, or a file is
    damaged.
    """
    if not is_run_directory(run_dir):
        raise ConfigError(f"{run_dir}: not a run directory (there is no config.yaml in it)")
    metrics = _read_json_rows(run_dir / METRICS_FILE)
    events = _read_json_rows(run_dir / "events.jsonl")
    steps, evaluations = _split_training_and_evaluation_rows(metrics.rows)
    return RecordedRun(
        directory=run_dir,
        config=_read_config(run_dir / "config.yaml"),
        identity=_read_identity(run_dir / "identity.json"),
        record=_read_record(run_dir),
        status=read_status(run_dir),
        failure=read_failure(run_dir),
        steps=steps,
        evaluations=evaluations,
        events=tuple(events.rows),
        unreadable_lines=len(metrics.unreadable) + len(events.unreadable),
        metrics_written_at=_written_at(run_dir / METRICS_FILE),
    )


def _written_at(path: Path) -> float:
    """When a file was last written, in seconds since 1970; 0 if it does not exist."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _read_config(path: Path) -> dict[str, Any]:
    """The settings of a run, from its `config.yaml`, by dotted key: {"optim.lr": 1e-4, ...}.

    Raises ConfigError if it is another program's file.
    """
    tree = read_settings_tree(path)
    if "strategy" not in tree:
        raise ConfigError(f"{path}: not the configuration of a run of shardtune")
    return flatten_settings(tree)


def _read_record(run_dir: Path) -> RunRecord:
    """The run's `run.json`; an empty record if it failed before its model was built, or has not started."""
    if not (run_dir / RUN_RECORD).exists():
        return RunRecord()
    try:
        return read_run_record(run_dir)
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable_file_error(run_dir / RUN_RECORD, error) from error


def _read_identity(path: Path) -> dict[str, dict[str, Any]]:
    """Read from `identity.json` what a run was computed from, so that only losses of the same documents are compared.

    Returns {kind: {key: value}} for the kinds `data`, `order`, `objective` and so on, such as {"data": {"fingerprint":
    "3f9a..."}}. Empty if the run ended before its data was prepared. Raises ConfigError if the file cannot be read or has
    another form.
    """
    if not path.exists():
        return {}
    try:
        identity = json.loads(atomic_io.read_bytes(path, max_bytes=MAX_RECORD_BYTES))
        if not isinstance(identity, dict):
            raise ValueError("it holds no object")
        for kind in KINDS_OF_CHANGE:
            if not isinstance(identity.get(kind) or {}, dict):
                raise ValueError(f"{kind} is not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable_file_error(path, error) from error
    return identity


def _unreadable_file_error(path: Path, error: Exception) -> ConfigError:
    """The error for a damaged file of a run, which says how to compare the other runs."""
    return ConfigError(f"{path}: cannot be read ({error}); leave this run out of the comparison")


def _split_training_and_evaluation_rows(
    rows: list[dict[str, Any]],
) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, float]]]:
    """Sort the rows of `metrics.jsonl` into ({step: row of a training step}, {step: held-out metrics of an evaluation}).

    A training row is kept whole. Of an evaluation's row only its numbers are kept, without those that say how far the run
    was.
    """
    steps: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, float]] = {}
    for row in rows:
        is_training_step = "loss" in row  # the row of an evaluation has `eval/loss` instead
        if is_training_step:
            steps[row["step"]] = row
            continue
        metrics: dict[str, float] = {}
        for name, value in row.items():
            if name not in POSITION_METRICS and isinstance(value, int | float):
                metrics[name] = value
        evaluations[row["step"]] = metrics
    return steps, evaluations


def _read_json_rows(path: Path) -> MetricRows:
    """Read the rows of `metrics.jsonl` or `events.jsonl`; the result also lists the lines that are no rows.

    No rows if the file does not exist. Raises ConfigError if it cannot be read.
    """
    try:
        return read_rows(path)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({atomic_io.error_summary(error)}); leave this run out of the comparison"
        ) from error


def rows_after_warmup(run: RecordedRun, warmup_steps: int) -> list[dict[str, Any]]:
    """The rows of the training steps that count for speeds: the first steps, which are slower, are left out.

    Left out are the steps up to the end of the logging interval in which the last of `warmup_steps` is: with one warm-up
    step and `logging.every_steps=10`, steps 1 to 10. Empty if the run ended before.
    """
    interval = int(run.config.get("logging.every_steps") or 1)
    first_step = min(run.steps, default=0)  # that of a resumed run may be a later one
    last_warmup_step = first_step - 1 + warmup_steps
    # To the end of its interval, as in the run's own medians: the first interval has caches to fill and kernels to choose.
    last_left_out_step = math.ceil(last_warmup_step / interval) * interval
    return [row for step, row in run.steps.items() if step > last_left_out_step]


def measure_run(run: RecordedRun, warmup_steps: int = 1) -> RunMeasurements:
    """Compute the numbers of a run that a comparison shows, such as its median speed, largest memory and last loss.

    Speeds are medians over the rows after the warm-up, or over all rows if there are none after it. `warmup_steps`: first
    steps that do not count, together with the rest of their logging interval.

    Times of start and checkpoint, and what was planned, come from the receipt, which the run wrote into `run.json`. A run
    of an early version, or one that failed, has none.
    """
    rows = list(run.steps.values())
    counted_rows = rows_after_warmup(run, warmup_steps)
    rows_for_speed = counted_rows or rows

    def median_of(metric: str) -> float | None:
        values = _finite_numbers(rows_for_speed, metric)
        return median(values) if values else None

    last_losses = _finite_numbers(rows[-1:], "loss")  # empty before the first step, and for a loss that is not finite
    receipt = run.record.receipt or Receipt()
    predicted = receipt.predicted or PredictedCost()
    measured = receipt.measured or MeasuredCost()
    return RunMeasurements(
        steps=len(rows),
        loss=last_losses[0] if last_losses else None,
        tokens_per_s=median_of("tokens_per_s"),
        supervised_tokens_per_s=median_of("supervised_tokens_per_s"),
        mfu=median_of("mfu"),
        step_s=median_of("step_s"),
        tokens_per_s_quartiles=_quartiles(_finite_numbers(rows_for_speed, "tokens_per_s")),
        warmup_steps=len(rows) - len(counted_rows) if counted_rows else 0,
        memory_gib=max(_finite_numbers(rows, "memory_gib"), default=None),
        memory_reserved_gib=max(_finite_numbers(rows, "memory_reserved_gib"), default=None),
        checkpoint_gib=_newest_checkpoint_gib(run),
        checkpoint_s=measured.checkpoint_s,
        start_s=measured.start_s,
        evaluation_before_s=measured.evaluation_before_s,
        planned_gib=predicted.memory_gib,
        planned_by=predicted.memory_by,
        exchanged_gib=_total_gib(measured.exchanged_bytes),
        planned_exchanged_gib=_total_gib(predicted.exchanged_bytes),
        exchanged_bytes=_with_zero_for_null(measured.exchanged_bytes or {}),
        exposed_s=measured.exposed_s,
        metrics_before_training=run.evaluations.get(0, {}),
        metrics_at_end=last_held_out_metrics(run),
    )


def _quartiles(values: list[float]) -> Interval | None:
    """The lower and the upper quartile, between which half of the values lie; None for fewer than two values."""
    if len(values) < 2:
        return None
    lower, _, upper = quantiles(values, n=4, method="inclusive")
    return Interval(lower, upper)


def last_held_out_metrics(run: RecordedRun) -> dict[str, float]:
    """The metrics of the run's last evaluation, such as {"eval/loss": 2.31}; empty if none took place after the first step."""
    last_step = max(run.evaluations, default=0)
    return run.evaluations[last_step] if last_step > 0 else {}


def _finite_numbers(rows: list[dict[str, Any]], metric: str) -> list[float]:
    """The values of a metric in the rows, without those that are not finite: the file has null for NaN and infinity."""
    return [row[metric] for row in rows if isinstance(row.get(metric), int | float)]


def _with_zero_for_null(bytes_by_collective: dict[str, float]) -> dict[str, float]:
    """The sizes with 0 in place of null, which `run.json` has for a number that is not finite."""
    return {collective: size_bytes or 0.0 for collective, size_bytes in bytes_by_collective.items()}


def _total_gib(bytes_by_collective: dict[str, float] | None) -> float | None:
    """Add up the bytes of all collectives, such as {"all_gather": 8e9, "reduce_scatter": 4e9}, in GiB.

    None if none were recorded.
    """
    if bytes_by_collective is None:
        return None
    return sum(_with_zero_for_null(bytes_by_collective).values()) / BYTES_PER_GIB


def _newest_checkpoint_gib(run: RecordedRun) -> float | None:
    """The size on disk of the run's newest checkpoint, in GiB; None if there is none, or if the run is just deleting it."""
    try:
        checkpoints = checkpoints_in(checkpoint_dirs_of(run.directory, run.config.get("checkpoint.fallback_dir")))
        if not checkpoints:
            return None
        _, newest_dir = checkpoints[-1]  # (step, directory) of each, the oldest first
        return sum(file.stat().st_size for file in newest_dir.rglob("*") if file.is_file()) / BYTES_PER_GIB
    except (OSError, StorageError):
        return None
