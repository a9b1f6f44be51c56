"""Reads the files of a run directory, and computes the numbers that are compared."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from strategies import atomic_io
from strategies.errors import ConfigError, StorageError
from trainer.checkpoints.layout import checkpoint_dirs_of, checkpoints_in
from trainer.config.resuming import KINDS, flatten_settings
from trainer.reporting.metric_names import POSITIONS
from trainer.reporting.metric_rows import METRICS, MetricRows, read_rows
from trainer.reporting.run_record import (
    MOST_BYTES,
    RUN_RECORD,
    MeasuredCost,
    PredictedCost,
    Receipt,
    RunRecord,
    read_run_record,
)
from trainer.reporting.settings_file import read_tree
from trainer.reporting.status import State, read_failure, read_status

GIB = 2**30
RATES = ("tokens_per_s", "supervised_tokens_per_s", "mfu", "step_s")


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """One run, read from the files of its directory (or from a tracker); what it never wrote is empty."""

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

    @property
    def state(self) -> str:
        """`done`, `failed`, `preempted`, `running`, or `not started` if the run left no status."""
        return str(self.status.get("state") or ("failed" if self.failure else "not started"))

    @property
    def unfinished_state(self) -> str | None:
        """State and last step of a run that is not done, such as `failed at step 3`; None if it is done."""
        if self.state == State.done:
            return None
        last_step = self.status.get("step") or self.failure.get("step") or max(self.steps, default=None)
        return f"{self.state} at step {last_step}" if last_step else self.state

    @property
    def reason(self) -> str | None:
        """State, last step and the reason why the run ended, on one line; None for a run that is done."""
        if self.state == State.running:
            last_seen = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.status.get("time") or 0))
            return f"{self.unfinished_state}, last seen at {last_seen}"
        message = self.status.get("reason") or self.failure.get("message")
        if not self.unfinished_state or not message:
            return self.unfinished_state
        one_line = " ".join(str(message).split())
        return f"{self.unfinished_state}: {one_line}"


@dataclass(frozen=True, slots=True)
class RunMeasurements:
    """Numbers of one run, None where it did not get so far. All ranks together; GiB, seconds."""

    steps: int
    loss: float | None
    """Of the last step."""
    tokens_per_s: float | None
    """This and the next three: medians over the steps behind the first logging interval."""
    supervised_tokens_per_s: float | None
    mfu: float | None
    step_s: float | None
    tokens_per_s_quartiles: tuple[float, float] | None
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
    before: dict[str, float] = field(default_factory=dict)
    """Held-out metrics before the first step."""
    after: dict[str, float] = field(default_factory=dict)
    """Held-out metrics of the last evaluation."""


def is_run_directory(directory: Path) -> bool:
    """Whether the directory is that of a run: every run writes its `config.yaml` before it starts."""
    return (directory / "config.yaml").is_file()


def read_recorded_run(directory: Path) -> RecordedRun:
    """Read all files of one run directory. Raises ConfigError where it is none, or one of its files is damaged."""
    if not is_run_directory(directory):
        raise ConfigError(f"{directory}: not a run directory (there is no config.yaml in it)")
    metrics = _read_metric_rows(directory / METRICS)
    events = _read_metric_rows(directory / "events.jsonl")
    steps, evaluations = _split_by_step(metrics.rows)
    return RecordedRun(
        directory=directory,
        config=_read_config(directory / "config.yaml"),
        identity=_read_identity(directory / "identity.json"),
        record=_read_record(directory),
        status=read_status(directory),
        failure=read_failure(directory),
        steps=steps,
        evaluations=evaluations,
        events=tuple(events.rows),
        unreadable_lines=len(metrics.unreadable) + len(events.unreadable),
    )


def _read_config(path: Path) -> dict[str, Any]:
    """The settings in `config.yaml` by dotted key. Errors: ConfigError if it is another program's file."""
    tree = read_tree(path)
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
    """`identity.json`, an object for each kind of difference; empty if the run ended before its data was prepared."""
    if not path.exists():
        return {}
    try:
        identity = json.loads(atomic_io.read_bytes(path, max_bytes=MOST_BYTES))
        if not isinstance(identity, dict):
            raise ValueError("it holds no object")
        for kind in KINDS:
            if not isinstance(identity.get(kind) or {}, dict):
                raise ValueError(f"{kind} is not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable_file_error(path, error) from error
    return identity


def _unreadable_file_error(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{path}: cannot be read ({error}); leave this run out of the comparison")


def _split_by_step(rows: list[dict[str, Any]]) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, float]]]:
    """Split the rows of `metrics.jsonl` into (rows of training steps, held-out metrics of evaluations), both by step."""
    steps: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, float]] = {}
    for row in rows:
        if "loss" in row:  # only the row of a training step has it: in that of an evaluation it is called `eval/loss`
            steps[row["step"]] = row
            continue
        metrics: dict[str, float] = {}
        for name, number in row.items():
            if name not in POSITIONS and isinstance(number, int | float):
                metrics[name] = number
        evaluations[row["step"]] = metrics
    return steps, evaluations


