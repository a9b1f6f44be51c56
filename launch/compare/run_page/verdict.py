"""The verdict on a run in one sentence, and call-outs about what a reader should know, each with a command."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Any

from launch.compare.curves import first_non_finite_loss_step
from launch.compare.exported_step import earlier_export_text
from launch.compare.metric_meaning import monitored_metric
from launch.compare.run_files import RecordedRun
from launch.compare.run_page.held_out import (
    MetricChange,
    best_step,
    metric_changes,
    metric_title,
    monitored_change,
    monitored_metric_is_lost,
)
from trainer.data.report.audit import AUDIT, DOCUMENT_LEAK_KINDS
from trainer.monitors.config import Reaction
from trainer.monitors.guard_config import Action
from trainer.monitors.rewards import NO_SIGNAL
from trainer.pages.numbers import format_number
from trainer.pages.pieces import Callout, Tone, worst_first
from trainer.reporting.findings import MAX_SHOWN_REMEDIES, RecordedFinding, findings_in
from trainer.reporting.status import RunState, read_json_or_empty

HEADING_BY_FINDING = {
    "diverged": "The run diverged",
    "worse than before training": "The model is worse than before training",
    "overfitting": "The run overfits",
    "forgetting": "The model forgets what it knew",
    "instability": "Training was unstable",
    "output": "Answers are degenerate",
    NO_SIGNAL: "Nothing could be learned from the rewards",
}
"""What the findings are called on the page; any other has its own name."""
BAD_FINDINGS = {"diverged", "worse than before training"}
"""Findings after which the last weights are of no use. The others are warnings."""
EARLY_STOPPING = "early_stopping"
"""Finding of a run that patience ended. It has a call-out about the run's course, and none among the findings."""
SETTING_WITH_VALUE_REGEX = re.compile(r"[a-z_]+(\.[a-z_]+)*=[\w.]+(?=$|[ ,;])")
"""How a remedy begins that is a setting with its value, such as `evaluation.patience=3 (stop at the best)`."""
DETECTOR_EVENT = "challenge"
"""The value of `event` in `events.jsonl` for a detector's finding; events of guards have another one."""
LOWER_LEARNING_RATE_REMEDY = "a lower optim.lr"
"""How a remedy begins that is a lower learning rate."""
LOWER_LEARNING_RATE_FACTOR = 0.1
"""The learning rate that is proposed after a divergence, as a share of the run's own."""


@dataclass(frozen=True, slots=True)
class RunVerdict:
    """What came of a run, as the head of its page shows it: `heading` in the colour of `tone`, a text, and commands to copy."""

    tone: Tone
    heading: str
    text: str
    commands: tuple[str, ...] = ()


def run_verdict(run: RecordedRun) -> RunVerdict:
    """Judge a run for the head of its page: did it finish, and is the model better than before? The first case that applies:

    - The run is not done: where it stands, and how it continues.
    - A detector found that the last weights are of no use (`BAD_FINDINGS`).
    - The training loss was NaN or infinite at a step.
    - The monitored metric (`evaluation.watch`) is NaN or infinite at the end.
    - Nothing held out was evaluated.
    - Otherwise: whether the monitored metric got better during training.
    """
    if run.state != RunState.done:
        return _unfinished_verdict(run)
    steps_text = _training_length_text(run)
    bad_finding = _finding_as_verdict(run)
    if bad_finding is not None:
        # An observation is a clause in lower case; here it begins a sentence.
        description = f"{bad_finding.observation[:1].upper()}{bad_finding.observation[1:]}"
        text = f"{description}. {steps_text}.{_remedies_text(bad_finding)}"
        heading = HEADING_BY_FINDING[bad_finding.name]
        return RunVerdict("bad", heading, text, commands=_remedy_commands(run, bad_finding))
    non_finite_step = first_non_finite_loss_step(run)
    if non_finite_step is not None:
        heading = f"The loss is not a number from step {non_finite_step} on"
        return RunVerdict("bad", heading, f"{steps_text}.", commands=(_lower_learning_rate_command(run),))
    if monitored_metric_is_lost(run):
        heading = f"{metric_title(monitored_metric(run))} is not a number at the end"
        commands = _export_best_commands(run) or (_lower_learning_rate_command(run),)
        return RunVerdict("bad", heading, f"{steps_text}.", commands=commands)

    changes = metric_changes(run)  # of the held-out metrics, from before training to the end
    if not changes:
        text = f"{steps_text}. Nothing held out was evaluated, so nobody knows whether the model got better on new documents."
        return RunVerdict("note", "Trained, not evaluated", text)
    export_text = earlier_export_text(run)
    if export_text:
        steps_text += f". It exports {export_text}"
    # The monitored metric is the first one, if the last evaluation has it.
    return _metric_verdict(run, changes[0], findings_in(run.record.challenges), steps_text)


