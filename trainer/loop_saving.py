"""What a training loop writes while it takes steps: metrics of the steps, and checkpoints. `trainer/loop.py` takes the steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from strategies.base import Engine, Progress
from strategies.errors import Preempted, ReplicasDiffer
from trainer.evaluation.base import Evaluator
from trainer.evaluation.best import SavedProgress
from trainer.loop_types import LoopSettings, Monitors, Row, Sinks
from trainer.monitors.anomalies import OUTLIER_KEYS
from trainer.reporting.outcome import TrainingOutcome

if TYPE_CHECKING:
    from trainer.checkpoints.async_writer import SavedCheckpoint
    from trainer.data.batches.loader import StepBatch, StepLoader
    from trainer.reporting.console import RunSchedule
    from trainer.rollout.loader import RolloutLoader


class SavingLoop:
    """The state of a training loop, and the part of it that logs steps and saves checkpoints. `Trainer` adds the steps."""

    def __init__(
        self,
        settings: LoopSettings,
        *,
        engine: Engine,
        loader: StepLoader | RolloutLoader,
        progress: Progress,
        evaluators: list[Evaluator],
        sinks: Sinks,
        monitors: Monitors,
    ) -> None:
        """`progress`: where the run stands; not at step 0 in a resumed run. The loop counts on in it."""
        self.settings = settings
        self.engine = engine
        self.loader = loader
        self.progress = progress
        self.evaluators = evaluators
        # Where what the run produces goes.
        self.meter = sinks.meter
        self.metrics = sinks.metrics
        self.display = sinks.display
        self.checkpoints = sinks.checkpoints
        self.announce_step = sinks.announce_step
        self.require_run_dir_ownership = sinks.require_run_dir_ownership
        # What may end the run early, or leave an update out.
        self.stop_agreement = monitors.stop_agreement
        self.guards = monitors.guards
        self.stragglers = monitors.stragglers
        self.evaluation_monitor = monitors.evaluations

        self.outcome = TrainingOutcome(
            progress,
            findings_by_detector=self.evaluation_monitor.findings_by_detector,
            watched_metric=settings.evaluation.watched,
            greater_is_better=bool(settings.evaluation.greater_is_better),
        )
        self.current_batch: StepBatch | None = None
        """The batch of the step being taken; None between steps."""
        self._saved_progress = SavedProgress(progress)
        self._reported_checkpoint: SavedCheckpoint | None = None
        """The last checkpoint whose cost stands in a row."""
        self._schedule: RunSchedule
        """How far the run goes, for the display of its steps; set before the first step."""

    def _epochs_done(self) -> float:
        """Passes over the training data so far, as a fraction: 2.5 is the middle of the third."""
        return self.progress.samples / self.loader.order.num_units

    def _log_buffered_steps(self) -> None:
        """Read the numbers of the steps since the last call from the device, and log them. All ranks must call.

        Called once an interval (`log_every`), and before an evaluation or a save. It may raise, in this order:

        - `guards.mark_outliers`: RollBack, before anything is logged, since the steps will be taken again.
        - `_check_replicas`: ReplicasDiffer, also without new steps.
        - `loader.check_generated_answers` and `guards.raise_if_diverged`: Diverged, after the metrics are logged, so that they
          show why.
        """
        metrics_of_steps = self.meter.flush()
        self.guards.mark_outliers(metrics_of_steps)
        self.stragglers.add_times_and_find_slow_ranks(metrics_of_steps, self.meter.times_by_rank)
        self._check_replicas()
        if metrics_of_steps:
            self._add_checkpoint_cost(metrics_of_steps)  # becomes columns of a row, and rows are logged once
        for step_metrics in metrics_of_steps:
            self.metrics.log(step_metrics, step=step_metrics["step"])
            # "skipped": the update was left out, as for a gradient that is not finite. OUTLIER_KEYS: columns that mark a step
            # that stands out.
            self.progress.skipped_steps += int(bool(step_metrics.get("skipped")))
            self.progress.outliers += int(any(key in step_metrics for key in OUTLIER_KEYS.values()))
        # The losses of the steps, or their rewards, which the detectors of overfitting and divergence judge.
        self.evaluation_monitor.add_step_metrics(self.progress, metrics_of_steps)
        if not metrics_of_steps:
            return
        self.outcome.last_row = metrics_of_steps[-1]
        self.display.show_step(metrics_of_steps[-1], self._schedule)
        self.loader.check_generated_answers(metrics_of_steps)
        self.guards.raise_if_diverged(self.progress.rollbacks, self.progress.samples, self.loader.order.position_ranges)

    def _add_checkpoint_cost(self, metrics_of_steps: list[Row]) -> None:
        """Let the first of these rows also have the seconds that the last checkpoint took, once for each checkpoint."""
        checkpoint = self.checkpoints.last_published
        if checkpoint is None or checkpoint is self._reported_checkpoint:
            return
        self._reported_checkpoint = checkpoint
        metrics_of_steps[0] = {**metrics_of_steps[0], **checkpoint.metric_columns}

    def _stop_for_signal(self) -> NoReturn:
        """Save a checkpoint, so that the same command goes on from here, and raise Preempted. All ranks must call.

        Before the first step there is nothing to save.
        """
        self.require_run_dir_ownership()
        self._log_buffered_steps()
        if self.progress.step:
            self._save_checkpoint()
        raise Preempted(
            f"stopped at step {self.progress.step} of {self.settings.total_steps}; start the same run again to continue"
        )

    def _save_last_step(self) -> None:
        """Save the last step if it must stay (`save_final`), or if the export that follows has nothing else to read.

        All ranks must call.
        """
        self._publish_pending_checkpoint()
        if self.settings.save_for_export and not self.checkpoints.has_checkpoint_of(self.progress.step):
            # A run can have begun from the last step of another run, which counts as saved.
            self._saved_progress.require_new_checkpoint()
        if self.settings.save_final:
            self._save_checkpoint()
        elif self.settings.save_for_export and not self._saved_progress.is_saved(self.progress.step):
            # It is deleted again once it is exported. It may fail, and no older one is deleted for it.
            self.outcome.saved_for_export = True
            self._save_checkpoint(must_succeed=False, replaces_older=False)
        self._publish_pending_checkpoint()

    def _save_checkpoint(self, *, must_succeed: bool = True, replaces_older: bool = True) -> None:
        """Write a checkpoint of this step, if there is none yet; the buffered steps are logged before. All ranks must call.

        `must_succeed`: wait until it is complete, and raise StorageError if it fails; else training goes on meanwhile, and it may
        fail.
        `replaces_older`: whether older checkpoints may be deleted for it.
        """
        self._log_buffered_steps()
        self._publish_pending_checkpoint()  # only one may be under way
        if not self._saved_progress.is_saved(self.progress.step):
            self.require_run_dir_ownership()
            self._check_replicas(now=True)  # a checkpoint of replicas that differ would be worth nothing
            # What the anomaly guards compare the next steps with, so that a resumed run finds the same outliers.
            self.progress.recent_steps = self.guards.recent_steps()
            self.progress.level_rows = self.guards.level_shifts.rows
            self.metrics.sync()  # rows up to this step are on the disk before the checkpoint is
            # If this checkpoint fails, the best evaluation is that of an earlier one again.
            self._saved_progress.remember_begun_checkpoint(self.progress)
            has_succeeded = self.checkpoints.save_checkpoint(
                self.engine,
                self.progress,
                must_succeed=must_succeed,
                replaces_older=replaces_older,
                attachments=self.loader.attachments(),
            )
            self._record_save(has_succeeded)
        # Saving does not count in the speed of the next steps.
        self.meter.restart_clock()

    def _publish_pending_checkpoint(self) -> None:
        """Wait for the checkpoint that is being written beside training, if there is one, and give it its final name.

        All ranks must call.
        """
        if self.checkpoints.pending_step is not None:
            self.require_run_dir_ownership()
            has_succeeded = self.checkpoints.publish_pending()
            self._record_save(has_succeeded)

    def _record_save(self, has_succeeded: bool) -> None:
        """Record that a checkpoint was begun or published, or failed: the best evaluation is then that of an earlier one."""
        is_pending = self.checkpoints.pending_step is not None
        self._saved_progress.record_save_outcome(self.progress, has_succeeded, is_pending=is_pending)

    def _check_replicas(self, *, now: bool = False) -> None:
        """Check that ranks which hold the same parameters still have equal values, if a check is due, or `now`.

        All ranks must call. Raises ReplicasDiffer.
        """
        try:
            self.guards.replicas.check_replicas(self.engine, self.progress.step, now=now)
        except ReplicasDiffer:
            self._publish_pending_checkpoint()  # a checkpoint of an earlier step, at which the replicas were alike
            raise