def _read_metric_rows(path: Path) -> MetricRows:
    """The rows of `metrics.jsonl` or `events.jsonl`; lines that are no rows are listed apart. Errors: ConfigError."""
    try:
        return read_rows(path)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({atomic_io.error_summary(error)}); leave this run out of the comparison"
        ) from error


def rows_after_warmup(run: RecordedRun, warmup_steps: int) -> list[dict[str, Any]]:
    """Rows of the steps that count for speeds: those after the `warmup_steps` and after the logging interval these end in.

    With one warm-up step and `logging.every_steps=10`, these are the steps from 11 on. Empty if the run ended before.
    """
    interval = int(run.config.get("logging.every_steps") or 1)
    first_step = min(run.steps, default=0)
    # As in the run's own medians: the first interval has caches to fill and kernels to choose.
    last_warmup_step = first_step - 1 + warmup_steps
    interval_end = math.ceil(last_warmup_step / interval) * interval
    return [row for step, row in run.steps.items() if step > interval_end]


def measure(run: RecordedRun, warmup_steps: int = 1) -> RunMeasurements:
    """The numbers of a run that are compared. Speeds are medians over the rows after the warm-up, or over all rows if none is."""
    rows = list(run.steps.values())
    counted_rows = rows_after_warmup(run, warmup_steps)
    rates = {key: _finite_numbers(counted_rows or rows, key) for key in RATES}
    medians: dict[str, float | None] = dict.fromkeys(RATES)
    for key, values in rates.items():
        if values:
            medians[key] = median(values)
    last_loss = _finite_numbers(rows[-1:], "loss")  # empty before the first step, and for a loss that is not finite

    receipt = run.record.receipt or Receipt()
    predicted = receipt.predicted or PredictedCost()
    measured = receipt.measured or MeasuredCost()
    return RunMeasurements(
        steps=len(rows),
        loss=last_loss[0] if last_loss else None,
        **medians,
        tokens_per_s_quartiles=_quartiles(rates["tokens_per_s"]),
        warmup_steps=len(rows) - len(counted_rows) if counted_rows else 0,
        memory_gib=max(_finite_numbers(rows, "memory_gib"), default=None),
        memory_reserved_gib=max(_finite_numbers(rows, "memory_reserved_gib"), default=None),
        checkpoint_gib=_checkpoint_gib(run),
        checkpoint_s=measured.checkpoint_s,
        start_s=measured.start_s,
        evaluation_before_s=measured.evaluation_before_s,
        planned_gib=predicted.memory_gib,
        planned_by=predicted.memory_by,
        exchanged_gib=_total_gib(measured.exchanged_bytes),
        planned_exchanged_gib=_total_gib(predicted.exchanged_bytes),
        exchanged_bytes=_null_as_zero(measured.exchanged_bytes or {}),
        exposed_s=measured.exposed_s,
        before=run.evaluations.get(0, {}),
        after=last_held_out_metrics(run),
    )


def _quartiles(values: list[float]) -> tuple[float, float] | None:
    if len(values) < 2:
        return None
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high


def last_held_out_metrics(run: RecordedRun) -> dict[str, float]:
    """Held-out metrics of the last evaluation after the first step; empty if there was none."""
    last_step = max(run.evaluations, default=0)
    return run.evaluations[last_step] if last_step > 0 else {}


def _finite_numbers(rows: list[dict[str, Any]], key: str) -> list[float]:
    """The numbers under `key`, of the rows that have one. NaN and infinity stand as null in the file, and are left out."""
    return [row[key] for row in rows if isinstance(row.get(key), int | float)]


def _null_as_zero(bytes_by_collective: dict[str, float]) -> dict[str, float]:
    """The sizes with 0 instead of null, which the record has for a number that is not finite."""
    return {collective: size_bytes or 0.0 for collective, size_bytes in bytes_by_collective.items()}


def _total_gib(bytes_by_collective: dict[str, float] | None) -> float | None:
    """What all collectives together exchanged, in GiB; None if it was not recorded."""
    if bytes_by_collective is None:
        return None
    return sum(_null_as_zero(bytes_by_collective).values()) / GIB


def _checkpoint_gib(run: RecordedRun) -> float | None:
    """Size of the newest checkpoint; None where there is none, or a running run has just deleted it."""
    try:
        checkpoints = checkpoints_in(checkpoint_dirs_of(run.directory, run.config.get("checkpoint.fallback_dir")))
        if not checkpoints:
            return None
        _, newest = checkpoints[-1]
        return sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()) / GIB
    except (OSError, StorageError):
        return None
