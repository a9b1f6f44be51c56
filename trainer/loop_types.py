"""What the training loop takes: its settings, its sinks and its monitors, as protocols.

`trainer/run.py` builds the real ones. The loop knows no more of them than stands here, so that importing it loads neither a model
nor a task nor a tracker.

Two words mean the same everywhere below. "All ranks must call": the call communicates, and the ranks that make it wait for one
that does not. "Local": the call never communicates. Unless something else is said, a call is local and raises nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from strategies.base import Engine, Progress, UpdateFilter
from trainer.evaluation.base import EvaluationConfig
from trainer.optim.schedule import ScheduleConfig

if TYPE_CHECKING:
    from torch import Tensor

    from strategies.runtime import Runtime
    from trainer.data.batches.loader import BatchShare, StepBatch
    from trainer.monitors.levels import LevelShiftDetector
    from trainer.reporting.console import RunSchedule
    from trainer.reporting.earlier_rows import EarlierResults
    from trainer.reporting.metrics import RankTime, StepRecord
    from trainer.reporting.trackers.base import LoggedTable

Row = dict[str, Any]
"""The numbers of one step, by name, as a line of `metrics.jsonl` has them; `step` counts from 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopSettings:
    """The part of a run's configuration that the loop reads."""

    total_steps: int
    """Optimizer steps of the whole run, those before a resume included."""
    seed: int
    lr: float
    """Peak learning rate, as it is logged. The optimizer's parameter groups have their own."""
    schedule: ScheduleConfig
    evaluation: EvaluationConfig
    """`greater_is_better` is resolved: never None."""
    evaluate_every: int = 0
    """Steps between evaluations; 0 evaluates only at the end."""
    intermediate_loss_only: bool = False
    """Whether evaluations before the last step compute the held-out loss alone (`evaluation.every_steps=auto`)."""
    log_every: int
    """Steps between two reads of the device's metric buffer."""
    save_final: bool
    """Whether a checkpoint is written after the last step."""
    save_for_export: bool = False
    """Whether one is written without `save_final` too, because the export is read out of it. It does not stay."""


# -- data ----------------------------------------------------------------------------------------------------------------


class SampleOrder(Protocol):
    """The order in which a run consumes its samples. A position in it is counted from 0."""

    num_units: int
    """Samples of an epoch."""

    def set_skipped(self, position_ranges: Iterable[tuple[int, int]]) -> None:
        """Leave out exactly these ranges of positions, each as (first, count); replaces what was set before."""

    def position_ranges(self, first_sample: int, num_samples: int) -> list[tuple[int, int]]:
        """Where consecutive samples of the run are in the order: ranges of positions as (first, count)."""


class BatchLoader(Protocol):
    """Makes the batches of this rank."""

    @property
    def order(self) -> SampleOrder: ...

    @property
    def share(self) -> BatchShare:
        """Sizes of the global batch and the micro-batch, in samples."""

    def steps(self, first_sample: int, num_steps: int) -> Generator[StepBatch, None, None]:
        """Batches of `num_steps` steps, of which the first begins after `first_sample` consumed samples.

        Local, and a thread makes them ahead; closing the generator stops it. Raises what the thread raised. If batches are rounds
        (`trainer/rollout/loader.py`), each is made when it is asked for: all ranks must take it, and Interrupted is raised on all
        of them if the run is asked to stop meanwhile.
        """

    def attachments(self) -> dict[str, bytes]:
        """Files that a checkpoint of this moment needs beside the state, by name: a round that is not used up."""

    def restore(self, checkpoint: Path) -> None:
        """Go on from a checkpoint that the engine has loaded: read its attachments. All ranks must call. Errors: StorageError."""

    def check_generated_answers(self, rows: list[Row]) -> None:
        """Look at the rows of steps since the last call. Raises Diverged, on all ranks alike, for answers of other weights."""


# -- sinks: where numbers, lines and checkpoints go ----------------------------------------------------------------------


class StepMeter(Protocol):
    """Buffers step records on the device and turns them into rows."""

    expert_tokens: Tensor | None
    """[layers, experts]: tokens that chose each expert in the last interval, all ranks together; None without experts."""
    expert_ranks: int
    """Ranks over which the experts of a layer are distributed."""
    times_by_rank: list[RankTime]
    """Compute time of each rank in the last interval, equal on all ranks."""

    @property
    def runtime(self) -> Runtime: ...

    @property
    def num_buffered_steps(self) -> int:
        """Steps added since the last flush."""

    def start_clock(self, evaluation_s: float) -> None:
        """Start the clock before the first step; `evaluation_s` seconds went into the evaluation before it."""

    def measuring_step(self) -> AbstractContextManager[None]:
        """Entered around each step. Counts the bytes that one step of each attempt exchanges."""

    def add(self, record: StepRecord) -> None:
        """Buffer one step. Reads nothing from the device."""

    def flush(self) -> list[Row]:
        """Rows of the buffered steps, equal on all ranks. All ranks must call. Waits for the device."""

    def restart_clock(self) -> None:
        """Leave the time since the last flush out of the speed of the next steps."""

    def median_speeds(self) -> dict[str, float]:
        """Median speeds of this attempt, by name; empty before the first flush."""


