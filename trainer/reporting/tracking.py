"""Writes rows of metrics to `metrics.jsonl`, always, and to the trackers that the settings name."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from strategies.errors import StorageError
from strategies.redaction import redact
from trainer.reporting.earlier_rows import EarlierResults
from trainer.reporting.jsonl import JsonlTracker
from trainer.reporting.metric_names import CURRENT_NAMES_EDITION, FIRST_NAMES_EDITION, tracked_row
from trainer.reporting.trackers.base import LoggedTable, RunEnding, TrackedRun, Tracker
from trainer.reporting.trackers.environment import apply_environment
from trainer.reporting.trackers.registry import enabled_trackers

SUMMARY_METRICS = (
    *("tokens_per_s", "tokens_per_s_per_rank", "supervised_tokens_per_s", "mfu", "step_s"),
    *("memory_gib", "memory_reserved_gib", "loss"),
)
"""Metrics that the summary takes from the run: medians of speeds, and the rest from its last step."""


class Trackers:
    """A run's rows, and its trackers, behind one `log`. Only rank 0 has any."""

    def __init__(
        self,
        rows_file: JsonlTracker | None = None,
        trackers: Sequence[Tracker] = (),
        print_line: Callable[[str], None] = print,
        metric_names: int = CURRENT_NAMES_EDITION,
    ) -> None:
        """`rows_file`: `metrics.jsonl`; None on other ranks than 0, and until it is attached. `print_line`: tells the user.

        `metric_names`: which edition of names metrics have in trackers. A run that resumes keeps the one that it began with.
        """
        self._rows_file = rows_file
        self._trackers = list(trackers)
        self._print_line = print_line
        self._hints: list[tuple[str, str]] = []
        self._names_edition = metric_names
        self._training_s = 0.0 if rows_file is None else rows_file.earlier.training_s
        """Seconds of all steps up to the last row, those of earlier starts included."""
        self._waiting_tables: dict[str, tuple[int, LoggedTable]] = {}
        """Tables to be shown with the row of a step, by name."""

    def attach_rows_file(self, rows_file: JsonlTracker) -> None:
        """Write further rows to this `metrics.jsonl` too, and continue the count of training seconds from its earlier rows."""
        self._rows_file = rows_file
        self._training_s = rows_file.earlier.training_s

    def log(self, metrics: dict[str, Any], *, step: int) -> None:
        """Record the metrics of a step or an evaluation in `metrics.jsonl` and all trackers, with tables that waited for it.

        A failing tracker is dropped with a message. Raises StorageError if `metrics.jsonl` cannot be written.
        """
        if self._rows_file is not None:
            try:
                self._rows_file.log(metrics, step=step)
            except OSError as error:
                raise StorageError(f"{self._rows_file.path}: cannot be written ({error}); free space") from error
        # A run that began with the first edition of names has those of the file in its trackers.
        tracked_metrics = metrics
        if self._names_edition != FIRST_NAMES_EDITION:
            self._training_s += float(metrics.get("step_s") or 0.0)
            tracked_metrics = tracked_row(metrics, step=step, training_s=self._training_s, edition=self._names_edition)
        self._call_each_tracker(lambda tracker: tracker.log(tracked_metrics, step=step))
        # Tables that waited for the row of this step.
        due_tables = {}
        for name, (table_step, table) in self._waiting_tables.items():
            if table_step <= step:
                due_tables[name] = table
        for name in due_tables:
            del self._waiting_tables[name]
        self.log_tables(due_tables, step=step)

    def log_table_with_row(self, name: str, table: LoggedTable, *, step: int) -> None:
        """Keep a table until the row of its step is logged, and show it then. It replaces a table of this name that still waits.

        Rows are recorded some steps at a time, and W&B takes none of an earlier step than it has seen.
        """
        self._waiting_tables[name] = (step, table)

    def log_tables(self, tables: dict[str, LoggedTable], *, step: int) -> None:
        """Show tables of one step, by name, in the trackers. W&B takes no step that is earlier than one it has seen."""
        for name, table in tables.items():
            self._call_each_tracker(lambda tracker, name=name, table=table: tracker.log_table(name, table, step=step))  # type: ignore[misc]

    def summarise(self, values: dict[str, Any]) -> None:
        """Set numbers of the whole run in the trackers."""
        self._call_each_tracker(lambda tracker: tracker.summarise(values))

    def _call_each_tracker(self, call: Callable[[Tracker], None]) -> None:
        """Do something with each tracker, such as logging a row. One that raises is dropped with a message: the run goes on."""
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:  # noqa: BLE001  (whatever a tracker's library raises)
                self._print_line(
                    f"{type(tracker).__name__} stopped working and is dropped: {_error_without_secrets(error)}"
                )
                self._trackers.remove(tracker)

    def rewind(self, step: int) -> None:
        """Go back to a step, when a rollback lets training continue from there: its later rows leave `metrics.jsonl`.

        Tables that wait for a row are dropped. Trackers keep such rows until the steps are logged again. Without a file, as on
        other ranks than 0, no rows are removed. Raises StorageError.
        """
        self._waiting_tables.clear()
        if self._rows_file is not None:
            try:
                self._rows_file.rewind(step)
            except OSError as error:
                raise StorageError(f"{self._rows_file.path}: cannot be written ({error}); free space") from error
            # The count continues from the rows that are left in the file.
            self._training_s = self._rows_file.earlier.training_s

    def follow_renamed_run_dir(self, run_dir: Path) -> None:
        """Set the path of `metrics.jsonl` after the run's directory was renamed; the open file takes further rows as before."""
        if self._rows_file is not None:
            self._rows_file.path = run_dir / self._rows_file.path.name

    def sync(self) -> None:
        """Sync `metrics.jsonl` to the disk, so that the rows so far outlive a power cut."""
        if self._rows_file is not None:
            self._rows_file.sync()

    @property
    def earlier(self) -> EarlierResults:
        """Results in the rows of `metrics.jsonl` that were there before this process; nothing on other ranks than 0."""
        return EarlierResults() if self._rows_file is None else self._rows_file.earlier

    @property
    def hints(self) -> list[tuple[str, str]]:
        """(name of a tracker, command or address that shows the run), once they are closed."""
        return self._hints

    def close(self, ending: RunEnding) -> None:
        """Close `metrics.jsonl` and all trackers, and set `hints`. A tracker that fails to close is named in a printed line."""
        if self._rows_file is not None:
            self._rows_file.close()
        self._call_each_tracker(lambda tracker: tracker.close(ending))
        self._hints = [tracker.hint for tracker in self._trackers if tracker.hint is not None]
        self._rows_file = None
        self._trackers = []