def _finding_as_verdict(run: RecordedRun) -> RecordedFinding | None:
    """The finding of a detector that is the verdict on a run: the last weights are of no use. None if the verdict is another.

    Detectors look for trouble while a run trains; their findings are the `challenges` of `run.json`.
    """
    if run.state != RunState.done:
        return None
    return next((finding for finding in findings_in(run.record.challenges) if finding.name in BAD_FINDINGS), None)


def _metric_verdict(
    run: RecordedRun, change: MetricChange, findings: list[RecordedFinding], steps_text: str
) -> RunVerdict:
    """Judge a finished run by how a held-out metric changed from before training to the end. The first case that applies:

    - The metric was not evaluated before training, or nobody knows which is better: its value, without a verdict.
    - It got worse: bad, with the command that exports the best checkpoint, if that is better.
    - It got better, but detectors found something: a warning that names the `findings`.
    - It got better: good.
    - It did not change: a warning.

    `change`: its `change_text` is like `2.872 to 2.336 (-18.7%)`. `steps_text`: how far the run came, such as `Trained 40
    steps`.
    """
    heading = f"{change.title}: {change.change_text}"
    if change.value_before is None:
        return RunVerdict("note", heading, f"{steps_text}. It was not evaluated before the first step.")
    if not change.judgement:
        text = f"{steps_text}. Its name does not say whether a larger value is better, so this page gives no verdict."
        return RunVerdict("note", heading, text)
    text = f"{change.title} went from {change.change_text}. {steps_text}."
    if change.judgement == "worse":
        return RunVerdict("bad", f"{change.title} got worse", text, commands=_export_best_commands(run))
    if change.judgement == "better" and findings:
        names = ", ".join(finding.name.replace("_", " ") for finding in findings)
        return RunVerdict("warning", f"Better, but: {names}", text, commands=_export_best_commands(run))
    if change.judgement == "better":
        return RunVerdict("good", f"{change.title} got better", text)
    return RunVerdict("warning", f"{change.title} did not change", text)


def _unfinished_verdict(run: RecordedRun) -> RunVerdict:
    """The verdict on a run that is running, stopped, failed or not started: its step, why it ended, and how it continues."""
    logs_command = f"shardtune logs {shlex.quote(str(run.directory))}"
    last_step = max(run.steps, default=0)
    step = run.status.get("step") or last_step
    if run.state == RunState.running:
        # The status of a resumed run may still have the step of its checkpoint.
        step = max(step, last_step)
    total_steps = run.record.total_steps
    progress = f"step {step} of {total_steps}" if total_steps else f"step {step}"
    # On one line, since a message may have several.
    reason = " ".join(str(run.status.get("reason") or run.failure.get("message") or "").split())
    if run.state == RunState.running:
        return RunVerdict("note", f"Running: {progress}", text="", commands=(logs_command,))
    if run.state == RunState.preempted:
        advice = "The same command goes on from its last checkpoint."
        return RunVerdict("warning", f"Stopped at {progress}", f"{reason}. {advice}" if reason else advice)
    if run.state == RunState.failed:
        return RunVerdict("bad", f"Failed at {progress}", reason, commands=(logs_command,))
    return RunVerdict("note", run.state.capitalize(), reason)  # such as `Not started`


def _training_length_text(run: RecordedRun) -> str:
    """How far a run came, such as `Trained 40 steps, 12,345 tokens`; without the tokens if no step recorded them."""
    last_step = max(run.steps, default=0)
    num_tokens = run.steps[last_step].get("tokens") if last_step else None
    text = "Trained 1 step" if last_step == 1 else f"Trained {last_step:,} steps"
    return f"{text}, {num_tokens:,} tokens" if num_tokens else text


