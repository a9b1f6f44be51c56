"""The training loop. Start reading at `Trainer.fit`, then `train_step`; everything else is called from there."""

from __future__ import annotations

import gc
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import fields, replace
from typing import TYPE_CHECKING, NoReturn

from strategies.base import Engine, Progress
from strategies.errors import Interrupted, Preempted, ReplicasDiffer
from strategies.runtime import broadcast_object, seed_dropout_of_step
from trainer.evaluation.base import Evaluator, evaluators_on_the_way, tables_of
from trainer.evaluation.best import check_watched_metric, early_stopping_reason, record_evaluation, restore_best
from trainer.loop_types import BatchLoader, LoopSettings, Monitors, Sinks, WrittenCheckpoint
from trainer.model.routing import EXPERT_TOKENS
from trainer.monitors.anomalies import OUTLIER_KEYS, Outlier, RollBack
from trainer.monitors.levels import LOOK_BACK
from trainer.objectives.step_totals import look_ahead, pop_loss, routing_context
from trainer.optim.schedule import lr_factor_at
from trainer.reporting.console import RunSchedule
from trainer.reporting.expert_load import load_by_layer
from trainer.reporting.metrics import StepRecord
from trainer.reporting.numbers import format_metric
from trainer.reporting.outcome import TrainingOutcome

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.data.batches.loader import StepBatch


