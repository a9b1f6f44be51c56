"""The training loop. Start reading at `Trainer.fit`, then `train_step`; everything else is called from there."""

from __future__ import annotations

import gc
import time
from contextlib import closing
from dataclasses import fields, replace

import torch

from strategies.base import Engine, Progress
from strategies.errors import Preempted, ReplicasDiffer
from strategies.runtime import broadcast_object, seed_step
from trainer.checkpoints.async_writer import SavedCheckpoint
from trainer.data.batches.loader import StepBatch, StepLoader
from trainer.evaluation.base import Evaluator
from trainer.evaluation.best import note_best, out_of_patience, refuse_unknown
from trainer.evaluation.loss import Interrupted
from trainer.given import LoopSettings, Output, Watch
from trainer.monitors.anomalies import OUTLIERS, Outlier, RollBack
from trainer.objectives.routed import ADDED, EXPERT_TOKENS, told
from trainer.objectives.step_totals import look_ahead
from trainer.optim.schedule import lr_factor_at
from trainer.reporting.console import Course
from trainer.reporting.expert_load import by_layer
from trainer.reporting.metrics import StepRecord
from trainer.reporting.numbers import readable
from trainer.reporting.outcome import Outcome


class Trainer:
    """Takes steps until the budget is spent, evaluation says stop, or the run is asked to."""

    def __init__(
        self,
        settings: LoopSettings,
        *,
        engine: Engine,
        loader: StepLoader,
        progress: Progress,
        evaluators: list[Evaluator],
        output: Output,
        watch: Watch,
    ) -> None:
        self.settings, self.engine, self.loader, self.progress = settings, engine, loader, progress
        self.evaluators, self.agreement, self.guards = evaluators, watch.agreement, watch.guards
        self.stragglers = watch.stragglers
        self.challenges = watch.challenges
        self.meter, self.trackers, self.console = output.meter, output.trackers, output.console
        self.checkpoints, self.at_step, self.still_ours = output.checkpoints, output.at_step, output.still_ours
        self.outcome = Outcome(
            progress,
            challenges=self.challenges.record,
            watch=settings.evaluation.watch,
            greater_is_better=bool(settings.evaluation.greater_is_better),
        )
        self._first_step = progress.step
        self._saved_step = progress.step if progress.step else -1
        self._saving = self._best = replace(self.progress)
        self._told: SavedCheckpoint | None = None
        self.taken: StepBatch | None = None
        """What the step that is being taken is taken on."""

    def fit(self) -> Outcome:
        """Train to the end of the budget. All ranks must call. Raises Preempted after a saved stop, Diverged, StorageError."""
        earlier = broadcast_object(self.trackers.earlier, self.meter.runtime)
        self.outcome.before, self.outcome.after = earlier.before, earlier.after
        self.outcome.last_row = earlier.last_row
        self._go_on()
        entered = time.perf_counter()
        self._ask_base()
        if self.progress.step == 0 and self.settings.evaluation.at_start:
            self.outcome.before = self._evaluate()
        evaluation_s = time.perf_counter() - entered
        if self.guards.goes_back and not self.checkpoints.any():  # also where the run goes on from another one's
            self._saved_step = -1
            self._save()
        # Objects made so far live as long as the run: keep the garbage collector from walking them again and again.
        gc.collect()
        gc.freeze()
        every = self.settings.evaluation.every_steps if self.evaluators else 0
        self._course = Course(self.settings.total_steps, self._first_step, time.perf_counter(), every)
        self.meter.begin(evaluation_s)
        while True:
            try:
                self._to_the_end()
                break
            except RollBack as back:
                self._roll_back(back.outlier)
        self.challenges.finished(self.progress)
        if self.settings.save_final:
            self._save()
        self._settle()
        self.outcome.speed = self.meter.speed() or earlier.speed
        self.outcome.slow_ranks = self.stragglers.record()
        if self.meter.expert_tokens is not None:
            self.outcome.experts = by_layer(self.meter.expert_tokens)
        return self.outcome

    def _to_the_end(self) -> None:
        """Steps, and what is due between them, until the budget is spent or evaluation says stop. Raises RollBack."""
        total = self.settings.total_steps
        left = 0 if self._make_up_evaluation() else total - self.progress.step
        with closing(self.loader.steps(self.progress.samples, left)) as batches:
            for batch in batches:
                self.agreement.ask()
                with self.meter.step():
                    self.meter.add(self.train_step(batch))
                last = self.progress.step == total
                if last or self.meter.pending >= self.settings.log_every:
                    self._flush()
                if self.checkpoints.written(self.progress.step):
                    self._settle()
                improved = self._evaluate_if_due(last)
                if improved or self.checkpoints.due(self.progress.step):
                    self._save(must=False)
                self._stop_at_limit()
                if self.agreement.stop_now():
                    self._stop_for_signal()
                if self._out_of_patience():
                    self.outcome.stopped_early = True
                    break
        self._flush()

    def _go_on(self) -> None:
        """Let what goes by the progress go on from it: the window of the guards, and the order of the samples."""
        self.guards.begin(self.progress.recent)
        self.guards.replicas.begin(self.progress.step)
        self.loader.order.pass_over((each["first"], each["count"]) for each in self.progress.passed)

    def _roll_back(self, outlier: Outlier) -> None:
        """Go on from the last checkpoint as a run that never meets the samples of this step. All ranks must call."""
        self.agreement.stop_now()  # an answer may be on its way
        self.still_ours()
        passed, rollbacks = self.progress.passed, self.progress.rollbacks + 1
        places = self.loader.order.places(outlier.first_sample, self.loader.share.global_batch)
        self.guards.stop_if_diverged(rollbacks, self.progress.samples, self.loader.order.places)
        self._settle()  # of a step before this one
        loaded = self.engine.load(self.checkpoints.go_back())
        for each in fields(Progress):  # the outcome has the same object
            setattr(self.progress, each.name, getattr(loaded, each.name))
        self.progress.passed = [*passed, *({"first": first, "count": count} for first, count in places)]
        self.progress.rollbacks, self.progress.outliers = rollbacks, self.progress.outliers + 1
        self._saved_step = self.progress.step
        self._saving = self._best = replace(self.progress)
        self._go_on()
        self.trackers.rewind(self.progress.step)
        self.meter.restart_clock()

    def train_step(self, batch: StepBatch) -> StepRecord:
        """One optimizer step over a list of micro-batches. All ranks must call. Reads nothing from the device.

        The loss contract (strategies/base.py): sums over the micro-batch, divided by the count of the whole step, times
        the number of ranks, because every strategy averages over them.
        """
        step, settings, self.taken = self.progress.step, self.settings, batch
        self.at_step(step + 1)
        seed_step(settings.seed, step, self.engine.dp_rank)
        scale = self.engine.dp_size / (batch.totals["loss"] or 1)
        sums: dict[str, torch.Tensor] = {}
        means = look_ahead(self.engine, batch.ahead, batch.totals["loss"], averaged=False) if batch.ahead else {}
        given = {"ahead": means, "drawn_by": (settings.seed, step), **told(self.engine, batch)}
        for index, micro_batch in enumerate(batch.micro_batches):
            last = index == len(batch.micro_batches) - 1
            terms = self.engine.forward({**micro_batch, **given}, last=last)
            self.engine.backward(self._whole_loss(terms, scale), last=last)
            for name, value in terms.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        factor = lr_factor_at(settings.schedule, step, settings.total_steps)
        result = self.engine.step(factor, self.guards.judge(sums["loss"], batch.totals["loss"]))

        self.guards.taken(self.progress.samples)
        self.progress.step += 1
        self.progress.samples += batch.samples
        self.progress.tokens += batch.tokens
        self.progress.supervised_tokens += batch.supervised_tokens
        self.taken = None
        return StepRecord(
            step=self.progress.step,
            lr=settings.lr * factor,
            tokens=batch.tokens,
            supervised_tokens=batch.supervised_tokens,
            total_tokens=self.progress.tokens,
            total_supervised_tokens=self.progress.supervised_tokens,
            counts=batch.totals,
            expert_tokens=sums.pop(EXPERT_TOKENS, None),
            local_sums=sums,
            result=result,
            local_tokens=batch.local_tokens,
            wait_s=batch.wait_s,
            source_tokens=batch.source_tokens,
            source_counts=batch.source_counts,
            balance=batch.balance,
        )

    def _whole_loss(self, terms: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
        """What goes into the backward pass: the objective's part of the step's mean, and what the model adds to that."""
        loss, more = terms["loss"] * scale, terms.pop(ADDED, None)
        return loss if more is None else loss + more * self.engine.dp_size

    # -- what happens between steps ------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Read the buffered steps from the device and record them. Raises Diverged, and RollBack with nothing recorded."""
        rows = self.meter.flush()
        self.guards.look(rows)
        self.stragglers.look(rows, self.meter.by_rank)
        self._compare_replicas()
        if rows and (saved := self.checkpoints.last) is not None and saved is not self._told:
            self._told, rows[0] = saved, {**rows[0], **saved.row}
        for row in rows:
            self.trackers.log(row, step=row["step"])
            self.progress.skipped_steps += int(bool(row.get("skipped")))
            self.progress.outliers += int(any(key in row for key in OUTLIERS))
        self.challenges.rows(self.progress, rows)
        if not rows:
            return
        self.outcome.last_row = rows[-1]
        self.console.progress(rows[-1], self._course)
        self.guards.stop_if_diverged(self.progress.rollbacks, self.progress.samples, self.loader.order.places)

    def _evaluate_if_due(self, last: bool) -> bool:
        """Evaluate on the schedule; whether the watched metric has improved."""
        every = self.settings.evaluation.every_steps
        if not self.evaluators or not (last or (every > 0 and self.progress.step % every == 0)):
            return False
        self._flush()
        self.progress.owes_evaluation = True  # as a checkpoint says that is written where it is broken off
        self.outcome.after = self._evaluate()
        self.progress.owes_evaluation = False
        improved = note_best(self.settings.evaluation, self.progress, self.outcome.after)
        self.meter.restart_clock()
        return improved and every > 0

    def _make_up_evaluation(self) -> bool:
        """Do what a stop has broken off, before the next step; whether patience is at its end with it."""
        if not self.progress.owes_evaluation or not self.evaluators:
            return False
        self._evaluate_if_due(last=True)
        self._saved_step = -1  # of this step again: its checkpoint owes the evaluation
        self._save()
        self._stop_at_limit()
        self.outcome.stopped_early = self._out_of_patience()
        return self.outcome.stopped_early

    def _evaluate(self) -> dict[str, float]:
        values: dict[str, float] = {}
        try:
            for evaluator in self.evaluators:
                values.update(evaluator.run(self.engine))
        except Interrupted:
            self._stop_for_signal()
        values |= self.challenges.evaluated(self.progress, values)
        if values:
            self.trackers.log({**values, "tokens": self.progress.tokens}, step=self.progress.step)
            shown_beside = {name: each for one in self.evaluators for name, each in getattr(one, "tables", {}).items()}
            self.trackers.tables(shown_beside, step=self.progress.step)
            shown = "  ".join(f"{name} {readable(value)}" for name, value in values.items())
            self.console.say(f"evaluation at step {self.progress.step}:  {shown}")
            refuse_unknown(self.settings.evaluation, values)
        return values

    def _ask_base(self) -> None:
        try:
            self.challenges.begin(self.engine, self.progress)
        except Interrupted:
            self._stop_for_signal()

    def _stop_at_limit(self) -> None:
        """Raise LimitExceeded where an evaluation says that the run must not go on, with its state saved. All ranks alike."""
        if self.challenges.ends is not None and not self.challenges.stops_early():
            self.progress.owes_evaluation, self._saved_step = True, -1  # so that a start after this looks again
            self._save()
            self._settle()
            self.challenges.raise_if_exceeded()

    def _out_of_patience(self) -> bool:
        said = self.challenges.stops_early() or out_of_patience(self.settings.evaluation, self.progress)
        if said:
            self.console.say(said)
        return bool(said)

    def _save(self, *, must: bool = True) -> None:
        """A checkpoint of this step, which is only begun unless it `must` be; one that is pending comes first."""
        self._flush()
        self._settle()
        if self._saved_step != self.progress.step:
            self.still_ours()
            self._compare_replicas(now=True)
            self.progress.recent = self.guards.recent()
            self.trackers.sync()
            self._saving = replace(self.progress)
            self._note_saved(self.checkpoints.save(self.engine, self.progress, must=must))
        self.meter.restart_clock()

    def _compare_replicas(self, *, now: bool = False) -> None:
        try:
            self.guards.replicas.compare(self.engine, self.progress.step, now=now)
        except ReplicasDiffer:
            self._settle()  # of an earlier step, at which they were alike
            raise

    def _settle(self) -> None:
        """Publish the checkpoint that is pending, where there is one."""
        if self.checkpoints.pending is not None:
            self.still_ours()
            self._note_saved(self.checkpoints.settle())

    def _note_saved(self, saved: bool) -> None:
        """The checkpoint that was begun last is there (or pending), or could not be written: the best is one that there is."""
        step = self._saving.step
        self._saved_step = step if saved else -1
        if saved and self.checkpoints.pending is None:
            self._best = self._saving
        elif not saved and self.progress.best_step == step:
            self.progress.best_metric, self.progress.best_step = self._best.best_metric, self._best.best_step

    def _stop_for_signal(self) -> None:
        self.still_ours()
        self._flush()
        if self.progress.step:
            self._save()
        raise Preempted(
            f"stopped at step {self.progress.step} of {self.settings.total_steps}; start the same run again to go on"
        )