def run_callouts(run: RecordedRun) -> list[Callout]:
    """What a reader of a run's page should know beside the verdict, the worst first, such as leaks of data or slow ranks."""
    return worst_first(
        [
            *_finding_callouts(run),
            *_leak_callouts(run),
            *_straggler_callouts(run),
            *_export_callouts(run),
            *_best_step_callouts(run),
            *_resumed_callouts(run),
            *_stopped_early_callouts(run),
            *_outlier_callouts(run),
            *_unreadable_line_callouts(run),
        ]
    )


def _finding_callouts(run: RecordedRun) -> list[Callout]:
    """Tell the reader what detectors found while the run trained, such as overfitting: a call-out for each finding.

    Left out are the finding that is the verdict already, and early stopping, which has a call-out of its own.
    """
    verdict_finding = _finding_as_verdict(run)
    callouts = []
    for finding in findings_in(run.record.challenges):
        is_verdict = verdict_finding is not None and finding.name == verdict_finding.name
        if is_verdict or finding.name == EARLY_STOPPING:
            continue
        heading = HEADING_BY_FINDING.get(finding.name, finding.name.capitalize())
        tone: Tone = "bad" if finding.name in BAD_FINDINGS else "warning"
        text = f"Since step {finding.step}: {finding.observation}.{_remedies_text(finding)}"
        callouts.append(Callout(tone, heading, text, commands=_remedy_commands(run, finding)))
    return callouts


def _remedies_text(finding: RecordedFinding) -> str:
    """The first remedies that a finding names, to be added to a text: ` Try: a lower optim.lr.`; empty if it names none."""
    if not finding.remedies:
        return ""
    return f" Try: {'; '.join(finding.remedies[:MAX_SHOWN_REMEDIES])}."


def _remedy_commands(run: RecordedRun, finding: RecordedFinding) -> tuple[str, ...]:
    """Commands that the reader can copy to act on what a detector found.

    - The run diverged: train again with a lower learning rate.
    - Any other finding: export the best checkpoint, if it is better than the last one.
    - Otherwise train again with the first remedy that is a lower learning rate or a setting; none if no remedy is.
    """
    if finding.name == "diverged":
        return (_lower_learning_rate_command(run),)
    export_commands = _export_best_commands(run)
    if export_commands:
        return export_commands
    # Remedies are sentences for people, such as `a lower optim.lr`, or settings: `evaluation.patience=3 (stop at the best)`.
    for remedy in finding.remedies:
        if remedy.startswith(LOWER_LEARNING_RATE_REMEDY):
            return (_lower_learning_rate_command(run),)
        setting = SETTING_WITH_VALUE_REGEX.match(remedy)
        if setting is not None:
            return (_train_again_command(run, setting[0], directory_suffix="again"),)
    return ()


def _lower_learning_rate_command(run: RecordedRun) -> str:
    """The command that trains the same with a tenth of the learning rate, or with 1e-5 if the rate is not known."""
    learning_rate = run.config.get("optim.lr")
    lower_rate = f"{LOWER_LEARNING_RATE_FACTOR * learning_rate:g}" if isinstance(learning_rate, int | float) else "1e-5"
    return _train_again_command(run, f"optim.lr={lower_rate}", directory_suffix="lower-rate")


def _train_again_command(run: RecordedRun, *overrides: str, directory_suffix: str) -> str:
    """The command that trains the same but for these overrides, in the directory `<run directory>-<directory_suffix>`."""
    directory = shlex.quote(str(run.directory))
    return f"shardtune train {directory}/config.yaml run.dir={directory}-{directory_suffix} {' '.join(overrides)}"


def _export_command(run: RecordedRun) -> str:
    return f"shardtune export {shlex.quote(str(run.directory))}"


def _has_exported_best(run: RecordedRun) -> bool:
    """Whether the run exported its best checkpoint at its end, as `run.json` says, and not its last one."""
    return (run.record.exported_checkpoint or {}).get("which") == "best"


def _export_best_commands(run: RecordedRun) -> tuple[str, ...]:
    """The command that exports the best checkpoint, as a tuple for a call-out; empty if that would gain nothing.

    That is so if the run exported it itself, if the last step is as good, or if no step is better than the model before
    training.
    """
    best = best_step(run)
    if best is None or best.is_last_step_as_good or not best.is_better_than_before_training or _has_exported_best(run):
        return ()
    return (f"{_export_command(run)} checkpoint=best",)


