"""The verdict on a run in one sentence, and call-outs about what a reader should know, each with a command."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from launch.compare.curves import first_non_finite_loss_step
from launch.compare.run_files import RecordedRun
from launch.compare.run_page.held_out import (
    MetricChange,
    best_step,
    metric_changes,
    monitored_change,
    monitored_metric,
    monitored_metric_is_lost,
    title_of,
)
from trainer.data.report.audit import AUDIT, DOCUMENT_LEAK_KINDS
from trainer.monitors.config import Reaction
from trainer.monitors.guard_config import Action
from trainer.pages.numbers import number
from trainer.pages.pieces import Callout, Tone, worst_first
from trainer.reporting.findings import SHOWN_REMEDIES, RecordedFinding, findings_in
from trainer.reporting.results import read_json
from trainer.reporting.status import State

HEADINGS = {
    "diverged": "The run diverged",
    "worse than before training": "The model is worse than before training",
    "overfitting": "The run overfits",
    "forgetting": "The model forgets what it knew",
    "instability": "Training was unstable",
    "output": "Answers are degenerate",
}
"""What the findings are called on the page; any other has its own name."""
BAD_FINDINGS = {"diverged", "worse than before training"}
"""Findings after which the last weights are of no use. The others are warnings."""
EARLY_STOPPING = "early_stopping"
"""Finding of a run that patience ended. It has a call-out about the run's course, and none among the findings."""
LOWER_RATE = 0.1
"""The learning rate that is proposed after a divergence, as a share of the run's own."""


@dataclass(frozen=True, slots=True)
class RunVerdict:
    """What came of a run."""

    tone: Tone
    heading: str
    text: str
    commands: tuple[str, ...] = ()


def verdict_on(run: RecordedRun) -> RunVerdict:
    """The verdict on a run, for the head of its page. The first case that applies:

    - The run is not done: where it stands, and how it continues.
    - A detector found that the last weights are of no use, or a training loss is NaN, or the monitored metric is at the end.
    - Nothing held out was evaluated.
    - Otherwise the monitored metric decides: see `_verdict_on_metric`.
    """
    if run.state != State.done:
        return _verdict_on_unfinished(run)
    findings = findings_in(run.record.challenges)
    steps_text = _steps_text(run)
    bad_finding = next((finding for finding in findings if finding.name in BAD_FINDINGS), None)
    if bad_finding is not None:
        description = f"{bad_finding.says[:1].upper()}{bad_finding.says[1:]}"
        text = f"{description}. {steps_text}.{_remedies_text(bad_finding)}"
        return RunVerdict("bad", HEADINGS[bad_finding.name], text, _commands_after(run, bad_finding))
    broken_step = first_non_finite_loss_step(run)
    if broken_step is not None:
        heading = f"The loss is not a number from step {broken_step} on"
        return RunVerdict("bad", heading, f"{steps_text}.", (_retry_with_lower_rate(run),))
    if monitored_metric_is_lost(run):
        heading = f"{title_of(monitored_metric(run))} is not a number at the end"
        return RunVerdict("bad", heading, f"{steps_text}.", _export_best(run) or (_retry_with_lower_rate(run),))

    changes = metric_changes(run)
    if not changes:
        text = f"{steps_text}. Nothing held out was evaluated, so nobody knows whether the model got better on new documents."
        return RunVerdict("note", "Trained, not evaluated", text)
    return _verdict_on_metric(run, changes[0], findings, steps_text)


