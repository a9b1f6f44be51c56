"""Runs the detectors of a run after each evaluation, and reports their findings. The same on all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from strategies.base import Engine, Progress
from strategies.errors import LimitExceeded
from trainer.evaluation.generation import AnswerWithReference
from trainer.evaluation.task_evaluator import FinishedTask
from trainer.evaluation.tasks.base import TaskRow
from trainer.evaluation.tasks.written import GenerationTask
from trainer.monitors import degenerate_answers, divergence, forgetting, instability, overfitting, rewards
from trainer.monitors.base import Evidence, Finding, ModelAnswer
from trainer.monitors.base_model_rows import BaseModelResults
from trainer.monitors.config import CHAT_ANSWERS_TASK, ChallengesConfig, Reaction
from trainer.monitors.finding_events import append_event, findings_of_earlier_starts, is_in_events
from trainer.monitors.first_evaluation import HeldOutEvaluation, HeldOutFile
from trainer.monitors.first_rows import FirstRows
from trainer.monitors.kept_answers import GENERATED, KeptAnswer, KeptAnswers

DETECTORS: dict[str, Any] = {"overfitting": overfitting, "forgetting": forgetting, "output": degenerate_answers}
"""What looks at an evaluation, by the name of its settings."""
EARLY_STOPPING = "early_stopping"
"""Name of the finding that patience (`evaluation.patience`) has ended the run."""
EARLY_STOPPING_REMEDIES = ("more and other data", "a lower optim.lr", "tuning=lora with a lower tuning.rank")


class ChallengeDetectors:
    """Runs all detectors on the evaluations and training losses of a run. Nothing here communicates but `prepare_detectors`."""

    def __init__(
        self,
        config: ChallengesConfig,
        planned_evaluations: int,
        judged_loss_term: str,
        print_line: Callable[[str], None] = lambda text: None,
        events_file: Path | None = None,
    ) -> None:
        """`planned_evaluations`: of the whole run. `judged_loss_term`: the loss of a row that is measured as the held-out one is.

        `events_file`: `events.jsonl`, which findings are appended to, on rank 0; None elsewhere.
        """
        self.config = config
        self.planned_evaluations = planned_evaluations
        self.planned_task_evaluations = planned_evaluations
        """Evaluations of the whole run that ask tasks; fewer if those on the way compute the held-out loss alone."""
        self.judged_loss_term = judged_loss_term
        self.print_line = print_line
        self.events_file = events_file
        self.base_results: BaseModelResults | None = None
        self.findings_by_detector: dict[str, Any] = {}
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
        self.evaluation_before_training = HeldOutEvaluation()
        self.metrics_of_control_rewards: list[str] | None = None
        """Metrics of rewards of weight 0; None: the run does not learn from rewards, but from a loss that can be compared."""
        self.loss_window = divergence.MIN_WINDOW
        """How many last steps the training loss now is the median of."""
        self.first_judged_step = divergence.MIN_FIRST_JUDGED_STEP
        """The first step at which divergence is judged."""
        self.write_findings: Callable[[dict[str, Any]], None] = lambda record: None
        """Called with the record after each evaluation, on all ranks."""
        self._reported_verdicts: set[str] = set()
        """Verdicts on divergence and rewards that were reported, each of which is reported once."""
        self._batch_sums_by_metric: dict[str, list[float]] = {}
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
        return self.metrics_of_control_rewards is not None

    # -- what is seen ----------------------------------------------------------------------------------------------

    def prepare_detectors(self, engine: Engine, progress: Progress) -> None:
        """Get what later evaluations are compared with, once before the first step of a start. All ranks must call.

        A resumed run reads the rows of its first evaluation and the held-out metrics from before training. If forgetting is
        measured, the base model's answers are read or asked for. Raises Interrupted on all ranks or none.
        """
        self.first_rows.load_rows_of_earlier_start(progress.step)
        is_resumed = progress.step > 0
        if is_resumed and self.first_evaluation_file is not None:
            self.evaluation_before_training = self.first_evaluation_file.read()
        if self.base_results is not None:  # None: forgetting is not measured
            self.base_results.read_or_measure_base(engine, progress.step)

    def restore_findings(self, progress: Progress) -> None:
        """Take over what earlier starts found, up to the step of the checkpoint that the run resumes from. All ranks must call.

        Divergence and overfitting are judged again at that step: the run ends again if it had ended for them there.
        """
        for detector, finding_record in findings_of_earlier_starts(self.events_file, progress.step):
            self.findings_by_detector.setdefault(detector, finding_record)
            self._reported_verdicts.add(str(finding_record.get("verdict", "")))
        self._judge_kept_evaluation_again(progress)
        if not self.learns_from_rewards:  # overfitting is judged by losses
            self._restore_stop_by_overfitting(progress)

    def _restore_stop_by_overfitting(self, progress: Progress) -> None:
        """Set `stopping_finding` if the run was evaluated at this step and overfits, and is to stop for that."""
        config = self.config.overfitting
        evaluations = progress.evaluations
        is_at_evaluation = bool(evaluations) and evaluations[-1]["step"] == progress.step
        if config.action is not Reaction.stop or not is_at_evaluation:
            return
        evidence = Evidence(
            step=progress.step,
            metrics={},
            planned_evaluations=self.planned_evaluations,
            history=progress.evaluations,
        )
        finding = overfitting.find_problem(config, evidence)
        if finding is not None:
            self.stopping_finding = finding
            self.findings_by_detector[finding.detector] = finding.record()

    def _judge_kept_evaluation_again(self, progress: Progress) -> None:
        """Judge divergence once more at the step that a run resumes from, if its directory keeps the evaluation of this step.

        Needed since `events.jsonl` tells that the run was worse at an earlier step, but not whether it has recovered by now.
        """
        if self.last_evaluation_file is None:
            return
        last_evaluation = self.last_evaluation_file.read()
        if self.first_evaluation_file is not None:  # what it is compared with; `prepare_detectors` comes later
            self.evaluation_before_training = self.first_evaluation_file.read()
        is_of_this_step = last_evaluation.step == progress.step and bool(last_evaluation.values)
        if is_of_this_step and not self.learns_from_rewards:
            self._batch_sums_by_metric = last_evaluation.batches
            self._judge_divergence(progress, held_out_metrics=last_evaluation.values)

    def add_step_metrics(self, progress: Progress, metrics_of_steps: Iterable[dict[str, Any]]) -> None:
        """Add the losses of a logging interval's steps to `progress`, or their rewards if the run learns from rewards.

        `metrics_of_steps`: by name, such as {"step": 40, "loss": 1.7, ...}, one for each step.
        """
        if self.metrics_of_control_rewards is not None:  # the run learns from rewards
            self._add_rewards(progress, metrics_of_steps, self.metrics_of_control_rewards)
        else:
            self._add_losses(progress, metrics_of_steps)

    def _add_losses(self, progress: Progress, metrics_of_steps: Iterable[dict[str, Any]]) -> None:
        """Add the losses of steps to `progress`; a run without any evaluation is judged by them: it may have diverged.

        The loss of a step is `judged_loss_term`, the part that is measured as the held-out loss is; else the whole loss.
        """
        new_losses: list[dict[str, float]] = []
        for step_metrics in metrics_of_steps:
            loss = step_metrics.get(self.judged_loss_term, step_metrics["loss"])
            if math.isfinite(loss):
                progress.interval_loss += loss
                progress.interval_steps += 1
                new_losses.append({"loss": loss})
                if step_metrics["step"] == 1:  # taken before any update: later losses are compared with it
                    progress.first_loss = loss
        all_losses = [*progress.recent_losses, *new_losses]
        progress.recent_losses = all_losses[-divergence.MAX_WINDOW :]
        has_held_out_loss = bool(self.evaluation_before_training.values) or bool(progress.evaluations)
        if not has_held_out_loss:
            self._judge_divergence(progress, held_out_metrics={})

    def _add_rewards(
        self, progress: Progress, metrics_of_steps: Iterable[dict[str, Any]], control_metrics: list[str]
    ) -> None:
        """Add the rewards of steps to `progress` in place of losses, and judge the run at each full block of steps.

        `progress.interval_loss` then sums rewards, since the loss of a policy says nothing. `control_metrics`: metrics of
        the controls, rewards of weight 0 that are measured and not trained, such as ["rewards/ended/mean"].
        """
        for step_metrics in metrics_of_steps:
            # Several steps of a round learn from the same answers, whose reward counts once: with the first step, numbered 0.
            is_later_step_of_round = bool(step_metrics.get(rewards.ROUND_STEP_METRIC))
            if rewards.REWARD not in step_metrics or is_later_step_of_round:
                continue
            progress.interval_loss += step_metrics[rewards.REWARD]
            progress.interval_steps += 1
            block_is_full = rewards.add_step_to_blocks(progress.reward_blocks, step_metrics, control_metrics)
            if block_is_full:
                self._judge_rewards(progress, int(step_metrics["step"]))

    def _judge_rewards(self, progress: Progress, step: int) -> None:
        """Report each problem of a run that learns from rewards once: cheated, collapsed, longer or idle (see rewards.py).

        With challenges.rewards.action=stop, one sets `stopping_finding`. With off, and in a run without rewards, none is found.
        """
        if self.metrics_of_control_rewards is None or self.config.rewards.action is Reaction.off:
            return
        findings = rewards.find_problems(
            self.config.rewards,
            step,
            progress.reward_blocks,
            progress.evaluations,
            self.metrics_of_control_rewards,
        )
        for finding in findings:
            is_first_report = finding.verdict not in self._reported_verdicts
            self._reported_verdicts.add(finding.verdict)
            if is_first_report:
                self._record_and_print_finding(finding, is_repeat=False)
            elif finding.ends_run and self.stopping_finding is None:
                # An earlier start reported it, as rank 0 alone knows: the run ends again, on all ranks.
                self.stopping_finding = finding

    def add_batch_sums(self, batch_sums: dict[str, list[float]]) -> None:
        """Keep the sums of each metric over each micro-batch of the evaluation documents, until the evaluation is judged."""
        self._batch_sums_by_metric = batch_sums

    def record_finished_task(self, finished_task: FinishedTask) -> None:
        """Take over the result of a task that an evaluation has finished, for the detectors, which run when all tasks are done.

        - A task whose answers are generated: the answers are kept.
        - `CHAT_ANSWERS_TASK`, two questions for people to read, too few to measure forgetting: sets `chat_rows`.
        - A task that the base model was asked too: compares its main metric with the base's, to measure forgetting.
        """
        task = finished_task.prepared.task
        if isinstance(task, GenerationTask):
            answers = [KeptAnswer(row.prompt, row.answer, row.reference) for row in finished_task.rows]
            self.add_answers(task.name, answers)
        if task.name == CHAT_ANSWERS_TASK:
            self.chat_rows = finished_task.rows
            return
        base_task_by_name = None if self.base_results is None else self.base_results.tasks
        if base_task_by_name is None or task.name not in base_task_by_name:
            return
        base_task = base_task_by_name[task.name]
        main_metric = task.metrics[0]  # a task names first the metric that stands for it
        values = forgetting.BaseAndTunedValue(base=base_task.value, tuned=finished_task.metrics[main_metric.name])
        self._compared_tasks.append(
            forgetting.compare_with_base(task.name, main_metric, base_task.rows, finished_task.rows, values)
        )

    def refresh_chat_rows(self, engine: Engine) -> None:
        """Let the weights in `engine` answer the two questions that are shown. All ranks must call. Raises Interrupted."""
        if self.base_results is None or CHAT_ANSWERS_TASK not in self.base_results.names:
            return
        self.base_results.evaluator.model.engine = engine
        for finished_task in self.base_results.evaluator.run_tasks([CHAT_ANSWERS_TASK]):
            self.chat_rows = finished_task.rows

    def chat_answer_pairs(self) -> list[dict[str, str]]:
        """Two questions with the answers of both models: [{"question", "base", "tuned"}, ...]; [] if one was not asked."""
        base_task_by_name = None if self.base_results is None else self.base_results.tasks
        if base_task_by_name is None or CHAT_ANSWERS_TASK not in base_task_by_name:
            return []
        pairs = []
        # The tuned model may not have been asked: then there are no rows of it.
        for base_row, tuned_row in zip(base_task_by_name[CHAT_ANSWERS_TASK].rows, self.chat_rows, strict=False):
            pairs.append({"question": tuned_row.question, "base": base_row.answer, "tuned": tuned_row.answer})
        return pairs

    def add_answers(self, task: str, answers: Sequence[KeptAnswer]) -> None:
        """Keep the answers that were generated for a task until the evaluation is judged; the first go into `answers.json`."""
        for answer in answers:
            self._answers.append(ModelAnswer(text=answer.answer, reference=answer.reference))
        self.kept_answers.add(task, answers)

    def add_generated_answers(self, answers: Sequence[AnswerWithReference]) -> None:
        """Keep the answers to the run's own evaluation documents, as `add_answers` does those of a task."""
        kept_answers = [KeptAnswer(answer.prompt, answer.answer, answer.reference) for answer in answers]
        self.add_answers(GENERATED, kept_answers)

    def follow_renamed_run_dir(self, run_dir: Path) -> None:
        """Write further files into the run's directory under its new name."""
        if self.events_file is not None:
            self.events_file = run_dir / self.events_file.name
        for kept in (self.first_rows, self.kept_answers, self.first_evaluation_file, self.last_evaluation_file):
            if kept is not None and kept.path is not None:
                kept.path = run_dir / kept.path.name

    # -- what is found ---------------------------------------------------------------------------------------------

    def run_detectors(self, progress: Progress, values: dict[str, float]) -> dict[str, float]:
        """Look for trouble in an evaluation that has finished: overfitting, forgetting, odd answers, bad rewards, divergence.

        Findings are recorded, printed and written to `events.jsonl`. `values`: the metrics of the evaluation by name, such
        as {"eval/loss": 2.1}. Returns metrics that the detectors add to them, such as {"forgetting": 0.02}.
        """
        held_out_value = values.get("eval/reward" if self.learns_from_rewards else "eval/loss")
        overfitting.add_to_history(progress, held_out_value)
        self.kept_answers.write_pending_answers(progress.step)
        detector_metrics = self._run_detectors_of_evaluation(self._take_evidence(progress, values))
        if self.learns_from_rewards:
            self._judge_rewards(progress, progress.step)
        elif progress.step == 0:
            self._write_first_evaluation(values)
        else:
            self._write_last_evaluation(progress.step, values)
            self._judge_divergence(progress, held_out_metrics=values)
        self.write_findings(self.findings_by_detector)
        return detector_metrics

    def _take_evidence(self, progress: Progress, values: dict[str, float]) -> Evidence:
        """What the detectors judge an evaluation by: its metrics, and answers and tasks since the last one, which it empties."""
        evidence = Evidence(
            step=progress.step,
            metrics=values,
            planned_evaluations=self.planned_evaluations,
            history=progress.evaluations,
            answers=self._answers,
            compared_tasks=self._compared_tasks,
            planned_task_evaluations=self.planned_task_evaluations,
        )
        self._answers = []
        self._compared_tasks = []
        return evidence

    def _run_detectors_of_evaluation(self, evidence: Evidence) -> dict[str, float]:
        """Let each detector that is on judge an evaluation; record what it found or measured, and return the metrics of all."""
        detector_metrics: dict[str, float] = {}
        for name, detector in DETECTORS.items():
            config = getattr(self.config, name)  # the settings are named as the detectors
            has_no_loss = detector is overfitting and self.learns_from_rewards
            if config.action is Reaction.off or has_no_loss:
                continue
            metrics = detector.logged_metrics(evidence)
            detector_metrics |= metrics
            was_found = bool(self.findings_by_detector.get(name, {}).get("found"))
            if metrics and not was_found:
                self.findings_by_detector[name] = {"found": False, "step": evidence.step, **metrics}
            finding = detector.find_problem(config, evidence)
            if finding is not None:
                self._record_and_print_finding(finding, is_repeat=was_found)
        return detector_metrics

    def _write_first_evaluation(self, values: dict[str, float]) -> None:
        """Keep the evaluation before the first step. Raises StorageError if that fails."""
        self.evaluation_before_training = HeldOutEvaluation(_paired_metrics(values), self._batch_sums_by_metric)
        if self.first_evaluation_file is not None:
            self.first_evaluation_file.write(self.evaluation_before_training)

    def _write_last_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Keep the evaluation after `step` in place of the one before it. Raises StorageError if that fails."""
        if self.last_evaluation_file is not None and self._batch_sums_by_metric:
            self.last_evaluation_file.write(
                HeldOutEvaluation(_paired_metrics(values), self._batch_sums_by_metric, step)
            )

    def _judge_divergence(self, progress: Progress, held_out_metrics: dict[str, float]) -> None:
        """Compare training and held-out loss with those at the run's beginning, and record whether the run is worse now.

        `held_out_metrics`: of the evaluation at this step; empty if there is none. Nothing is done if divergence is off, or
        if it is too early to judge.
        """
        if self.config.divergence.action is Reaction.off or progress.step < self.first_judged_step:
            return
        losses = [row["loss"] for row in progress.recent_losses]
        training = divergence.training_change(progress.first_loss, losses, self.loss_window)
        held_out = self._held_out_change(progress, held_out_metrics)
        finding = divergence.divergence_finding(self.config.divergence, progress.step, training, held_out)

        if finding is None:
            self._record_no_divergence(progress.step)
        else:
            self._record_divergence(finding)

    def _record_divergence(self, finding: Finding) -> None:
        """Record that the run is worse now than at its beginning, and since which step; print each verdict the first time only.

        The verdicts are `diverged` and `worse than before training`. Sets `stopping_finding` if the finding ends the run.
        """
        first_step = finding.step
        earlier_record = self.findings_by_detector.get(divergence.DETECTOR_NAME, {})
        if earlier_record.get("found"):
            # A record that was read from an event has no `first_step`.
            first_step = earlier_record.get("first_step", earlier_record["step"])
        if finding.verdict in self._reported_verdicts:  # reported already: only the numbers are new
            self.findings_by_detector[divergence.DETECTOR_NAME] = finding.record()
            if finding.ends_run and self.stopping_finding is None:
                self.stopping_finding = finding
        else:
            self._reported_verdicts.add(finding.verdict)
            self._record_and_print_finding(finding, is_repeat=False)
        self.findings_by_detector[divergence.DETECTOR_NAME]["first_step"] = first_step

    def _record_no_divergence(self, step: int) -> None:
        """Record that the run is not worse than at its beginning; it has recovered if an earlier step found that it was."""
        earlier_record = self.findings_by_detector.get(divergence.DETECTOR_NAME, {})
        if earlier_record.get("found"):
            self.findings_by_detector[divergence.DETECTOR_NAME] = {
                **earlier_record,
                "found": False,
                "recovered_at": step,
            }
        elif not earlier_record:
            self.findings_by_detector[divergence.DETECTOR_NAME] = {"found": False, "step": step}

    def _held_out_change(self, progress: Progress, values: dict[str, float]) -> divergence.HeldOutChange | None:
        """How much worse the held-out data is predicted than before the first step; None if it was not evaluated then or now.

        By the margin of preference objectives, else by the loss. `values`: metrics of the evaluation at this step; empty if
        there is none. If both evaluations had the same micro-batches, a paired test over them says how sure the change is.
        """
        before = dict(self.evaluation_before_training.values)
        if not before and progress.evaluations and progress.evaluations[0]["step"] == 0:
            before[divergence.LOSS] = progress.evaluations[0]["held_out"]  # a run that kept no micro-batches
        for metric in (divergence.MARGIN_METRIC, divergence.LOSS):
            if metric in before and metric in values:
                pairs = self.evaluation_before_training.paired_batch_sums(metric, self._batch_sums_by_metric)
                # Bonferroni: false alarms stay rare over the whole run.
                significance_level = divergence.LEVEL / max(1, self.planned_evaluations)
                return divergence.held_out_change(metric, before[metric], values[metric], pairs, significance_level)
        return None

    def record_findings_of_whole_run(self, progress: Progress) -> None:
        """When training is over: report what only the whole run shows, and say from what it has recovered.

        That is instability, rewards that taught nothing, and the divergence of a run without evaluations.
        """
        no_signal_finding = rewards.find_no_signal(self.config.rewards, progress.step, progress.reward_blocks)
        for finding in (instability.find_instability(progress), no_signal_finding):
            if finding is not None:
                self._record_and_print_finding(finding, is_repeat=False)
        if not progress.evaluations and not self.learns_from_rewards:
            self._judge_divergence(progress, held_out_metrics={})
        recovered_at = self.findings_by_detector.get(divergence.DETECTOR_NAME, {}).get("recovered_at")
        if recovered_at is not None:
            verdict = self.findings_by_detector[divergence.DETECTOR_NAME].get("verdict")
            self.print_line(f"recovered by step {recovered_at}: the run is no longer {verdict}")
        self.write_findings(self.findings_by_detector)

    def _record_and_print_finding(self, finding: Finding, *, is_repeat: bool) -> None:
        """Record a finding for `run.json`, tell the user if it is new, and let it end the run if it is one that does.

        `is_repeat`: the detector has reported before, so that only its newest numbers are recorded. A new finding is printed,
        and appended to `events.jsonl` unless it is there: a run killed after writing it, and resumed, finds it once more.
        """
        if finding.ends_run and self.stopping_finding is None:
            self.stopping_finding = finding
        if is_repeat:
            newest = {"step": finding.step, "says": finding.message, **finding.numbers}
            self.findings_by_detector[finding.detector]["last"] = newest
            return
        self.findings_by_detector[finding.detector] = finding.record()
        self.print_line(
            f"warning: {finding.detector} at step {finding.step}: {finding.message}. Try: {'; '.join(finding.remedies)}"
        )
        if not is_in_events(self.events_file, finding):
            append_event(self.events_file, finding)

    def record_early_stopping(self, progress: Progress, reason: str) -> None:
        """Record that early stopping (`evaluation.patience`) ends the run, in `run.json` and once in `events.jsonl`.

        `reason`: the line that the loop prints, "stopping early: eval/loss has not improved ...". Raises StorageError.
        """
        message = reason.removeprefix("stopping early: ")
        numbers = {"best_step": float(progress.best_step or 0)}
        finding = Finding(
            detector=EARLY_STOPPING,
            step=progress.step,
            message=message,
            numbers=numbers,
            remedies=EARLY_STOPPING_REMEDIES,
        )
        is_first_of_this_start = EARLY_STOPPING not in self.findings_by_detector
        self.findings_by_detector[EARLY_STOPPING] = finding.record()
        if is_first_of_this_start and not is_in_events(self.events_file, finding):
            append_event(self.events_file, finding)
        self.write_findings(self.findings_by_detector)

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
    return {name: values[name] for name in (divergence.LOSS, divergence.MARGIN_METRIC) if name in values}
