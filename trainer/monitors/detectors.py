"""Runs the detectors of a run after each evaluation, and reports their findings. The same on all ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from strategies.base import Engine, Progress
from strategies.errors import LimitExceeded, StorageError
from trainer.evaluation.generation import AnswerWithReference
from trainer.evaluation.task_evaluator import FinishedTask
from trainer.evaluation.tasks.base import TaskRow
from trainer.evaluation.tasks.written import GenerationTask
from trainer.monitors import degenerate_answers, divergence, forgetting, instability, overfitting, rewards
from trainer.monitors.base import Evidence, Finding, ModelAnswer
from trainer.monitors.base_model_rows import BaseRows
from trainer.monitors.config import CHAT_ANSWERS, ChallengesConfig, Reaction
from trainer.monitors.first_evaluation import HeldOutEvaluation, HeldOutFile
from trainer.monitors.first_rows import FirstRows
from trainer.monitors.kept_answers import GENERATED, KeptAnswer, KeptAnswers
from trainer.reporting.jsonl import json_text
from trainer.reporting.metric_rows import read_rows

DETECTORS: dict[str, Any] = {"overfitting": overfitting, "forgetting": forgetting, "output": degenerate_answers}
"""What looks at an evaluation, by the name of its settings."""
EARLY_STOPPING = "early_stopping"
"""Name of the finding that patience (`evaluation.patience`) has ended the run."""
EARLY_STOPPING_REMEDIES = ("more and other data", "a lower optim.lr", "tuning=lora with a lower tuning.rank")
EVENT_KEYS = ("event", "time", "challenge")
"""Keys of a finding in `events.jsonl` that are not in the record."""
HELD_OUT = "eval/loss"
HELD_OUT_REWARD = "eval/reward"


class ChallengeDetectors:
    """Runs all detectors on the evaluations and training losses of a run. Nothing here communicates but `begin`."""

    def __init__(
        self,
        config: ChallengesConfig,
        planned_evaluations: int,
        compared_term: str,
        print_line: Callable[[str], None] = lambda text: None,
        events: Path | None = None,
    ) -> None:
        """`planned_evaluations`: of the whole run. `compared_term`: the loss of a row that is measured as the held-out one is.

        `events`: the file that findings are written to, on rank 0.
        """
        self.config = config
        self.planned_evaluations = planned_evaluations
        self.planned_task_evaluations = planned_evaluations
        """Evaluations of the whole run that ask tasks; fewer if those on the way compute the held-out loss alone."""
        self.compared_term = compared_term
        self.print_line = print_line
        self.events = events
        self.base_rows: BaseRows | None = None
        self.record: dict[str, Any] = {}
        """By detector: what was found first, or what was measured last. Into `run.json`."""
        self.stopping_finding: Finding | None = None
        """What ends the run once its state is saved."""
        self.first_rows = FirstRows(None)
        """Rows of each task's first evaluation, for the tables of rows that changed sides since."""
        self.kept_answers = KeptAnswers(None)
        """Keeps the first answers of the first evaluation and of the newest."""
        self.first_evaluation_file: HeldOutFile | None = None
        """Keeps the evaluation before the first step; None: a resumed run does not know it."""
        self.last_evaluation_file: HeldOutFile | None = None
        """Keeps the last evaluation, which `shardtune compare` pairs with that of another run; None: it is not kept."""
        self.held_out_before = HeldOutEvaluation()
        self.control_metrics: list[str] | None = None
        """Metrics of rewards of weight 0; None: the run does not learn from rewards, but from a loss that can be compared."""
        self.loss_window = divergence.MIN_WINDOW
        """How many last steps the training loss now is the median of."""
        self.first_judged_step = divergence.FIRST_JUDGED
        """The first step at which divergence is judged."""
        self.on_record: Callable[[dict[str, Any]], None] = lambda record: None
        """Called with the record after each evaluation, on all ranks."""
        self._reported_verdicts: set[str] = set()
        """Verdicts on divergence and rewards that were reported, each of which is reported once."""
        self._batch_sums: dict[str, list[float]] = {}
        """Sums over each micro-batch of the evaluation that runs, by metric."""
        self._answers: list[ModelAnswer] = []
        """Answers that were written since the last evaluation was judged."""
        self.chat_rows: list[TaskRow] = []
        """The tuned model's newest answers to the questions that are shown at the end of the run."""
        self._compared_tasks: list[forgetting.ComparedTask] = []
        """Tasks that were run since the last evaluation was judged, beside the base."""

    @property
    def learns_from_rewards(self) -> bool:
        """Whether the run learns from rewards, so that its losses say nothing and its rewards are judged instead."""
        return self.control_metrics is not None

    # -- what is seen ----------------------------------------------------------------------------------------------

    def begin(self, engine: Engine, progress: Progress) -> None:
        """Prepare the detectors before the first step of a start: read what an earlier start of this run kept in its directory.

        That is the rows of the first evaluation, and the held-out metrics from before training. If forgetting is measured, the
        base model's answers are read or asked for. All ranks must call. Raises Interrupted on all or none.
        """
        self.first_rows.begin(progress.step)
        if self.first_evaluation_file is not None and progress.step:
            self.held_out_before = self.first_evaluation_file.read()
        if self.base_rows is not None:
            self.base_rows.begin(engine, progress.step)

    def restore_findings(self, progress: Progress) -> None:
        """Take over what earlier starts of this run found, up to the step of the checkpoint it resumes from. All ranks must call.

        If overfitting has ended the run at that step, `stopping_finding` is set again: no further step could find it again.
        """
        # An event is {"event": "challenge", "challenge": "divergence", "step": 40, ...}, for example.
        for event in self._recorded_events():
            if event.get("event") == "challenge" and event["step"] <= progress.step:
                finding_record = {key: event[key] for key in event if key not in EVENT_KEYS}
                self.record.setdefault(str(event["challenge"]), finding_record)
                self._reported_verdicts.add(str(event.get("verdict", "")))
        self._judge_last_evaluation_again(progress)

        config = self.config.overfitting
        evaluations = progress.evaluations
        is_at_evaluation = bool(evaluations) and evaluations[-1]["step"] == progress.step
        if config.action is not Reaction.stop or self.learns_from_rewards or not is_at_evaluation:
            return
        finding = overfitting.find_problem(
            config, Evidence(progress.step, {}, self.planned_evaluations, progress.evaluations)
        )
        if finding is not None:
            self.stopping_finding = finding
            self.record[finding.detector] = finding.record()

    def _judge_last_evaluation_again(self, progress: Progress) -> None:
        """Judge divergence at this step by the kept evaluation, if it is of this step: the run may have recovered by then."""
        if self.last_evaluation_file is None:
            return
        last_evaluation = self.last_evaluation_file.read()
        if self.first_evaluation_file is not None:  # what it is compared with; `begin` comes later
            self.held_out_before = self.first_evaluation_file.read()
        is_of_this_step = last_evaluation.step == progress.step and bool(last_evaluation.values)
        if is_of_this_step and not self.learns_from_rewards:
            self._batch_sums = last_evaluation.batches
            self._judge_divergence(progress, last_evaluation.values)

    def add_step_metrics(self, progress: Progress, rows: Iterable[dict[str, Any]]) -> None:
        """Add the losses of a logging interval's steps to `progress`, or their rewards if the run learns from rewards.

        `rows`: the metrics of each step. Without any evaluation, divergence is judged here, by the training loss alone.
        """
        if self.control_metrics is not None:
            self._add_rewards(progress, rows, self.control_metrics)
            return
        new_losses: list[dict[str, float]] = []
        for row in rows:
            loss = row.get(self.compared_term, row["loss"])
            if math.isfinite(loss):
                progress.interval_loss += loss
                progress.interval_steps += 1
                new_losses.append({"loss": loss})
                if row["step"] == 1:
                    progress.first_loss = loss
        all_losses = [*progress.recent_losses, *new_losses]
        progress.recent_losses = all_losses[-divergence.MAX_WINDOW :]
        if not self.held_out_before.values and not progress.evaluations:
            self._judge_divergence(progress, {})

    def _add_rewards(self, progress: Progress, rows: Iterable[dict[str, Any]], controls: list[str]) -> None:
        """Take the rewards of steps in place of losses, which are 0 here by construction, and judge each full block of steps.

        `controls`: metrics of the rewards of weight 0, which are measured and not trained.
        """
        for row in rows:
            # The steps of a round learn from the same answers, which count once.
            if rewards.REWARD not in row or row.get(rewards.ROUND_STEP):
                continue
            progress.interval_loss += row[rewards.REWARD]
            progress.interval_steps += 1
            if rewards.add_step_to_blocks(progress.reward_blocks, row, controls):
                self._judge_rewards(progress, int(row["step"]))

    def _judge_rewards(self, progress: Progress, step: int) -> None:
        """Report what is wrong with the rewards of a run (cheated, collapsed, longer, idle: see rewards.py), each once."""
        if self.control_metrics is None or self.config.rewards.action is Reaction.off:
            return
        blocks = progress.reward_blocks
        for finding in rewards.find_problems(
            self.config.rewards, step, blocks, progress.evaluations, self.control_metrics
        ):
            is_new = finding.verdict not in self._reported_verdicts
            self._reported_verdicts.add(finding.verdict)
            if is_new:
                self._report(finding, is_repeat=False)
            elif finding.stops and self.stopping_finding is None:
                # An earlier start reported it, as rank 0 alone knows: the run ends again, on all ranks.
                self.stopping_finding = finding

    def add_batch_sums(self, batch_sums: dict[str, list[float]]) -> None:
        """Keep the sums of each metric over each micro-batch of the evaluation documents, until the evaluation is judged."""
        self._batch_sums = batch_sums

    def add_task(self, finished_task: FinishedTask) -> None:
        """Take a finished task: its written answers, and how its first metric changed from the base's, if the base was asked."""
        task = finished_task.prepared.task
        if isinstance(task, GenerationTask):
            self.add_answers(
                task.name, [KeptAnswer(row.prompt, row.answer, row.reference) for row in finished_task.rows]
            )
        if task.name == CHAT_ANSWERS:  # for people to read: two answers are no measurement
            self.chat_rows = finished_task.rows
            return
        if self.base_rows is None or self.base_rows.tasks is None or task.name not in self.base_rows.tasks:
            return
        base_task = self.base_rows.tasks[task.name]
        metric = task.metrics[0]
        base_and_tuned_value = (base_task.value, finished_task.metrics[metric.name])
        self._compared_tasks.append(
            forgetting.compare_with_base(task.name, metric, base_task.rows, finished_task.rows, base_and_tuned_value)
        )

    def ask_chat_again(self, engine: Engine) -> None:
        """Have the model write its two answers with the weights of `engine`. All ranks must call. Raises Interrupted."""
        if self.base_rows is None or CHAT_ANSWERS not in self.base_rows.names:
            return
        self.base_rows.evaluator.model.engine = engine
        for done in self.base_rows.evaluator.run_tasks([CHAT_ANSWERS]):
            self.chat_rows = done.rows

    def answer_pairs(self) -> list[dict[str, str]]:
        """Two questions with the answers of base and tuned model (`question`, `base`, `tuned`); empty if they were not asked."""
        kept = {} if self.base_rows is None or self.base_rows.tasks is None else self.base_rows.tasks
        if CHAT_ANSWERS not in kept:
            return []
        pairs = []
        for base_row, tuned_row in zip(kept[CHAT_ANSWERS].rows, self.chat_rows, strict=False):
            pairs.append({"question": tuned_row.question, "base": base_row.answer, "tuned": tuned_row.answer})
        return pairs

    def add_answers(self, task: str, answers: Sequence[KeptAnswer]) -> None:
        """Take the answers that were written for a task, for the next evaluation; the first of them are kept."""
        for answer in answers:
            self._answers.append(ModelAnswer(answer.answer, answer.reference))
        self.kept_answers.add(task, answers)

    def add_generated(self, answers: Sequence[AnswerWithReference]) -> None:
        """Take the answers to the run's own evaluation documents."""
        kept = [KeptAnswer(answer.prompt, answer.answer, answer.reference) for answer in answers]
        self.add_answers(GENERATED, kept)

    def follow_renamed_run_dir(self, run_dir: Path) -> None:
        """Write further files into the run's directory under its new name."""
        if self.events is not None:
            self.events = run_dir / self.events.name
        for kept in (self.first_rows, self.kept_answers, self.first_evaluation_file, self.last_evaluation_file):
            if kept is not None and kept.path is not None:
                kept.path = run_dir / kept.path.name

    # -- what is found ---------------------------------------------------------------------------------------------

    def judge_evaluation_metrics(self, progress: Progress, values: dict[str, float]) -> dict[str, float]:
        """Run the detectors on an evaluation, with the tasks taken since the last one, and report what is found the first time.

        `values`: its metrics by name. Returns the numbers that are logged beside them, such as {"forgetting": 0.02}.
        """
        self._record_evaluation(progress, values)
        self.kept_answers.write(progress.step)
        evidence = Evidence(
            progress.step,
            values,
            self.planned_evaluations,
            progress.evaluations,
            self._answers,
            self._compared_tasks,
            self.planned_task_evaluations,
        )
        self._answers = []
        self._compared_tasks = []
        logged: dict[str, float] = {}
        for name, detector in DETECTORS.items():
            config = getattr(self.config, name)  # the settings are named as the detectors
            has_no_loss = detector is overfitting and self.learns_from_rewards
            if config.action is Reaction.off or has_no_loss:
                continue
            metrics = detector.logged_metrics(evidence)
            logged |= metrics
            was_found = bool(self.record.get(name, {}).get("found"))
            if metrics and not was_found:
                self.record[name] = {"found": False, "step": progress.step, **metrics}
            finding = detector.find_problem(config, evidence)
            if finding is not None:
                self._report(finding, is_repeat=was_found)
        if self.learns_from_rewards:
            self._judge_rewards(progress, progress.step)
        elif progress.step == 0:
            self._write_first_evaluation(values)
        else:
            self._write_last_evaluation(progress.step, values)
            self._judge_divergence(progress, values)
        self.on_record(self.record)
        return logged

    def _write_first_evaluation(self, values: dict[str, float]) -> None:
        """Keep the evaluation before the first step. Raises StorageError if that fails."""
        self.held_out_before = HeldOutEvaluation(_paired_metrics(values), self._batch_sums)
        if self.first_evaluation_file is not None:
            self.first_evaluation_file.write(self.held_out_before)

    def _write_last_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Keep the evaluation after `step` in place of the one before it. Raises StorageError if that fails."""
        if self.last_evaluation_file is not None and self._batch_sums:
            self.last_evaluation_file.write(HeldOutEvaluation(_paired_metrics(values), self._batch_sums, step))

    def _judge_divergence(self, progress: Progress, values: dict[str, float]) -> None:
        """Compare training and held-out loss with those at the run's beginning, and record whether the run is worse now.

        `values`: metrics of the evaluation at this step; empty if there is none. Sets `record["divergence"]`:

        - Divergence is off, or it is too early to judge: nothing is set.
        - No finding: the run has recovered, if there was one before.
        - A verdict (`diverged`, `worse`) that was reported before: only the newest numbers. It may set `stopping_finding`.
        - A new verdict: it is reported.
        """
        if self.config.divergence.action is Reaction.off or progress.step < self.first_judged_step:
            return
        losses = [row["loss"] for row in progress.recent_losses]
        training = divergence.training_change(progress.first_loss, losses, self.loss_window)
        held_out = self._held_out_change(progress, values)
        finding = divergence.divergence_finding(self.config.divergence, progress.step, training, held_out)

        earlier_record = self.record.get(divergence.NAME, {})
        if finding is None:
            if earlier_record.get("found"):
                self.record[divergence.NAME] = {**earlier_record, "found": False, "recovered_at": progress.step}
            elif not earlier_record:
                self.record[divergence.NAME] = {"found": False, "step": progress.step}
            return

        first_step = progress.step
        if earlier_record.get("found"):
            # A record that was read from an event has no `first_step`.
            first_step = earlier_record.get("first_step", earlier_record["step"])
        if finding.verdict in self._reported_verdicts:  # reported already: only the numbers are new
            self.record[divergence.NAME] = finding.record()
            if finding.stops and self.stopping_finding is None:
                self.stopping_finding = finding
        else:
            self._reported_verdicts.add(finding.verdict)
            self._report(finding, is_repeat=False)
        self.record[divergence.NAME]["first_step"] = first_step

    def _held_out_change(self, progress: Progress, values: dict[str, float]) -> divergence.HeldOutChange | None:
        """How the held-out margin (of preference objectives) or loss changed since before the first step; None if not known.

        `values`: metrics of the evaluation at this step; empty if there is none. The change comes with a paired test over
        micro-batches if both evaluations had the same ones. Its level is divided by the number of evaluations (Bonferroni).
        """
        before = dict(self.held_out_before.values)
        if not before and progress.evaluations and progress.evaluations[0]["step"] == 0:
            before[divergence.LOSS] = progress.evaluations[0]["held_out"]  # a run that kept no micro-batches
        for metric in (divergence.MARGIN, divergence.LOSS):
            if metric in before and metric in values:
                pairs = self.held_out_before.paired_batch_sums(metric, self._batch_sums)
                level = divergence.LEVEL / max(1, self.planned_evaluations)
                return divergence.held_out_change(metric, (before[metric], values[metric]), pairs, level)
        return None

    def _record_evaluation(self, progress: Progress, values: dict[str, float]) -> None:
        """Add an evaluation to `progress.evaluations`, the history that overfitting is judged by; it is in checkpoints.

        An entry has the held-out loss (`eval/loss`, or the reward of a run that learns from rewards) and the mean training loss
        since the last evaluation. Nothing is added if no step was taken since then.
        """
        held_out = values.get(HELD_OUT_REWARD if self.learns_from_rewards else HELD_OUT)
        num_steps = progress.interval_steps
        if held_out is None or not math.isfinite(held_out) or (progress.step and not num_steps):
            return
        if progress.step:
            train = progress.interval_loss / num_steps
        else:
            train = held_out  # before the first step there is no training loss
        progress.evaluations.append({"step": float(progress.step), "train": train, "held_out": held_out})
        progress.interval_loss = 0.0
        progress.interval_steps = 0

    def record_findings_of_whole_run(self, progress: Progress) -> None:
        """When training is over: report instability, judge divergence of a run without evaluations, and say what recovered."""
        finding = instability.find_problem(progress)
        if finding is not None:
            self._report(finding, is_repeat=False)
        if not progress.evaluations and not self.learns_from_rewards:
            self._judge_divergence(progress, {})
        recovered_at = self.record.get(divergence.NAME, {}).get("recovered_at")
        if recovered_at is not None:
            verdict = self.record[divergence.NAME].get("verdict")
            self.print_line(f"recovered by step {recovered_at}: the run is no longer {verdict}")
        self.on_record(self.record)

    def _report(self, finding: Finding, *, is_repeat: bool) -> None:
        """Record a finding in `record`. If it stops the run, and none did before, set `stopping_finding`.

        - `is_repeat`, the detector has reported at an earlier step: only its newest numbers are recorded.
        - Otherwise: it is recorded and printed. It is appended to `events.jsonl` unless it is there: a process that was killed
          after writing it, and resumed at the checkpoint before, finds it once more.
        """
        if finding.stops and self.stopping_finding is None:
            self.stopping_finding = finding
        if is_repeat:
            newest = {"step": finding.step, "says": finding.message, **finding.numbers}
            self.record[finding.detector]["last"] = newest
            return
        self.record[finding.detector] = finding.record()
        self.print_line(
            f"warning: {finding.detector} at step {finding.step}: {finding.message}. Try: {'; '.join(finding.remedies)}"
        )
        if not self._is_in_events(finding):
            self._append_event(finding)

    def _is_in_events(self, finding: Finding) -> bool:
        """Whether an earlier start of the run has written this finding into `events.jsonl`."""
        return any(
            event.get("challenge") == finding.detector and event["step"] == finding.step
            for event in self._recorded_events()
        )

    def _recorded_events(self) -> list[dict[str, Any]]:
        """The rows of `events.jsonl`, on rank 0; empty elsewhere, and if there are none."""
        if self.events is None:
            return []
        try:
            return read_rows(self.events).rows
        except OSError:
            return []

    def _append_event(self, finding: Finding) -> None:
        """Append a finding to `events.jsonl`. Raises StorageError if that fails."""
        if self.events is not None:
            event = {"event": "challenge", "time": time.time(), "challenge": finding.detector, **finding.record()}
            try:
                with self.events.open("a", encoding="utf-8") as file:
                    file.write(json_text(event) + "\n")
            except OSError as error:
                raise StorageError(f"{self.events}: cannot be written ({error}); free space") from error

    def record_early_stopping(self, progress: Progress, reason: str) -> None:
        """Record that early stopping ends the run, for this `reason`; the loop prints it. Raises StorageError if that fails."""
        message = reason.removeprefix("stopping early: ")
        numbers = {"best_step": float(progress.best_step or 0)}
        finding = Finding(
            detector=EARLY_STOPPING,
            step=progress.step,
            message=message,
            numbers=numbers,
            remedies=EARLY_STOPPING_REMEDIES,
        )
        is_new = EARLY_STOPPING not in self.record
        self.record[EARLY_STOPPING] = finding.record()
        if is_new and not self._is_in_events(finding):
            self._append_event(finding)
        self.on_record(self.record)

    # -- what is done ----------------------------------------------------------------------------------------------

    def early_stopping_text(self) -> str | None:
        """The line to print if the run is to end as by early stopping; else None."""
        if self.stopping_finding is None or self.stopping_finding.detector != "overfitting":
            return None
        return "stopping early: the run overfits (challenges.overfitting.action=stop)"

    def raise_if_finding_ends_run(self) -> None:
        """Raise LimitExceeded, on all ranks alike, if a finding ends the run with an error. Its state is saved by now."""
        finding = self.stopping_finding
        if finding is not None and not self.early_stopping_text():
            raise LimitExceeded(
                f"step {finding.step}: {finding.detector}: {finding.message}. A checkpoint of this step is there; the same "
                f"command with challenges.{finding.detector}.action=note continues. Try: {'; '.join(finding.remedies)}"
            )


def _paired_metrics(values: dict[str, float]) -> dict[str, float]:
    """The metrics that are compared by micro-batch."""
    return {name: values[name] for name in (divergence.LOSS, divergence.MARGIN) if name in values}