def _verdict_on_metric(
    run: RecordedRun, metric: MetricChange, findings: list[RecordedFinding], steps_text: str
) -> RunVerdict:
    """The verdict on a finished run by a held-out metric before and after training.

    `findings` of the detectors, which are warnings here, turn "better" into "better, but". `steps_text`: how far the run came.
    """
    change = f"{metric.title} went from {metric.change}"
    if metric.before is None:
        heading = f"{metric.title}: {metric.change}"
        return RunVerdict("note", heading, f"{steps_text}. It was not evaluated before the first step.")
    if not metric.judgement:
        heading = f"{metric.title}: {metric.change}"
        text = f"{steps_text}. Its name does not say whether a larger value is better, so this page gives no verdict."
        return RunVerdict("note", heading, text)
    if metric.judgement == "worse":
        return RunVerdict("bad", f"{metric.title} got worse", f"{change}. {steps_text}.", _export_best(run))
    if metric.judgement == "better" and findings:
        names = ", ".join(finding.name.replace("_", " ") for finding in findings)
        return RunVerdict("warning", f"Better, but: {names}", f"{change}. {steps_text}.", _export_best(run))
    if metric.judgement == "better":
        return RunVerdict("good", f"{metric.title} got better", f"{change}. {steps_text}.")
    return RunVerdict("warning", f"{metric.title} did not change", f"{change}. {steps_text}.")


def _verdict_on_unfinished(run: RecordedRun) -> RunVerdict:
    """The verdict on a run that is running, stopped or failed: at which step it is, why it ended, and how it continues."""
    directory = shlex.quote(str(run.directory))
    total = run.record.total_steps
    step = run.status.get("step") or max(run.steps, default=0)
    progress = f"step {step} of {total}" if total else f"step {step}"
    reason = " ".join(str(run.status.get("reason") or run.failure.get("message") or "").split())
    if run.state == State.running:
        return RunVerdict("note", f"Running: {progress}", "", (f"shardtune logs {directory}",))
    if run.state == State.preempted:
        text = "The same command goes on from its last checkpoint."
        return RunVerdict("warning", f"Stopped at {progress}", f"{reason}. {text}" if reason else text)
    if run.state == State.failed:
        return RunVerdict("bad", f"Failed at {progress}", reason, (f"shardtune logs {directory}",))
    return RunVerdict("note", run.state.capitalize(), reason)


def _steps_text(run: RecordedRun) -> str:
    """How far a run came, such as `Trained 40 steps, 12,345 tokens`; the tokens only if they were recorded."""
    steps = max(run.steps, default=0)
    tokens = run.steps[steps].get("tokens") if steps else None
    text = "Trained 1 step" if steps == 1 else f"Trained {steps:,} steps"
    return f"{text}, {tokens:,} tokens" if tokens else text


def callouts(run: RecordedRun) -> list[Callout]:
    """What a reader should know beside the verdict, the worst first."""
    return worst_first(
        [
            *_finding_callouts(run),
            *_leak_callouts(run),
            *_straggler_callouts(run),
            *_gate_callouts(run),
            *_best_step_callouts(run),
            *_course_callouts(run),
        ]
    )


def _finding_callouts(run: RecordedRun) -> list[Callout]:
    """A call-out for each finding of the detectors, except the one that is the verdict."""
    verdict_heading = verdict_on(run).heading
    found = []
    for finding in findings_in(run.record.challenges):
        heading = HEADINGS.get(finding.name, finding.name.capitalize())
        if heading == verdict_heading or finding.name == EARLY_STOPPING:
            continue
        tone: Tone = "bad" if finding.name in BAD_FINDINGS else "warning"
        text = f"Since step {finding.step}: {finding.says}.{_remedies_text(finding)}"
        found.append(Callout(tone, heading, text, _commands_after(run, finding)))
    return found


def _remedies_text(finding: RecordedFinding) -> str:
    """The first remedies that a finding names, such as ` Try: a lower optim.lr.`; empty if it names none."""
    if not finding.remedies:
        return ""
    return f" Try: {'; '.join(finding.remedies[:SHOWN_REMEDIES])}."


def _commands_after(run: RecordedRun, finding: RecordedFinding) -> tuple[str, ...]:
    """Commands after a finding: retry with a lower rate if the run diverged, else export the best checkpoint if it helps."""
    if finding.name == "diverged":
        return (_retry_with_lower_rate(run),)
    return _export_best(run)


