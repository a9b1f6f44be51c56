"""The training loop: takes optimizer steps, and evaluates, logs and saves between them.

Start reading at `Trainer.fit`, then `train_step`. `loop_types.py` says what the loop is given; `loop_saving.py` has the part that
logs and saves.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Generator
from contextlib import closing
from typing import TYPE_CHECKING

from strategies.errors import Interrupted
from strategies.runtime import broadcast_object, seed_dropout_of_step
from trainer.evaluation.base import Evaluator, intermediate_evaluators, tables_of_evaluators
from trainer.evaluation.best import (
    early_stopping_reason,
    raise_if_watched_metric_is_missing,
    record_evaluation,
)
from trainer.loop_saving import SavingLoop
from trainer.monitors.anomalies import Outlier, RollBack
from trainer.monitors.levels import LEVEL_LOOK_BACK_STEPS
from trainer.objectives.step_totals import accumulate_gradients, step_record
from trainer.optim.schedule import lr_factor_at
from trainer.reporting.console import RunSchedule
from trainer.reporting.expert_load import expert_load_by_layer
from trainer.reporting.numbers import format_metric
from trainer.reporting.outcome import TrainingOutcome

if TYPE_CHECKING:
    from trainer.data.batches.loader import StepBatch
    from trainer.reporting.earlier_rows import EarlierResults
    from trainer.reporting.metrics import StepRecord


class Trainer(SavingLoop):
    """Takes steps until the budget is spent, an evaluation ends the run, or a signal asks it to stop."""

    def fit(self) -> TrainingOutcome:
        """Train from the step of `progress` to the end of the budget, and return what was measured and found.

        All ranks must call. `progress` is at step 0 for a new run. Raises Preempted, after a save, if any rank was asked to stop;
        an error such as Diverged, ReplicasDiffer, LimitExceeded or StorageError if the run cannot go on.
        """
        # What a resumed run had measured before it was interrupted. Only rank 0 has read it.
        earlier = broadcast_object(self.metrics.earlier, self.meter.runtime)
        self._restore_earlier_results(earlier)
        evaluation_s = self._evaluate_before_first_step()
        # With `guards.*`, a step that stands out may send the run back to an earlier checkpoint.
        if self.guards.may_roll_back:
            self._prepare_checkpoints_for_rollbacks()
        self._take_all_steps(evaluation_s)
        self.evaluation_monitor.record_findings_of_whole_run(self.progress)
        self._save_last_step()
        # An attempt that took no step has no speed of its own.
        self.outcome.speed = self.meter.median_speeds() or earlier.speed
        # Ranks that computed slower than the others, as JSON.
        self.outcome.slow_ranks = self.stragglers.record()
        if self.meter.expert_tokens is not None:
            self.outcome.experts = expert_load_by_layer(self.meter.expert_tokens, self.meter.expert_ranks)
        return self.outcome

    def _take_all_steps(self, evaluation_s: float) -> None:
        """Take the steps of the budget. After a rollback, take again those that it undid.

        `evaluation_s`: seconds that the evaluation before the first step took; they are left out of the speed.
        """
        # Objects made so far are kept as long as the run: the garbage collector need not walk them again and again.
        gc.collect()
        gc.freeze()
        evaluate_every = self.settings.evaluate_every if self.evaluators else 0
        # For the display: how many steps there are, how many were taken before, and when evaluations are due.
        self._schedule = RunSchedule(self.settings.total_steps, self.progress.step, time.perf_counter(), evaluate_every)
        self.meter.start_clock(evaluation_s)
        try:
            while True:
                try:
                    self._take_remaining_steps()
                    break
                except RollBack as rollback:
                    self._roll_back(rollback.outlier)
        finally:
            gc.unfreeze()  # this process may train again, so that the engine of this run must be freed

    def _restore_earlier_results(self, earlier: EarlierResults) -> None:
        """Go on with what earlier starts of this run measured and found. All ranks must call.

        `earlier`: read back from the run's rows of metrics; empty at a first start.
        """
        self.outcome.metrics_before_training = earlier.metrics_before_training
        self.outcome.last_metrics = earlier.last_metrics
        self.outcome.last_row = earlier.last_row
        self._restore_guards_and_order()
        if earlier.last_row:
            self.evaluation_monitor.restore_findings(self.progress)
        else:
            # A run may begin with the state of another one, which patience has ended: it counts its own evaluations.
            self.progress.stale_evaluations = 0

    def _evaluate_before_first_step(self) -> float:
        """Measure the model before the first step, for later evaluations to be compared with. All ranks must call.

        Detectors of forgetting ask the base model; with `evaluation.at_start`, a run at step 0 is evaluated too. Returns the
        seconds of both. Raises Preempted if the run was asked to stop meanwhile.
        """
        began = time.perf_counter()
        try:
            self.evaluation_monitor.prepare_detectors(self.engine, self.progress)
        except Interrupted:
            self._stop_for_signal()
        if self.progress.step == 0 and self.settings.evaluation.at_start:
            self.outcome.metrics_before_training = self._evaluate(self.evaluators)
        return time.perf_counter() - began

    def _prepare_checkpoints_for_rollbacks(self) -> None:
        """Keep enough checkpoints for a rollback from now on, and save one if the run has none to go back to.

        All ranks must call.
        """
        # So many steps may pass until a loss that stays at another level is found.
        self.checkpoints.look_back_steps = LEVEL_LOOK_BACK_STEPS
        if not self.checkpoints.has_any():
            # Also in a run that begins with another run's state, whose step counts as saved.
            self._saved_progress.require_new_checkpoint()
            self._save_checkpoint()

    def _take_remaining_steps(self) -> None:
        """Take the steps that are left, and evaluate, log and save on schedule. Called again after each rollback.

        All ranks must call. Returns when the budget is spent, or when patience or a finding ends the run early
        (`outcome.stopped_early`). Raises RollBack if a step stands out, so that its samples are to be skipped; Preempted, after a
        save, if any rank was asked to stop.
        """
        total_steps = self.settings.total_steps
        self._make_up_interrupted_evaluation()
        # A run that patience or overfitting has ended, and that was killed in its export, takes no further step.
        self.outcome.stopped_early = self._report_early_stop()
        num_remaining = 0 if self.outcome.stopped_early else total_steps - self.progress.step
        # Closing the generator ends its thread, also when a step raises.
        with closing(self._batches_of_steps(num_remaining)) as batches:
            for batch in batches:
                # The question whether any rank was asked to stop travels to the others while the step computes.
                self.stop_agreement.ask()
                with self.meter.measuring_step():
                    self.meter.add(self.train_step(batch))  # from here on `progress.step` is the step just taken
                is_last = self.progress.step == total_steps
                # Read once an interval: reading numbers from the device waits for it.
                if is_last or self.meter.num_buffered_steps >= self.settings.log_every:
                    self._log_buffered_steps()
                # A checkpoint is written beside training, and gets its name when all ranks have written their part.
                if self.checkpoints.pending_is_written(self.progress.step):
                    self._publish_pending_checkpoint()
                self._evaluate_and_save_if_due(is_last)
                self._stop_if_finding_ends_run()
                # The answer to the question: the same on all ranks, so that they stop after the same step.
                if self.stop_agreement.stop_now():
                    self._stop_for_signal()
                if self._report_early_stop():
                    self.outcome.stopped_early = True
                    break
        self._log_buffered_steps()

    def _batches_of_steps(self, num_steps: int) -> Generator[StepBatch, None, None]:
        """Yield the loader's batches of the next `num_steps` steps.

        In reinforcement learning the model writes answers between batches. A signal during that saves a checkpoint and raises
        Preempted.
        """
        try:
            yield from self.loader.steps(self.progress.samples, num_steps)
        except Interrupted:
            self._stop_for_signal()

    def train_step(self, batch: StepBatch) -> StepRecord:
        """Take one optimizer step: the gradients of all micro-batches of `batch`, then one update. All ranks must call.

        Returns the step's numbers, still on the device, for the meter: a step waits for no number. `batch.totals["loss"]`: how
        many tokens (or sequences) have a loss, all ranks together; the summed loss is divided by it.
        """
        settings = self.settings
        step = self.progress.step
        self.current_batch = batch
        # So that a failure can name the step, and a profiler knows it.
        self.announce_step(step + 1)
        # Dropout depends on the seed, the step and the rank alone, so that a resumed run draws what an unbroken one does.
        seed_dropout_of_step(settings.seed, step, self.engine.rank)
        local_sums = accumulate_gradients(self.engine, batch, seed_and_step=(settings.seed, step))

        # The share of the peak learning rate that the schedule has at this step.
        lr_factor = lr_factor_at(settings.schedule, step, settings.total_steps)
        # The engine asks it, once it has the gradient norm, whether to leave the update out because the step stands out
        # (`guards.*`).
        update_filter = self.guards.update_filter(local_sums["loss"], batch.totals["loss"])
        step_result = self.engine.step(lr_factor, update_filter)
        self.guards.record_step(self.progress.samples)
        self._advance_progress(batch)
        self.current_batch = None
        # Only logged: the optimizer multiplies rates of its own with `lr_factor`.
        lr = settings.lr * lr_factor
        return step_record(batch, local_sums, step_result, self.progress, lr=lr, epoch=self._epochs_done())

    def _advance_progress(self, batch: StepBatch) -> None:
        """Count a step that was taken, and the samples and tokens of its global batch."""
        self.progress.step += 1
        self.progress.samples += batch.samples
        # In reinforcement learning, several steps may learn from one round of answers; 0 between rounds.
        self.progress.round_step = batch.round_step
        self.progress.tokens += batch.tokens
        self.progress.supervised_tokens += batch.supervised_tokens

    def _restore_guards_and_order(self) -> None:
        """Set the anomaly guards and the sample order to where `self.progress` stands, at a start or after a rollback.

        The guards compare the next steps with the last ones, whose losses and gradient norms the progress has. The order leaves
        out the samples that rollbacks skip.
        """
        self.guards.restore_recent_steps(self.progress.recent_steps, self.progress.level_rows)
        # Counts the steps to the next comparison of the ranks' copies of the weights.
        self.guards.replicas.start_at(self.progress.step)
        # All samples that rollbacks left out so far, since `set_skipped` replaces the order's earlier list.
        skipped_ranges = [(skipped["first"], skipped["count"]) for skipped in self.progress.skipped_samples]
        self.loader.order.set_skipped(skipped_ranges)

    def _roll_back(self, outlier: Outlier) -> None:
        """Go back to a checkpoint from before the step that stood out, and skip its samples from now on. All ranks must call.

        Sets engine, progress, loader, guards and the rows of metrics back to that checkpoint's step. Raises Diverged if the run
        has gone back too often, LeaseLost if another attempt owns the run directory.
        """
        # The question to all ranks whether to stop may still be under way: it ends before other collectives begin.
        self.stop_agreement.stop_now()
        self.require_run_dir_ownership()
        # The error's text names ranges of positions in the order.
        self.guards.raise_if_diverged(
            self.progress.rollbacks + 1, self.progress.samples, self.loader.order.position_ranges
        )
        # Loading the checkpoint overwrites the progress, so what the run has learned since is kept here.
        rollbacks = self.progress.rollbacks + 1
        skipped_samples = self.progress.skipped_samples + outlier.sample_ranges(
            self.progress.samples, self.loader.share.global_batch, self.loader.order.position_ranges
        )
        self._publish_pending_checkpoint()  # a checkpoint that is being written is of a step before this one
        # Later checkpoints are moved aside.
        checkpoint = self.checkpoints.roll_back(outlier.last_good_step)
        self.progress.overwrite_with(self.engine.load(checkpoint))  # in place: `self.outcome` holds the same object
        self.progress.rollbacks = rollbacks
        self.progress.skipped_samples = skipped_samples
        self.progress.outliers += 1
        if self.progress.samples == outlier.first_sample:
            # The checkpoint stands in the round of the outlier itself, whose prompts are left out: begin another one.
            self.progress.round_step = 0
        self.loader.restore(checkpoint)
        self._saved_progress.set_to_loaded_checkpoint(self.progress)
        # Now that the progress is whole: set everything that goes by it back to its step.
        self.guards.record_rollback(self.progress.step)
        self._restore_guards_and_order()
        self.metrics.rewind(self.progress.step)
        self.meter.restart_clock()

    def _evaluate_and_save_if_due(self, is_last: bool) -> None:
        """Evaluate the step just taken if that is due, and save it if it is the best so far or a checkpoint is due.

        All ranks must call.

        `is_last`: whether it is the last step of the budget, which is always evaluated.
        """
        every_steps = self.settings.evaluate_every
        is_evaluation_due = is_last or (every_steps > 0 and self.progress.step % every_steps == 0)
        best_metric_before = self.progress.best_metric
        best_step_before = self.progress.best_step
        improved = is_evaluation_due and self._evaluate_and_record(is_last)
        if every_steps == 0:  # evaluated only at its end, a run has but the last checkpoint to choose
            improved = False
        if (improved and self._may_save_best(is_last)) or self.checkpoints.is_due(self.progress.step):
            self._save_checkpoint(must_succeed=False)
        elif improved:  # nothing is saved, so the best checkpoint stays the earlier one
            self.progress.best_metric = best_metric_before
            self.progress.best_step = best_step_before

    def _may_save_best(self, is_last: bool) -> bool:
        """Whether a best evaluation is worth a checkpoint at once: yes, if the user gave `evaluation.every_steps` as a number.

        With `auto` (`intermediate_loss_only`), the schedule of checkpoints decides, so that saving costs little time. The last
        step needs no question if it is saved anyway.
        """
        if not self.settings.intermediate_loss_only or (is_last and self.settings.save_final):
            return True
        return self.checkpoints.is_improvement_due()

    def _evaluate_and_record(self, is_last: bool) -> bool:
        """Run the evaluators of this step, and record their results; returns whether the watched metric is the best so far.

        With `evaluation.every_steps=auto`, an evaluation before the last step measures the held-out loss alone. If early stopping
        then makes this step the last one, all evaluators run after all. False without evaluators. All ranks must call.
        """
        evaluators = self.evaluators
        if self.settings.intermediate_loss_only and not is_last:
            evaluators = intermediate_evaluators(evaluators)
        if not evaluators:
            return False
        # So that rows of the steps stand before the row of their evaluation.
        self._log_buffered_steps()
        # A signal during the evaluation saves a checkpoint, which says so: the next start makes the evaluation up.
        self.progress.owes_evaluation = True
        self.outcome.last_metrics = self._evaluate(evaluators)
        improved = False
        # An evaluation of the held-out loss alone has no metric of a task, which the run may watch.
        if self.settings.evaluation.watched in self.outcome.last_metrics:
            improved = record_evaluation(self.settings.evaluation, self.progress, self.outcome.last_metrics)
        left_some_out = len(evaluators) < len(self.evaluators)
        if left_some_out and self._early_stop_reason() is not None:
            # Early stopping makes this step the last one, whose evaluation leaves nothing out. Before the checkpoint of this
            # step: a run that is stopped or killed meanwhile still owes it.
            self.outcome.last_metrics = self._evaluate(self.evaluators)
        self.progress.owes_evaluation = False
        # The evaluation does not count in the speed of the next steps.
        self.meter.restart_clock()
        return improved

    def _make_up_interrupted_evaluation(self) -> None:
        """Evaluate and save the step that a resumed run begins with, if a stop interrupted its evaluation. All ranks must call.

        `progress.owes_evaluation` says so; it comes out of the checkpoint.
        """
        if not self.progress.owes_evaluation or not self.evaluators:
            return
        is_last = self.progress.step == self.settings.total_steps
        self._evaluate_and_record(is_last)
        self._saved_progress.require_new_checkpoint()  # the one of this step still says that it owes the evaluation
        self._save_checkpoint()
        self._stop_if_finding_ends_run()

    def _evaluate(self, evaluators: list[Evaluator]) -> dict[str, float]:
        """Run these evaluators; log, print and return their metrics, such as {"eval/loss": 1.93}. All ranks must call.

        The detectors of overfitting and forgetting add metrics of their own. Raises Preempted if the run was asked to stop
        meanwhile, ConfigError if a full evaluation lacks the metric that `evaluation.watch` names.
        """
        metrics: dict[str, float] = {}
        try:
            for evaluator in evaluators:
                metrics.update(evaluator.run(self.engine))
        except Interrupted:
            self._stop_for_signal()  # raises Preempted
        metrics |= self.evaluation_monitor.run_detectors(self.progress, metrics)
        if not metrics:
            return metrics
        step = self.progress.step
        self.metrics.log({**metrics, "tokens": self.progress.tokens, "epoch": self._epochs_done()}, step=step)
        # Tables of questions and answers, for the trackers.
        self.metrics.log_tables(tables_of_evaluators(evaluators), step=step)
        shown = "  ".join(f"{name} {format_metric(value)}" for name, value in metrics.items())
        self.display.print_line(f"evaluation at step {step}:  {shown}")
        if len(evaluators) == len(self.evaluators):  # one of the held-out loss alone need not have the watched metric
            raise_if_watched_metric_is_missing(self.settings.evaluation, metrics)
        return metrics

    def _stop_if_finding_ends_run(self) -> None:
        """Save and raise LimitExceeded if a detector found what ends the run with an error, such as too much forgetting.

        All ranks must call. A finding that ends the run as early stopping does raises nothing here: `_report_early_stop` ends the
        run.
        """
        has_stopping_finding = self.evaluation_monitor.stopping_finding is not None
        counts_as_early_stop = self.evaluation_monitor.early_stopping_text() is not None
        if not has_stopping_finding or counts_as_early_stop:
            return
        # The checkpoint says that it owes an evaluation, so that the next start looks again.
        self.progress.owes_evaluation = True
        self._saved_progress.require_new_checkpoint()  # that of this step may exist already, and does not say so
        self._save_checkpoint()
        self._publish_pending_checkpoint()
        self.evaluation_monitor.raise_if_finding_ends_run()

    def _early_stop_reason(self) -> str | None:
        """Why the run ends before its budget is spent, for the screen; None if it goes on."""
        return self.evaluation_monitor.early_stopping_text() or early_stopping_reason(
            self.settings.evaluation, self.progress
        )

    def _report_early_stop(self) -> bool:
        """Whether patience, or a finding of the detectors, ends the run before its budget is spent; then prints why.

        Patience: the watched metric has not improved for `evaluation.patience` evaluations. It is recorded here; a finding was
        recorded when it was made.
        """
        reason = self._early_stop_reason()
        if reason is None:
            return False
        if self.evaluation_monitor.early_stopping_text() is None:
            self.evaluation_monitor.record_early_stopping(self.progress, reason)
        self.display.print_line(reason)
        return True