class MetricSink(Protocol):
    """Takes rows: `metrics.jsonl` and the trackers, on rank 0; on other ranks nothing happens. Errors: StorageError."""

    @property
    def earlier(self) -> EarlierResults:
        """What the rows that were there before this attempt say; empty on other ranks than 0."""

    def log(self, metrics: Row, *, step: int) -> None: ...

    def log_tables(self, tables: dict[str, LoggedTable], *, step: int) -> None:
        """Show tables of an evaluation, by name, in the trackers."""

    def rewind(self, step: int) -> None:
        """Forget the rows after `step`."""

    def sync(self) -> None:
        """Make the rows so far survive a power cut."""


class ProgressDisplay(Protocol):
    """Shows a person how far the run is: on the screen of rank 0, and in each rank's log file."""

    def print_line(self, text: str) -> None:
        """Print a line that stays."""

    def show_step(self, row: Row, course: RunSchedule) -> None:
        """Show the newest step."""


class WrittenCheckpoint(Protocol):
    """A checkpoint that is published: complete, under its final name."""

    @property
    def metric_columns(self) -> dict[str, float]:
        """Seconds that writing it took, as columns of a row of metrics."""


class CheckpointStore(Protocol):
    """The checkpoints of one run. Errors: StorageError, on every rank."""

    @property
    def last_published(self) -> WrittenCheckpoint | None:
        """The last one that this attempt published; None before the first."""

    @property
    def pending_step(self) -> int | None:
        """Step of the checkpoint that is being written beside training; None if there is none."""

    def has_any(self) -> bool:
        """Whether the run has a checkpoint. All ranks must call."""

    def has_checkpoint_of(self, step: int) -> bool:
        """Whether the run has a checkpoint of a step. All ranks must call."""

    def is_due(self, step: int) -> bool:
        """Whether the schedule asks for one after `step`. All ranks must call, after the same steps."""

    def is_improvement_due(self) -> bool:
        """Whether an improvement may be saved now, so that saving costs little. All ranks must call, after the same steps."""

    def pending_is_written(self, step: int) -> bool:
        """Whether every rank has written its part of the pending one. All ranks must call, after the same steps."""

    def save_checkpoint(
        self,
        engine: Engine,
        progress: Progress,
        *,
        must_succeed: bool,
        replaces_older: bool,
        attachments: Mapping[str, bytes],
    ) -> bool:
        """Write a checkpoint of the engine's state now, or begin to write it while training continues. All ranks must call.

        Call `publish_pending` before, if a checkpoint is pending.

        - With `must_succeed`: returns True once the checkpoint is published, that is complete under its final name, or raises
          StorageError.
        - Without: returns True if it was begun, or written. If not, prints a warning and returns False; raises StorageError after
          more than `checkpoint.max_failures` failures in a row.

        `replaces_older`: whether older ones are deleted for it. `attachments`: files beside the state, by name.
        """

    def publish_pending(self) -> bool:
        """Wait until the pending checkpoint is written, and rename it. Returns whether that succeeded. All ranks must call."""

    look_back_steps: int
    """Steps before the newest checkpoint within which all are kept, and one more from before."""

    def roll_back(self, last_good_step: int) -> Path:
        """Move checkpoints after `last_good_step` aside; returns the newest one that is left. All ranks must call."""


@dataclass(slots=True)
class Sinks:
    """Where what a run produces goes."""

    meter: StepMeter
    metrics: MetricSink
    display: ProgressDisplay
    checkpoints: CheckpointStore
    announce_step: Callable[[int], None] = lambda step: None
    """Called with the number of the step about to be taken, so that a failure can name it. Local."""
    require_run_dir_ownership: Callable[[], None] = lambda: None
    """Called before a checkpoint is written. All ranks must call. Raises LeaseLost if another attempt owns the directory."""


# -- monitors: what may end a run early, or leave an update out ----------------------------------------------------------