def _retry_with_lower_rate(run: RecordedRun) -> str:
    """The command that trains the same with a tenth of the learning rate, in a directory of its own."""
    rate = run.config.get("optim.lr")
    lower_rate = f"{LOWER_RATE * rate:g}" if isinstance(rate, int | float) else "1e-5"
    return _retry(run, "lower-rate", f"optim.lr={lower_rate}")


def _retry(run: RecordedRun, ending: str, *words: str) -> str:
    """The command that trains the same but for some settings, in a directory whose name has this ending."""
    directory = shlex.quote(str(run.directory))
    return f"shardtune train {directory}/config.yaml run.dir={directory}-{ending} {' '.join(words)}"


def _export(run: RecordedRun) -> str:
    return f"shardtune export {shlex.quote(str(run.directory))}"


def _exported_best(run: RecordedRun) -> bool:
    """Whether the run exported its best checkpoint by itself."""
    return (run.record.exported_checkpoint or {}).get("which") == "best"


def _export_best(run: RecordedRun) -> tuple[str, ...]:
    """The command that exports the best checkpoint; none if it was exported, or no step beats the model before training."""
    best = best_step(run)
    if best is None or best.last_is_as_good or not best.beats_beginning or _exported_best(run):
        return ()
    return (f"{_export(run)} checkpoint=best",)


def _best_step_callouts(run: RecordedRun) -> list[Callout]:
    """A call-out if an earlier step was better than the last one, or if no step was better than the model before training."""
    best = best_step(run)
    monitored = monitored_change(run)
    if best is None or monitored is None:
        return []
    if not best.beats_beginning:
        before = monitored.shown(monitored.before) if monitored.before is not None else ""
        text = f"{monitored.title} was {before} before training, and {monitored.shown(best.value)} at best, at step {best.step}."
        heading = "No step is better than the model before training"
        return [Callout("warning", heading, text, (_retry_with_lower_rate(run),))]
    if best.last_is_as_good:
        return []
    text = (
        f"{monitored.title} was {monitored.shown(best.value)} there, and {monitored.shown(monitored.after)} at the end."
    )
    if _exported_best(run):
        text += " Its weights were exported."
    return [Callout("note", f"Step {best.step} was the best", text, _export_best(run))]


def _leak_callouts(run: RecordedRun) -> list[Callout]:
    """A call-out for each held-out split with documents that are also in the training data, from the audit of the data."""
    audit = read_json(run.directory / run.record.data_directory / AUDIT) if run.record.data_directory else {}
    retry = _retry(run, "clean", "data.leakage.policy=drop_train")
    found = []
    for split, leaks in (audit.get("leakage") or {}).items():
        documents_by_kind = leaks.get("train") or {}
        num_documents = sum(documents_by_kind.get(kind) or 0 for kind in DOCUMENT_LEAK_KINDS)
        was_taken_out = leaks.get("policy") == "drop_train"  # before training, so that nothing of it was learned
        if not num_documents or was_taken_out:
            continue
        text = f"{num_documents:,} training documents are in the held-out data ({split}) too. "
        text += "Its numbers are better than those on new documents would be."
        found.append(Callout("warning", "Training documents in the held-out data", text, (retry,)))
    return found


def _straggler_callouts(run: RecordedRun) -> list[Callout]:
    """A call-out if ranks were slower than the others, which had to wait for them."""
    outcome = run.record.outcome
    if outcome is None or not outcome.slow_ranks:
        return []
    lines = [_slow_rank_text(slow_rank) for slow_rank in outcome.slow_ranks]
    heading = "A rank held the others up" if len(lines) == 1 else f"{len(lines)} ranks held the others up"
    return [Callout("warning", heading, f"{'. '.join(lines)}.", ("shardtune doctor",))]