def _best_step_callouts(run: RecordedRun) -> list[Callout]:
    """Tell the reader which step had the best value of the monitored metric, if it was not the last. The first case that applies:

    - The best step is not known, or the last evaluation has no value: none.
    - No step was better than the model before training: that, with the command that trains with a lower learning rate, unless
      no step could learn anything.
    - The last step is as good as the best one: none.
    - Otherwise: which step it was, with the command that exports its weights unless the run did it.
    """
    best = best_step(run)
    monitored = monitored_change(run)
    if best is None or monitored is None:
        return []
    best_value = monitored.format_value(best.value)
    if not best.is_better_than_before_training:
        # None if nothing was evaluated before training.
        before = monitored.format_value(monitored.value_before) if monitored.value_before is not None else ""
        text = f"{monitored.title} was {before} before training, and {best_value} at best, at step {best.step}."
        heading = "No step is better than the model before training"
        # The rewards never differed, so no step could learn anything: another learning rate would not help.
        has_no_signal = any(finding.name == NO_SIGNAL for finding in findings_in(run.record.challenges))
        commands = () if has_no_signal else (_lower_learning_rate_command(run),)
        return [Callout("warning", heading, text, commands=commands)]
    if best.is_last_step_as_good:
        return []
    text = f"{monitored.title} was {best_value} there, and {monitored.format_value(monitored.value_after)} at the end."
    if _has_exported_best(run):
        text += " Its weights were exported."
    return [Callout("note", f"Step {best.step} was the best", text, commands=_export_best_commands(run))]


def _leak_callouts(run: RecordedRun) -> list[Callout]:
    """Warn of held-out documents that are also in the training data, for each split: its metrics are then too good.

    The audit of the prepared data has {"leakage": {"eval": {"policy": "note", "train": {"exact": 3, ...}}}}. Here `train`
    counts the training documents that the split `eval` holds too, by how alike they are.
    """
    audit = read_json_or_empty(run.directory / run.record.data_directory / AUDIT) if run.record.data_directory else {}
    retry_command = _train_again_command(run, "data.leakage.policy=drop_train", directory_suffix="clean")
    callouts = []
    for split, leaks in (audit.get("leakage") or {}).items():
        num_documents_by_kind = leaks.get("train") or {}
        num_documents = sum(num_documents_by_kind.get(kind) or 0 for kind in DOCUMENT_LEAK_KINDS)
        # Removed before training, so that nothing of these documents was learned.
        was_removed_from_training_data = leaks.get("policy") == "drop_train"
        if not num_documents or was_removed_from_training_data:
            continue
        text = f"{num_documents:,} training documents are in the held-out data ({split}) too. "
        text += "Its numbers are better than those on new documents would be."
        callouts.append(Callout("warning", "Training documents in the held-out data", text, commands=(retry_command,)))
    return callouts


def _straggler_callouts(run: RecordedRun) -> list[Callout]:
    """Warn of ranks that computed more slowly than the others, which had to wait for them; no call-out without any."""
    outcome = run.record.outcome
    if outcome is None or not outcome.slow_ranks:
        return []
    sentences = [_slow_rank_text(slow_rank) for slow_rank in outcome.slow_ranks]
    num_slow = len(sentences)
    heading = "A rank held the others up" if num_slow == 1 else f"{num_slow} ranks held the others up"
    return [Callout("warning", heading, f"{'. '.join(sentences)}.", commands=("shardtune doctor",))]


def _slow_rank_text(slow_rank: dict[str, Any]) -> str:
    """The sentence on a slow rank, such as `Rank 3 on node7 computes 1.8 times as long as the others, from step 40 to 90`.

    `slow_rank` is a record of `run.json`; without `until_step` the rank was slow up to the end.
    """
    until = f" to {slow_rank['until_step']}" if slow_rank.get("until_step") else " on"
    factor = format_number(slow_rank.get("factor"), digits=2)
    rank_and_host = f"Rank {slow_rank.get('rank')} on {slow_rank.get('host')}"
    return (
        f"{rank_and_host} computes {factor} times as long as the others, from step {slow_rank.get('from_step')}{until}"
    )