class StopAgreement(Protocol):
    """Turns a signal on any rank into one decision of all ranks at the same step."""

    def ask(self) -> None:
        """Start to ask the other ranks, if it is time to. All ranks must call, and then `stop_now`."""

    def stop_now(self) -> bool:
        """Whether to stop: the last answer that was agreed on. All ranks must call."""


class ReplicaMonitor(Protocol):
    """Compares parameters that several ranks hold a copy of."""

    def start_at(self, step: int) -> None:
        """Count the interval to the next comparison from `step`."""

    def check_replicas(self, engine: Engine, step: int, *, now: bool) -> None:
        """Compare, if it is due or `now`. All ranks must call. Waits for the device. Raises ReplicasDiffer on all ranks."""


class StepGuards(Protocol):
    """Finds steps whose loss or gradient norm stands out. All ranks come to the same answers."""

    @property
    def may_roll_back(self) -> bool:
        """Whether an outlier may send the run back to a checkpoint."""

    @property
    def replicas(self) -> ReplicaMonitor: ...

    @property
    def level_shifts(self) -> LevelShiftDetector: ...

    def restore_recent_steps(self, recent: list[dict[str, float]], level_rows: Sequence[dict[str, float]]) -> None:
        """Begin with the loss and gradient norm of these steps, oldest first, and forget what was seen since.

        `level_rows`: what `level_shifts` remembered.
        """

    def record_rollback(self, step: int) -> None:
        """Remember that the run went back to the checkpoint of this step."""

    def recent_steps(self) -> list[dict[str, float]]:
        """Loss and gradient norm of the last steps, for a checkpoint. Waits for the device."""

    def update_filter(self, local_loss: Tensor, count: float) -> UpdateFilter | None:
        """What the engine asks before it updates; None if no update may be left out.

        `local_loss` is this rank's sum of the loss over the step, `count` its denominator over all ranks.
        """

    def record_step(self, first_sample: int) -> None:
        """A step was taken that began after `first_sample` consumed samples."""

    def mark_outliers(self, rows: list[Row]) -> None:
        """Mark outliers in `rows`, of all steps since the last call, equal on all ranks. Raises RollBack on all ranks."""

    def raise_if_diverged(
        self, num_rollbacks: int, num_consumed: int, position_ranges: Callable[[int, int], list[tuple[int, int]]]
    ) -> None:
        """Raise Diverged after too many rollbacks, or too many updates in a row that were left out.

        `num_consumed`: samples so far; `position_ranges`: of the run's order of samples, for the error's text.
        """


class StragglerMonitor(Protocol):
    """Finds ranks that compute slower than the others."""

    def add_times_and_find_slow_ranks(self, rows: list[Row], times: list[RankTime]) -> None:
        """Judge an interval by each rank's time, and add two columns to its first row. All ranks must call."""

    def record(self) -> list[dict[str, Any]]:
        """The slow ranks so far, as JSON."""


class EvaluationMonitor(Protocol):
    """Looks at evaluations and training losses for overfitting, forgetting and instability. Errors: StorageError."""

    findings_by_detector: dict[str, Any]
    """Findings by the name of the detector, as JSON; grows while the run goes on."""

    @property
    def stopping_finding(self) -> object | None:
        """The finding that ends the run once its state is saved; None while nothing does."""

    def prepare_detectors(self, engine: Engine, progress: Progress) -> None:
        """Before the first step: ask the base model, if forgetting is measured. All ranks must call. Raises Interrupted."""

    def restore_findings(self, progress: Progress) -> None:
        """For a run that goes on at `progress`: what it found before, and whether that has ended it. All ranks must call."""

    def add_step_metrics(self, progress: Progress, metrics_of_steps: Iterable[Row]) -> None:
        """Add the training losses of the steps to `progress`."""

    def run_detectors(self, progress: Progress, values: dict[str, float]) -> dict[str, float]:
        """Look at the metrics of an evaluation, by name; returns further metrics to log beside them."""

    def record_findings_of_whole_run(self, progress: Progress) -> None:
        """Look at the whole run, after its last step."""

    def record_early_stopping(self, progress: Progress, reason: str) -> None:
        """Record that early stopping ends the run, for this `reason`."""

    def early_stopping_text(self) -> str | None:
        """Why the run ends as if by early stopping, for the screen; None if it does not."""

    def raise_if_finding_ends_run(self) -> None:
        """Raise LimitExceeded, on all ranks alike, if a finding ends the run with an error."""


@dataclass(slots=True)
class Monitors:
    """What may end a run before its budget is spent, or leave an update out. All ranks come to the same answers."""

    stop_agreement: StopAgreement
    guards: StepGuards
    stragglers: StragglerMonitor
    evaluations: EvaluationMonitor