def _slow_rank_text(slow_rank: dict[str, Any]) -> str:
    """Such as `Rank 3 on node7 computes 1.8 times as long as the others, from step 40 to 90`."""
    until = f" to {slow_rank['until_step']}" if slow_rank.get("until_step") else " on"
    factor = number(slow_rank.get("factor"), digits=2)
    place = f"Rank {slow_rank.get('rank')} on {slow_rank.get('host')}"
    return f"{place} computes {factor} times as long as the others, from step {slow_rank.get('from_step')}{until}"


def _gate_callouts(run: RecordedRun) -> list[Callout]:
    """Why nothing was exported at the end of the run: a gate refused, files of the base changed, or the checkpoint is at fault.

    Also that gates were passed over. Empty if `shardtune export` has exported the run since.
    """
    record = run.record
    if record.exports:
        return []
    gates = record.gates or {}
    refusals = [str(gate.get("says")) for gate in gates.get("gates") or [] if not gate.get("passed")]
    override = gates.get("override")
    text = ""
    if record.not_exported:
        text = f"Files of the base model changed while the run trained: {', '.join(record.not_exported[:3])}."
    elif record.export_problem:
        text = f"{record.export_problem}."
    elif refusals and override is None:
        text = f"A gate is not passed: {'; '.join(refusals)}."
    if text:
        return [Callout("bad", "Nothing was exported", text, (_export(run),))]
    if refusals:
        text = f"{'; '.join(refusals)}. The reason given: {override}."
        return [Callout("warning", "Exported although a gate is not passed", text)]
    return []


def _course_callouts(run: RecordedRun) -> list[Callout]:
    """Call-outs on what happened during the run: resumed, stopped early, steps that stood out, lines that cannot be read."""
    found = []
    if run.record.resumed_from:
        text = f"From {run.record.resumed_from}. Duration, speed and memory are those of all attempts where they were recorded."
        if run.record.accepted:
            text += f" Accepted differences: {'; '.join(run.record.accepted)}."
        starts = f"shardtune status {shlex.quote(str(run.directory))}"
        found.append(Callout("note", "The run was resumed", text, (starts,)))
    found += _stopped_early_callouts(run)
    # What a detector found has a call-out of its own.
    outliers = [event for event in run.events if event.get("event") != "challenge"]
    if outliers:
        heading = "1 step stood out" if len(outliers) == 1 else f"{len(outliers)} steps stood out"
        text = f"The last was step {outliers[-1]['step']}. What was done is told below."
        commands: tuple[str, ...] = ()
        if all(event.get("action") == Action.note for event in outliers):
            text += " To leave the updates of such steps out:"
            commands = (_retry(run, "guarded", "guards.loss=skip", "guards.grad_norm=skip"),)
        found.append(Callout("note", heading, text, commands))
    if run.unreadable_lines:
        text = f"{run.unreadable_lines} lines of metrics.jsonl or events.jsonl are no rows, and are left out here."
        found.append(Callout("warning", "Part of the run cannot be read", text))
    return found


def _stopped_early_callouts(run: RecordedRun) -> list[Callout]:
    """A call-out if patience or overfitting ended the run before its budget was spent, with the command that waits longer."""
    outcome = run.record.outcome
    if outcome is None or not outcome.stopped_early:
        return []
    patience = run.config.get("evaluation.patience")
    challenges = run.record.challenges or {}
    stops_overfitting = run.config.get("challenges.overfitting.action") == Reaction.stop
    if stops_overfitting and "overfitting" in challenges and EARLY_STOPPING not in challenges:
        text = "It overfits, and challenges.overfitting.action=stop ends such a run."
        words = "challenges.overfitting.action=note"
    else:
        text = f"The watched metric had not improved for {patience} evaluations."
        words = f"evaluation.patience={2 * int(patience or 1)}"
    return [Callout("note", "The run stopped early", f"{text} To wait longer:", (_retry(run, "longer", words),))]