class Trainer:
    """Takes steps until the budget is spent, an evaluation ends the run, or a signal asks it to stop."""

    def __init__(
        self,
        settings: LoopSettings,
        *,
        engine: Engine,
        loader: BatchLoader,
        progress: Progress,
        evaluators: list[Evaluator],
        sinks: Sinks,
        monitors: Monitors,
    ) -> None:
        self.settings = settings
        self.engine = engine
        self.loader = loader
        self.progress = progress
        self.evaluators = evaluators

        self.meter = sinks.meter
        self.metrics = sinks.metrics
        self.display = sinks.display
        self.checkpoints = sinks.checkpoints
        self.before_step = sinks.before_step
        self.check_ownership = sinks.check_ownership

        self.agreement = monitors.agreement
        self.guards = monitors.guards
        self.stragglers = monitors.stragglers
        self.evaluation_monitor = monitors.evaluations

        self.outcome = TrainingOutcome(
            progress,
            challenges=self.evaluation_monitor.record,
            watch=settings.evaluation.watched,
            greater_is_better=bool(settings.evaluation.greater_is_better),
        )
        self.current_batch: StepBatch | None = None
        """The batch of the step being taken; None between steps."""
        self._first_step = progress.step
        # A run that resumes at this step has its checkpoint already. -1: there is none of the current step.
        self._saved_step = progress.step if progress.step else -1
        self._being_saved = replace(progress)
        """`progress` as it was when the last checkpoint was begun."""
        self._published = replace(progress)
        """`progress` of the last checkpoint that was published: the best step in it is on the disk."""
        self._reported_checkpoint: WrittenCheckpoint | None = None
        """The last checkpoint whose cost stands in a row."""

    def fit(self) -> TrainingOutcome:
        """Train to the end of the budget. All ranks must call. Raises Preempted after a saved stop, Diverged, StorageError."""
        # What a resumed run had measured before it was interrupted. Only rank 0 has read it.
        earlier = broadcast_object(self.metrics.earlier, self.meter.runtime)
        self.outcome.before = earlier.before
        self.outcome.after = earlier.after
        self.outcome.last_row = earlier.last_row
        self._restore_from_progress()
        if earlier.last_row:
            self.evaluation_monitor.restore_findings(self.progress)
        else:
            # A run may begin with the state of another one, which patience has ended: it counts its own evaluations.
            self.progress.stale_evaluations = 0

        evaluation_began = time.perf_counter()
        self._measure_base_model()
        if self.progress.step == 0 and self.settings.evaluation.at_start:
            self.outcome.before = self._evaluate(self.evaluators)
        evaluation_s = time.perf_counter() - evaluation_began

        # A rollback needs a checkpoint to go back to, also in a run that begins with another run's state.
        if self.guards.may_roll_back:
            self.checkpoints.look_back_steps = LOOK_BACK
            if not self.checkpoints.has_any():
                self._saved_step = -1
                self._save()

        # Objects made so far live as long as the run: the garbage collector need not walk them again and again.
        gc.collect()
        gc.freeze()
        evaluate_every = self.settings.evaluate_every if self.evaluators else 0
        self._schedule = RunSchedule(self.settings.total_steps, self._first_step, time.perf_counter(), evaluate_every)
        self.meter.begin(evaluation_s)
        try:
            while True:
                try:
                    self._take_remaining_steps()
                    break
                except RollBack as rollback:
                    self._roll_back(rollback.outlier)
        finally:
            gc.unfreeze()  # this process may train again, so that the engine of this run must be freed
        self.evaluation_monitor.judge_end(self.progress)
        self._settle()
        if self.settings.save_for_export and not self.checkpoints.has_checkpoint_of(self.progress.step):
            self._saved_step = -1  # a run can have begun from the last step of another one
        if self.settings.save_final:
            self._save()
        elif self.settings.save_for_export and self._saved_step != self.progress.step:
            self.outcome.saved_for_export = True
            self._save(must_succeed=False, replaces_older=False)
        self._settle()
        # An attempt that took no step has no speed of its own.
        self.outcome.speed = self.meter.speed() or earlier.speed
        self.outcome.slow_ranks = self.stragglers.record()
        if self.meter.expert_tokens is not None:
            self.outcome.experts = load_by_layer(self.meter.expert_tokens, self.meter.expert_ranks)
        return self.outcome

    def _take_remaining_steps(self) -> None:
        """Take steps, evaluate and save on schedule, until the budget is spent or evaluation ends the run. Raises RollBack."""
        total = self.settings.total_steps
        # A run that patience or overfitting has ended, and that was killed in its export, takes no further step.
        is_over = self._make_up_evaluation() or self._is_out_of_patience()
        self.outcome.stopped_early = is_over
        remaining = 0 if is_over else total - self.progress.step
        # Closing the generator ends its thread, also where a step raises.
        with closing(self._steps(remaining)) as batches:
            for batch in batches:
                # The question whether to stop travels while the step computes; the answer is read below.
                self.agreement.ask()
                with self.meter.step():
                    self.meter.add(self.train_step(batch))
                is_last = self.progress.step == total
                if is_last or self.meter.pending >= self.settings.log_every:
                    self._flush()
                if self.checkpoints.pending_is_written(self.progress.step):
                    self._settle()
                best_before = (self.progress.best_metric, self.progress.best_step)
                improved = self._evaluate_if_due(is_last)
                saves_best = improved and self._may_save_best(is_last)
                if saves_best or self.checkpoints.is_due(self.progress.step):
                    self._save(must_succeed=False)
                elif improved:  # nothing is saved, so the best checkpoint stays the earlier one
                    self.progress.best_metric, self.progress.best_step = best_before
                self._stop_at_limit()
                if self.agreement.stop_now():
                    self._stop_for_signal()
                if self._is_out_of_patience():
                    self.outcome.stopped_early = True
                    break
        self._flush()

    def _steps(self, num_steps: int) -> Generator[StepBatch, None, None]:
        """Yield the loader's next `num_steps` batches. A signal during a round of generation saves and raises Preempted."""
        try:
            yield from self.loader.steps(self.progress.samples, num_steps)
        except Interrupted:
            self._stop_for_signal()

    def train_step(self, batch: StepBatch) -> StepRecord:
        """One optimizer step over a list of micro-batches. All ranks must call. Reads nothing from the device.

        The loss contract (strategies/base.py): sums over the micro-batch, divided by the count of the whole step, times
        the number of ranks, because every strategy averages over them.
        """
        settings = self.settings
        step = self.progress.step
        self.current_batch = batch
        self.before_step(step + 1)
        # Dropout depends on the seed, the step and the rank alone, so that a resumed run draws what an unbroken one does.
        seed_dropout_of_step(settings.seed, step, self.engine.rank)
        # A step without any target has a count of 0 and a loss of 0.
        loss_count = batch.totals["loss"]
        scale = self.engine.world_size / (loss_count or 1)
        sums: dict[str, Tensor] = {}

        # Some losses need a mean over the whole step before its first backward pass. Most batches have nothing ahead.
        means_ahead = look_ahead(self.engine, batch.ahead, loss_count, averaged=False) if batch.ahead else {}
        step_context = {
            "ahead": means_ahead,
            "drawn_by": (settings.seed, step),
            **routing_context(self.engine, batch),
        }
        for index, micro_batch in enumerate(batch.micro_batches):
            # Most engines exchange gradients on the last micro-batch alone; before it they add up locally.
            last = index == len(batch.micro_batches) - 1
            terms = self.engine.forward({**micro_batch, **step_context}, last=last)
            self.engine.backward(pop_loss(terms, scale, self.engine.world_size), last=last)
            # Sums for the log stay on the device, where the meter reads them once an interval.
            for name, value in terms.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()

        lr_factor = lr_factor_at(settings.schedule, step, settings.total_steps)
        update_filter = self.guards.update_filter(sums["loss"], loss_count)
        step_result = self.engine.step(lr_factor, update_filter)

        self.guards.record_step(self.progress.samples)
        self.progress.step += 1
        self.progress.samples += batch.samples
        self.progress.round_step = batch.round_step
        self.progress.tokens += batch.tokens
        self.progress.supervised_tokens += batch.supervised_tokens
        self.current_batch = None
        return StepRecord(
            step=self.progress.step,
            lr=settings.lr * lr_factor,
            tokens=batch.tokens,
            supervised_tokens=batch.supervised_tokens,
            total_tokens=self.progress.tokens,
            total_supervised_tokens=self.progress.supervised_tokens,
            counts=batch.totals,
            expert_tokens=sums.pop(EXPERT_TOKENS, None),
            local_sums=sums,
            result=step_result,
            local_tokens=batch.local_tokens,
            wait_s=batch.wait_s,
            source_tokens=batch.source_tokens,
            source_counts=batch.source_counts,
            balance=batch.balance,
            epoch=self._epoch(),
            facts=batch.facts,
            round_s=batch.round_s,
        )

    def _epoch(self) -> float:
        """Passes over the training data so far, as a fraction: 2.5 is the middle of the third."""
        return self.progress.samples / self.loader.order.num_units

    # -- rollbacks -------------------------------------------------------------------------------------------------------

    def _restore_from_progress(self) -> None:
        """Put the anomaly guards and the sample order where `self.progress` says the run stands."""
        self.guards.restore_recent_steps(self.progress.recent_steps, self.progress.level_rows)
        self.guards.replicas.start_at(self.progress.step)
        # Samples that rollbacks left out for good. All of them: this replaces the order's earlier list.
        skipped = [(place["first"], place["count"]) for place in self.progress.skipped_samples]
        self.loader.order.set_skipped(skipped)

    def _roll_back(self, outlier: Outlier) -> None:
        """Go back to a checkpoint from before the outlier and skip its samples from now on. All ranks must call."""
        self.agreement.stop_now()  # takes in an answer that may be on its way
        self.check_ownership()
        # The checkpoint knows nothing of what happened after it: keep that over the load.
        skipped_before = self.progress.skipped_samples
        rollbacks = self.progress.rollbacks + 1
        # Steps of one round consume its samples once, so that several steps may have fewer than a batch each.
        global_batch = self.loader.share.global_batch
        num_consumed = self.progress.samples - outlier.first_sample
        num_samples = min(outlier.num_steps * global_batch, max(num_consumed, global_batch))
        skipped_now = self.loader.order.position_ranges(outlier.first_sample, num_samples)
        self.guards.raise_if_diverged(rollbacks, self.progress.samples, self.loader.order.position_ranges)

        self._settle()  # a checkpoint that is being written is of a step before this one
        checkpoint = self.checkpoints.roll_back(outlier.last_good_step)
        loaded = self.engine.load(checkpoint)
        # Field by field, since `self.outcome` holds the same object.
        for field in fields(Progress):
            setattr(self.progress, field.name, getattr(loaded, field.name))
        new_places = [{"first": first, "count": count} for first, count in skipped_now]
        self.progress.skipped_samples = [*skipped_before, *new_places]
        self.guards.record_rollback(self.progress.step)
        self.progress.rollbacks = rollbacks
        self.progress.outliers += 1
        if self.progress.samples == outlier.first_sample:
            # The checkpoint stands in the round of the outlier itself, whose prompts are left out: begin another one.
            self.progress.round_step = 0
        self.loader.restore(checkpoint)
        self._saved_step = self.progress.step
        self._being_saved = self._published = replace(self.progress)

        self._restore_from_progress()
        self.metrics.rewind(self.progress.step)
        self.meter.restart_clock()

    # -- what happens between steps ------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Read the steps since the last flush from the device, and record a row of metrics for each. All ranks must call.

        - `guards.mark_outliers` raises RollBack, before anything is recorded: the steps will be taken again.
        - `_compare_replicas` raises ReplicasDiffer, also without new steps.
        - `loader.check_rows` and `guards.raise_if_diverged` end the run after its rows are recorded, so that they show why.
        """
        rows = self.meter.flush()
        self.guards.mark_outliers(rows)
        self.stragglers.judge_interval(rows, self.meter.by_rank)
        self._compare_replicas()
        if rows:
            self._add_checkpoint_cost(rows)
        for row in rows:
            self.metrics.log(row, step=row["step"])
            self.progress.skipped_steps += int(bool(row.get("skipped")))
            self.progress.outliers += int(any(key in row for key in OUTLIER_KEYS.values()))
        self.evaluation_monitor.take_rows(self.progress, rows)
        if not rows:
            return
        self.outcome.last_row = rows[-1]
        self.display.progress(rows[-1], self._schedule)
        self.loader.check_rows(rows)
        self.guards.raise_if_diverged(self.progress.rollbacks, self.progress.samples, self.loader.order.position_ranges)

    def _add_checkpoint_cost(self, rows: list[dict]) -> None:
        """Add the cost of the last checkpoint (its seconds and bytes) to the first of `rows`, once for each checkpoint."""
        checkpoint = self.checkpoints.last
        if checkpoint is None or checkpoint is self._reported_checkpoint:
            return
        self._reported_checkpoint = checkpoint
        rows[0] = {**rows[0], **checkpoint.row}

    def _evaluate_if_due(self, is_last: bool) -> bool:
        """Evaluate on the schedule; whether the watched metric has improved, so that its checkpoint should be saved."""
        every = self.settings.evaluate_every
        is_due = is_last or (every > 0 and self.progress.step % every == 0)
        if not is_due:
            return False
        return self._evaluate_and_record(is_last) and every > 0

    def _evaluate_and_record(self, is_last: bool) -> bool:
        """Run the evaluators of this step; whether the watched metric is the best so far. All ranks must call."""
        evaluators = self.evaluators
        if not is_last and self.settings.loss_on_the_way:
            evaluators = evaluators_on_the_way(self.evaluators)
        if not evaluators:
            return False
        self._flush()
        # A signal during the evaluation saves a checkpoint, which says so: the next start makes the evaluation up.
        self.progress.owes_evaluation = True
        self.outcome.after = self._evaluate(evaluators)
        improved = False
        if self.settings.evaluation.watched in self.outcome.after:  # on the way a task's metric is not there
            improved = record_evaluation(self.settings.evaluation, self.progress, self.outcome.after)
        if len(evaluators) < len(self.evaluators) and self._early_stop_reason() is not None:
            # Early stopping makes this step the last one, whose evaluation leaves nothing out. Before the checkpoint of this
            # step: a run that is stopped or killed meanwhile still owes it.
            self.outcome.after = self._evaluate(self.evaluators)
        self.progress.owes_evaluation = False
        self.meter.restart_clock()
        return improved

    def _may_save_best(self, is_last: bool) -> bool:
        """Whether an improvement is saved at once. A number of steps that a user gave says how often; `auto` rations it."""
        if not self.settings.loss_on_the_way or (is_last and self.settings.save_final):
            return True
        return self.checkpoints.is_improvement_due()

    def _make_up_evaluation(self) -> bool:
        """Do the evaluation that a stop interrupted, before the next step; whether patience ends the run with it."""
        if not self.progress.owes_evaluation or not self.evaluators:
            return False
        is_last = self.progress.step == self.settings.total_steps
        self._evaluate_and_record(is_last)
        self._saved_step = -1  # this step's checkpoint still owes the evaluation: write it again
        self._save()
        self._stop_at_limit()
        return self._is_out_of_patience()

    def _evaluate(self, evaluators: list[Evaluator]) -> dict[str, float]:
        """Run these evaluators, log their metrics, print and return them. All ranks must call."""
        values: dict[str, float] = {}  # by name, such as `eval/loss`
        try:
            for evaluator in evaluators:
                values.update(evaluator.run(self.engine))
        except Interrupted:
            self._stop_for_signal()
        values |= self.evaluation_monitor.judge_evaluation(self.progress, values)
        if not values:
            return values
        step = self.progress.step
        self.metrics.log({**values, "tokens": self.progress.tokens, "epoch": self._epoch()}, step=step)
        self.metrics.tables(tables_of(evaluators), step=step)
        shown = "  ".join(f"{name} {format_metric(value)}" for name, value in values.items())
        self.display.print_line(f"evaluation at step {step}:  {shown}")
        if len(evaluators) == len(self.evaluators):
            check_watched_metric(self.settings.evaluation, values)
        return values

    def _measure_base_model(self) -> None:
        """Let the evaluation monitor measure the base model before training. A signal meanwhile raises Preempted."""
        try:
            self.evaluation_monitor.begin(self.engine, self.progress)
        except Interrupted:
            self._stop_for_signal()

    def _stop_at_limit(self) -> None:
        """Save and raise LimitExceeded if an evaluation says that the run must not go on. All ranks must call."""
        if self.evaluation_monitor.stopping_finding is None or self.evaluation_monitor.early_stopping_text():
            return
        # The checkpoint owes an evaluation, so that the next start looks again. It may exist already: write it anew.
        self.progress.owes_evaluation = True
        self._saved_step = -1
        self._save()
        self._settle()
        self.evaluation_monitor.raise_if_finding_ends_run()

    def _early_stop_reason(self) -> str | None:
        """Why the run ends before its budget is spent, for the screen; None if it goes on."""
        return self.evaluation_monitor.early_stopping_text() or early_stopping_reason(
            self.settings.evaluation, self.progress
        )

    def _is_out_of_patience(self) -> bool:
        """Whether the run ends before its budget is spent. If so, prints why, and records it if patience ended the run."""
        reason = self._early_stop_reason()
        if reason is None:
            return False
        if self.evaluation_monitor.early_stopping_text() is None:
            self.evaluation_monitor.record_early_stopping(self.progress, reason)
        self.display.print_line(reason)
        return True

    def _stop_for_signal(self) -> NoReturn:
        """Save a checkpoint, unless no step was taken, and raise Preempted. All ranks must call."""
        self.check_ownership()
        self._flush()
        if self.progress.step:
            self._save()
        raise Preempted(
            f"stopped at step {self.progress.step} of {self.settings.total_steps}; start the same run again to continue"
        )

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _save(self, *, must_succeed: bool = True, replaces_older: bool = True) -> None:
        """Write a checkpoint of this step; without `must_succeed` only begin it, and accept that it may fail.

        Without `replaces_older`, no older one is deleted for it. All ranks must call. One that is pending is published first.
        """
        self._flush()
        self._settle()
        if self._saved_step != self.progress.step:
            self.check_ownership()
            self._compare_replicas(now=True)  # a checkpoint of replicas that differ would be worth nothing
            self.progress.recent_steps = self.guards.recent_steps()
            self.progress.level_rows = self.guards.level_shifts.rows
            self.metrics.sync()  # rows up to this step are on the disk before the checkpoint is
            self._being_saved = replace(self.progress)
            attachments = self.loader.attachments()
            saved = self.checkpoints.save(
                self.engine,
                self.progress,
                must_succeed=must_succeed,
                replaces_older=replaces_older,
                attachments=attachments,
            )
            self._record_saved(saved)
        self.meter.restart_clock()

    def _settle(self) -> None:
        """Publish the checkpoint that is pending, if there is one. All ranks must call."""
        if self.checkpoints.pending_step is not None:
            self.check_ownership()
            self._record_saved(self.checkpoints.publish_pending())

    def _record_saved(self, succeeded: bool) -> None:
        """Set the step of the last checkpoint after a save has begun, succeeded or failed:

        - published: the state on the disk is that of this save.
        - begun, and pending: nothing more, since it may still fail.
        - failed: if it was the best step, the best metric is again that of the checkpoint on the disk.
        """
        step = self._being_saved.step
        self._saved_step = step if succeeded else -1
        if succeeded and self.checkpoints.pending_step is None:
            self._published = self._being_saved
        elif not succeeded and self.progress.best_step == step:
            restore_best(self.progress, self._published)

    def _compare_replicas(self, *, now: bool = False) -> None:
        """Compare the weights of the replicas if that is due, or `now`. Raises ReplicasDiffer. All ranks must call."""
        try:
            self.guards.replicas.compare(self.engine, self.progress.step, now=now)
        except ReplicasDiffer:
            self._settle()  # a checkpoint of an earlier step, at which the replicas were alike
            raise