def _error_without_secrets(error: Exception) -> str:
    """Type and first line of an error, without secrets."""
    first_line = next(iter(str(error).splitlines()), "")
    return redact(f"{type(error).__name__}: {first_line}")


def final_summary(
    last_row: dict[str, Any], median_speeds: dict[str, float], held_out_metrics: dict[str, float]
) -> dict[str, Any]:
    """Sum a run up for trackers, whose tables of runs compare by such numbers: speeds, memory, the last loss, held-out metrics.

    {"final/loss": 2.1, "final/step_s": 0.5, "final/eval/loss": 2.2}. `last_row`: the row of the last step in `metrics.jsonl`.
    `median_speeds` replace the speeds of that row. `held_out_metrics`: of the last evaluation.
    """
    final_values = {**last_row, **median_speeds}
    summary = {}
    for name in SUMMARY_METRICS:
        if name in final_values:
            summary[f"final/{name}"] = final_values[name]
    for name, metric in held_out_metrics.items():
        summary[f"final/{name}"] = metric
    return summary


@dataclass(slots=True)
class OpenedTrackers:
    """The trackers that rank 0 opened, and what was decided while they were opened."""

    trackers: Trackers
    run_id: str | None
    """That of the trackers, to be kept for a resume; None where there are none."""
    substitutions: dict[str, str] = field(default_factory=dict)
    """What the environment decided, or the network, by setting: sentences for people."""
    from_environment: dict[str, str] = field(default_factory=dict)
    """Values that variables gave to settings, by setting."""
    passed_over: str | None = None
    """One line on environment variables that lose to a setting (they are passed over); None if none does."""


def open_trackers(tracked_run: TrackedRun, environment: dict[str, str] | None = None) -> OpenedTrackers:
    """Open what a run records into: `metrics.jsonl`, and the trackers that are on. On rank 0 only. Raises StorageError.

    `tracked_run.run_id` may be empty: then the trackers get a new one. A tracker that cannot begin is left out, with its
    reason: what it would show is in `metrics.jsonl`.
    """
    opened = open_trackers_without_rows(tracked_run, environment)
    opened.trackers.attach_rows_file(JsonlTracker(tracked_run.run_dir / "metrics.jsonl", tracked_run.resumed_at))
    return opened


def open_trackers_without_rows(tracked_run: TrackedRun, environment: dict[str, str] | None = None) -> OpenedTrackers:
    """Open the trackers that are on (W&B, TensorBoard, MLflow, ...), without `metrics.jsonl`, as an export after training does.

    `environment`: environment variables; None for those of this process. A tracker that cannot be opened is left out, and
    `substitutions` has the reason by its setting, such as `logging.mlflow`.
    """
    # Environment variables such as WANDB_PROJECT complete the settings, and may give the run's id.
    if environment is None:
        environment = dict(os.environ)
    completed = apply_environment(tracked_run.config, environment)
    tracker_kinds = enabled_trackers(completed.config)
    # One id for all trackers: that of an earlier start, or a new one.
    run_id = tracked_run.run_id
    if not run_id and tracker_kinds:
        run_id = environment.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12]
    tracked_run = replace(
        tracked_run, config=completed.config, run_id=run_id, name=completed.config.name or tracked_run.name
    )
    opened = OpenedTrackers(Trackers(), run_id or None, passed_over=completed.passed_over)
    if tracker_kinds:  # without trackers, variables such as WANDB_PROJECT decide nothing
        for setting, resolution in completed.resolutions.items():
            opened.substitutions[setting] = str(resolution)  # such as `mine (WANDB_PROJECT)`
            opened.from_environment[setting] = str(resolution.chosen)

    trackers: list[Tracker] = []
    for tracker_kind in tracker_kinds:
        setting = f"logging.{tracker_kind.setting_name}"
        try:
            tracker = tracker_kind.open(tracked_run)
        except Exception as error:  # noqa: BLE001  (whatever a tracker's library raises)
            opened.substitutions[setting] = f"left out ({_error_without_secrets(error)})"
            continue
        offline_reason = getattr(tracker, "offline_reason", None)  # W&B's tracker has it
        if offline_reason:
            opened.substitutions[setting] = redact(offline_reason)
        trackers.append(tracker)
    opened.trackers = Trackers(
        rows_file=None,
        trackers=trackers,
        print_line=tracked_run.print_line,
        metric_names=tracked_run.metric_names,
    )
    return opened
