"""Reads the files of a run directory, and the numbers that are compared."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from strategies import atomic_io
from strategies.errors import ConfigError, StorageError
from trainer.checkpoints.layout import places_of, published
from trainer.config.resuming import KINDS, flat
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
class Point:
    """One run as its directory has it; what it never wrote is empty."""

    directory: Path
    config: dict[str, Any]
    """Leaves of `config.yaml` by dotted key."""
    identity: dict[str, dict[str, Any]]
    """`identity.json`."""
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
    """Lines of both files that are no rows, and are left out."""

    @property
    def state(self) -> str:
        """`done`, `failed`, `preempted`, `running`, or `not started` if the run left no status."""
        return str(self.status.get("state") or ("failed" if self.failure else "not started"))

    @property
    def ended(self) -> str | None:
        """How far a run came that is not done, such as `failed at step 3`; None for one that is."""
        if self.state == State.done:
            return None
        step = self.status.get("step") or self.failure.get("step") or max(self.steps, default=None)
        return f"{self.state} at step {step}" if step else self.state

    @property
    def reason(self) -> str | None:
        """How far the run came and why it ended, on one line; None for one that is done."""
        if self.state == State.running:
            last_seen = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.status.get("time") or 0))
            return f"{self.ended}, last seen at {last_seen}"
        why = self.status.get("reason") or self.failure.get("message")
        return f"{self.ended}: {' '.join(str(why).split())}" if self.ended and why else self.ended


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
    """Between these lie half of the steps."""
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
    """Of these the evaluation before it."""
    planned_gib: float | None
    """What a rank was expected to take."""
    planned_by: str | None
    """How `planned_gib` was computed, in words."""
    exchanged_gib: float | None = None
    """What rank 0 exchanged in a step, from the receipt. Each collective counts the whole tensor that is gathered or reduced."""
    planned_exchanged_gib: float | None = None
    """What the plan at the start predicted for `exchanged_gib`."""
    exchanged_bytes: dict[str, float] = field(default_factory=dict)
    """The first of these by collective."""
    exposed_s: float | None = None
    """Seconds of that step in which it waited for exchange; where that is known, see docs/comparing.md."""
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)


def is_run(directory: Path) -> bool:
    """Whether a run was frozen here."""
    return (directory / "config.yaml").is_file()


def read_point(directory: Path) -> Point:
    """Read one run directory. Raises ConfigError where it is none, or one of its files is damaged."""
    if not is_run(directory):
        raise ConfigError(f"{directory}: not a run directory (there is no config.yaml in it)")
    metrics = _rows(directory / METRICS)
    events = _rows(directory / "events.jsonl")
    steps, evaluations = _by_step(metrics.rows)
    return Point(
        directory=directory,
        config=_config(directory / "config.yaml"),
        identity=_identity(directory / "identity.json"),
        record=_record(directory),
        status=read_status(directory),
        failure=read_failure(directory),
        steps=steps,
        evaluations=evaluations,
        events=tuple(events.rows),
        unreadable_lines=len(metrics.unreadable) + len(events.unreadable),
    )


def _config(path: Path) -> dict[str, Any]:
    tree = read_tree(path)
    if "strategy" not in tree:
        raise ConfigError(f"{path}: not the configuration of a run of shardtune")
    return flat(tree)


def _record(run_dir: Path) -> RunRecord:
    if not (run_dir / RUN_RECORD).exists():  # it failed before its model was built, or has not started
        return RunRecord()
    try:
        return read_run_record(run_dir)
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(run_dir / RUN_RECORD, error) from error


def _identity(path: Path) -> dict[str, dict[str, Any]]:
    """`identity.json`: an object for each kind of difference; empty if there is no file."""
    if not path.exists():  # it ended before its data was prepared
        return {}
    try:
        identity = json.loads(atomic_io.read_bytes(path, most=MOST_BYTES))
        if not isinstance(identity, dict):
            raise ValueError("it holds no object")
        for kind in KINDS:
            if not isinstance(identity.get(kind) or {}, dict):
                raise ValueError(f"{kind} is not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    return identity


def _unreadable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{path}: cannot be read ({error}); leave this run out of the comparison")


def _by_step(rows: list[dict[str, Any]]) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, float]]]:
    """(rows of steps, metrics of evaluations), each by step."""
    steps: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, float]] = {}
    for row in rows:
        if "loss" in row:
            steps[row["step"]] = row
        else:
            metrics: dict[str, float] = {}
            for name, number in row.items():
                if name not in ("step", "tokens") and isinstance(number, int | float):
                    metrics[name] = number
            evaluations[row["step"]] = metrics
    return steps, evaluations


def _rows(path: Path) -> MetricRows:
    """What a file of rows has, of metrics or of events; lines that are no rows are counted. Errors: ConfigError."""
    try:
        return read_rows(path)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({atomic_io.error_summary(error)}); leave this run out of the comparison"
        ) from error


def rows_after_warmup(point: Point, warmup: int) -> list[dict[str, Any]]:
    """The steps behind the first `warmup` ones and the rest of their logging interval; empty where there are no others."""
    every = int(point.config.get("logging.every_steps") or 1)
    first = min(point.steps, default=0)
    # As in the run's own medians: the first interval has caches to fill and kernels to choose.
    ends = (first - 1 + warmup + every - 1) // every * every
    return [row for step, row in point.steps.items() if step > ends]


def measure(point: Point, warmup: int = 1) -> RunMeasurements:
    """The numbers that are compared; of speeds those of `rows_after_warmup`."""
    rows = list(point.steps.values())
    counted_rows = rows_after_warmup(point, warmup)
    rates = {key: _finite(counted_rows or rows, key) for key in RATES}
    medians: dict[str, float | None] = dict.fromkeys(RATES)
    for key, values in rates.items():
        if values:
            medians[key] = median(values)
    receipt = point.record.receipt or Receipt()
    predicted = receipt.predicted or PredictedCost()
    measured = receipt.measured or MeasuredCost()
    return RunMeasurements(
        steps=len(rows),
        loss=next(iter(_finite(rows[-1:], "loss")), None),
        **medians,
        tokens_per_s_quartiles=_quartiles(rates["tokens_per_s"]),
        warmup_steps=len(rows) - len(counted_rows) if counted_rows else 0,
        memory_gib=max(_finite(rows, "memory_gib"), default=None),
        memory_reserved_gib=max(_finite(rows, "memory_reserved_gib"), default=None),
        checkpoint_gib=_checkpoint_gib(point),
        checkpoint_s=measured.checkpoint_s,
        start_s=measured.start_s,
        evaluation_before_s=measured.evaluation_before_s,
        planned_gib=predicted.memory_gib,
        planned_by=predicted.memory_by,
        exchanged_gib=_total_gib(measured.exchanged_bytes),
        planned_exchanged_gib=_total_gib(predicted.exchanged_bytes),
        exchanged_bytes=_without_null(measured.exchanged_bytes or {}),
        exposed_s=measured.exposed_s,
        before=point.evaluations.get(0, {}),
        after=_last_evaluation(point),
    )


def _quartiles(values: list[float]) -> tuple[float, float] | None:
    if len(values) < 2:
        return None
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high


def _last_evaluation(point: Point) -> dict[str, float]:
    """Held-out metrics at the last evaluation after the first step; empty if there was none."""
    last_step = max(point.evaluations, default=0)
    return point.evaluations[last_step] if last_step > 0 else {}


def _finite(rows: list[dict[str, Any]], key: str) -> list[float]:
    """Numbers that are not finite are null in the rows."""
    return [row[key] for row in rows if isinstance(row.get(key), int | float)]


def _without_null(bytes_by_collective: dict[str, float]) -> dict[str, float]:
    """The sizes with 0 for null, which a record has for a number that is not finite."""
    return {collective: size_bytes or 0.0 for collective, size_bytes in bytes_by_collective.items()}


def _total_gib(bytes_by_collective: dict[str, float] | None) -> float | None:
    return None if bytes_by_collective is None else sum(_without_null(bytes_by_collective).values()) / GIB


def _checkpoint_gib(point: Point) -> float | None:
    """Size of the newest checkpoint; None where there is none, or a running run has just deleted it."""
    try:
        checkpoints = published(places_of(point.directory, point.config.get("checkpoint.fallback_dir")))
        if not checkpoints:
            return None
        _, newest = checkpoints[-1]
        return sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()) / GIB
    except (OSError, StorageError):
        return None