def _export_callouts(run: RecordedRun) -> list[Callout]:
    """Tell the reader if the export at the end of the run failed, or passed over a gate. The first case that applies:

    - `shardtune export` has exported the run since: none.
    - Nothing was exported, because files of the base model changed, the checkpoint is at fault, or a gate refused: the
      reason.
    - It was exported although a gate refused, because the user gave a reason to pass it over: both reasons.
    - Otherwise: none.
    """
    record = run.record
    if record.exports:
        return []
    # Gates are bounds such as `eval/loss<2` that must hold before an export; `says` is a sentence.
    gates_record = record.gates or {}
    refusals = [str(gate.get("says")) for gate in gates_record.get("gates") or [] if not gate.get("passed")]
    override_reason = gates_record.get("override")
    changed_base_files = record.not_exported
    why_not_exported = ""
    if changed_base_files:
        why_not_exported = (
            f"Files of the base model changed while the run trained: {', '.join(changed_base_files[:3])}."
        )
    elif record.export_problem:
        why_not_exported = f"{record.export_problem}."
    elif refusals and override_reason is None:
        why_not_exported = f"A gate is not passed: {'; '.join(refusals)}."
    if why_not_exported:
        return [Callout("bad", "Nothing was exported", why_not_exported, commands=(_export_command(run),))]
    if refusals:
        text = f"{'; '.join(refusals)}. The reason given: {override_reason}."
        return [Callout("warning", "Exported although a gate is not passed", text)]
    return []


def _resumed_callouts(run: RecordedRun) -> list[Callout]:
    """Tell the reader that the run was resumed: from which checkpoint, and which changed settings were accepted."""
    if not run.record.resumed_from:
        return []
    text = f"From {run.record.resumed_from}. Duration, speed and memory are those of all attempts where they were recorded."
    if run.record.accepted:
        text += f" Accepted differences: {'; '.join(run.record.accepted)}."
    status_command = f"shardtune status {shlex.quote(str(run.directory))}"
    return [Callout("note", "The run was resumed", text, commands=(status_command,))]


def _outlier_callouts(run: RecordedRun) -> list[Callout]:
    """Tell the reader that steps stood out, for example by a very large gradient.

    If they were only noted, a command shows how to skip such updates.
    Guards check the numbers of each step. `events.jsonl` also has findings of detectors, which have call-outs of their own.
    """
    outlier_events = [event for event in run.events if event.get("event") != DETECTOR_EVENT]
    if not outlier_events:
        return []
    heading = "1 step stood out" if len(outlier_events) == 1 else f"{len(outlier_events)} steps stood out"
    text = f"The last was step {outlier_events[-1]['step']}. What was done is told below."
    commands: tuple[str, ...] = ()
    were_only_noted = all(event.get("action") == Action.note for event in outlier_events)
    if were_only_noted:
        text += " To leave the updates of such steps out:"
        commands = (_train_again_command(run, "guards.loss=skip", "guards.grad_norm=skip", directory_suffix="guarded"),)
    return [Callout("note", heading, text, commands=commands)]


def _unreadable_line_callouts(run: RecordedRun) -> list[Callout]:
    """A call-out if lines of the run's metrics or events cannot be read."""
    if not run.unreadable_lines:
        return []
    text = f"{run.unreadable_lines} lines of metrics.jsonl or events.jsonl are no rows, and are left out here."
    return [Callout("warning", "Part of the run cannot be read", text)]


def _stopped_early_callouts(run: RecordedRun) -> list[Callout]:
    """Tell the reader that the run ended before its budget was spent, and why, with the command that trains longer.

    Either the monitored metric had not improved for `evaluation.patience` evaluations, or the detector of overfitting ended
    the run.
    """
    outcome = run.record.outcome
    if outcome is None or not outcome.stopped_early:
        return []
    patience = run.config.get("evaluation.patience")
    challenges = run.record.challenges or {}
    stops_when_overfitting = run.config.get("challenges.overfitting.action") == Reaction.stop
    # A run that patience ended has a finding of its own.
    was_stopped_for_overfitting = (
        stops_when_overfitting and "overfitting" in challenges and EARLY_STOPPING not in challenges
    )
    if was_stopped_for_overfitting:
        text = "It overfits, and challenges.overfitting.action=stop ends such a run."
        override = "challenges.overfitting.action=note"
    else:
        text = f"The watched metric had not improved for {patience} evaluations."
        override = f"evaluation.patience={2 * int(patience or 1)}"
    command = _train_again_command(run, override, directory_suffix="longer")
    return [Callout("note", "The run stopped early", f"{text} To wait longer:", commands=(command,))]
