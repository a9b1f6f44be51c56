"""The last lines of a run: what was measured, what was found, which weights are the best, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from trainer.monitors.rewards import no_signal_of_run
from trainer.monitors.stragglers import SlowRank
from trainer.objectives.base import ModelKind
from trainer.objectives.registry import FAMILIES
from trainer.reporting.findings import MAX_SHOWN_REMEDIES, findings_in
from trainer.reporting.numbers import format_metric, format_times
from trainer.reporting.outcome import TrainingOutcome
from trainer.reporting.run_record import RUN_RECORD, RunRecord

MAX_SHOWN_ANSWER_CHARACTERS = 100
"""Characters of a question or answer in the last lines."""
MIN_METRIC_WIDTH = 22
"""Columns of the names of metrics."""


def end_text(
    record: RunRecord,
    run_dir: Path,
    outcome: TrainingOutcome,
    export_dir: Path | None,
    tracker_links: Sequence[tuple[str, str]],
) -> str:
    """Write the last lines of a run: speed, metrics, findings, the exported model, where to look, and what to do next.

    `export_dir`: of the exported model; None if there is none.
    `tracker_links`: such as ("W&B", "https://wandb.ai/...").
    """
    speed = ""
    if outcome.speed:
        speed = f", {outcome.speed['tokens_per_s']:,.0f} tokens/s (median)"
    lines = ["", f"done: {outcome.progress.step} steps, {outcome.progress.tokens:,} tokens{speed}"]
    width = max([MIN_METRIC_WIDTH, *map(len, outcome.last_metrics), *map(len, outcome.test)])
    for name, metric_value in outcome.last_metrics.items():
        before = outcome.metrics_before_training.get(name)
        before_text = "" if before is None else f"   (before: {format_metric(before)})"
        lines.append(f"  {name:<{width}} {format_metric(metric_value)}{before_text}")
    lines += _test_lines(record, width)
    lines += _finding_lines(outcome)
    lines += _better_weights_lines(record, run_dir, outcome)
    lines += _answer_lines(outcome)
    if outcome.overfitting_sentence:
        lines.append(f"overfits?   {outcome.overfitting_sentence}")
    lines += [f"slow:       {SlowRank(**slow_rank).text_with_steps()}" for slow_rank in outcome.slow_ranks]
    lines += _model_lines(record, outcome, export_dir)
    lines += [f"run record: {run_dir / RUN_RECORD}", f"metrics:    {run_dir / 'metrics.jsonl'}"]
    lines += [f"{name + ':':<11} {link}" for name, link in tracker_links]
    next_action = _next_action(record, run_dir, outcome, export_dir)
    if next_action is not None:
        lines.append(f"next:       {next_action}")
    return "\n".join(lines)


def _model_lines(record: RunRecord, outcome: TrainingOutcome, export_dir: Path | None) -> list[str]:
    """The line on the exported model and its checkpoint, or on why there is none; no line if no checkpoint was chosen.

    With `outcome.export_follows`, a later job of the pipeline writes the export.
    """
    if export_dir is not None:
        return [f"model:      {export_dir}{_exported_checkpoint_suffix(record)}"]
    if outcome.export_follows:
        return [f"model:      by the export job of this pipeline{_exported_checkpoint_suffix(record)}"]
    if record.exported_checkpoint is None:
        return []
    chosen_text = _chosen_checkpoint_text(record.exported_checkpoint)
    return [f"not exported: {_reason_not_exported(record)}; chosen was {chosen_text}"]


def _test_lines(record: RunRecord, width: int) -> list[str]:
    """The metrics of the test documents, and how often they have been measured; no lines without test documents."""
    if record.test is None:
        return []
    lines = [f"  {name:<{width}} {format_metric(value)}" for name, value in record.test["metrics"].items()]
    scope = f"{record.test['documents']:,} test documents at step {record.test['step']}"
    return [*lines, f"  ({scope}, looked at {format_times(record.test['looks'])}: choose nothing by them)"]


def _finding_lines(outcome: TrainingOutcome) -> list[str]:
    """Warnings of the detectors, each with its remedies."""
    lines = []
    for finding in findings_in(outcome.findings_by_detector):
        lines.append(f"warning:    {finding.sentence}")
        lines.append(f"            try: {'; '.join(finding.remedies[:MAX_SHOWN_REMEDIES])}")
    return lines


def _answer_lines(outcome: TrainingOutcome) -> list[str]:
    """What the base and the tuned model answer to two questions outside of the task; none if they were not asked."""
    lines = []
    for pair in outcome.chat_answers:
        lines.append(f"asked:      {shorten(pair['question'], MAX_SHOWN_ANSWER_CHARACTERS)}")
        for model in ("base", "tuned"):
            lines.append(f"  {model:<9} {shorten(pair[model], MAX_SHOWN_ANSWER_CHARACTERS) or '(nothing)'}")
    return lines


def _better_weights_lines(record: RunRecord, run_dir: Path, outcome: TrainingOutcome) -> list[str]:
    """Tell the user if better weights exist than the exported ones, by the metric that `evaluation.watch` names; [] if not.

    - No step is better than the model before training: that is said.
    - An earlier step is better than the exported one: the command that exports it.
    """
    best = outcome.progress.best_metric
    if outcome.watched_metric not in outcome.last_metrics or best is None:
        return []
    if not _has_improved(outcome):
        before = format_metric(outcome.metrics_before_training[outcome.watched_metric])
        return [f"best:       no checkpoint has a better {outcome.watched_metric} than before training ({before})"]
    if _has_better_step(record.exported_checkpoint, outcome):
        step = outcome.progress.best_step
        return [
            f"best:       step {step} had {outcome.watched_metric} {format_metric(best)}: {_export_of_best(run_dir)}"
        ]
    return []


def _reason_not_exported(record: RunRecord) -> str:
    """A pointer to what was printed about the export, or the setting that asked for none."""
    gates = (record.gates or {}).get("gates") or []
    was_refused = any(not gate["passed"] for gate in gates)
    if was_refused or record.not_exported or record.export_problem:
        return "for the reason above"
    return "export.at_end=false"


def _exported_checkpoint_suffix(record: RunRecord) -> str:
    """Which checkpoint was exported and why, in brackets; empty if nothing was chosen."""
    chosen = record.exported_checkpoint
    return "" if chosen is None else f" ({_chosen_checkpoint_text(chosen)})"


def _chosen_checkpoint_text(chosen: Mapping[str, Any]) -> str:
    """A chosen checkpoint in words, and why it was chosen."""
    return f"step {chosen['step']}, the {chosen['which']}: {chosen['reason']}"


def _has_improved(outcome: TrainingOutcome) -> bool:
    """Whether the best value of the watched metric is better than before training; True if it was not measured before."""
    best = outcome.progress.best_metric
    before = outcome.metrics_before_training.get(outcome.watched_metric)
    if best is None or before is None:
        return True
    return best > before if outcome.greater_is_better else best < before


def _has_better_step(exported_checkpoint: Mapping[str, Any] | None, outcome: TrainingOutcome) -> bool:
    """Whether an earlier step was better than the exported checkpoint, the last one, by the metric that `evaluation.watch` names.

    `exported_checkpoint`: such as {"which": "best", "step": 40, "reason": "..."}; None if none was chosen. True also if the last
    step was not evaluated by the metric, since the earlier one was the best so far.
    """
    is_best_exported = exported_checkpoint is not None and exported_checkpoint.get("which") == "best"
    is_last_step_best = outcome.progress.best_step in (None, outcome.progress.step)
    if is_best_exported or is_last_step_best:
        return False
    best = outcome.progress.best_metric
    last = outcome.last_metrics.get(outcome.watched_metric)
    if best is None or last is None:
        return True
    return best > last if outcome.greater_is_better else best < last


def _export_of_best(run_dir: Path) -> str:
    """The command that exports the checkpoint of the best step."""
    return f"shardtune export {shlex.quote(str(run_dir))} checkpoint=best"


def _next_action(record: RunRecord, run_dir: Path, outcome: TrainingOutcome, export_dir: Path | None) -> str | None:
    """Say what the user does next, as a command if there is one; None if gates kept the model from being exported.

    In this order, since a model that is worse is not worth a chat: train again if training could not learn, or made it worse;
    export an earlier step that is better; wait for the export job; export; try the exported model.
    """
    findings = findings_in(outcome.findings_by_detector)
    no_signal = no_signal_of_run(outcome.progress.reward_blocks)
    if no_signal is not None:
        return f"train again in another run.dir, with {no_signal.remedies[0]}"
    if not _has_improved(outcome):
        remedy = findings[0].remedies[0] if findings and findings[0].remedies else "a lower optim.lr"
        return f"train again in another run.dir, with {remedy}"
    if _has_better_step(record.exported_checkpoint, outcome):
        return _export_of_best(run_dir)
    if outcome.export_follows:  # a later job of the pipeline writes it
        return f"shardtune status {shlex.quote(str(run_dir))}"
    if export_dir is None:
        return None if record.gates else f"shardtune export {shlex.quote(str(run_dir))}"
    # `shardtune chat` takes causal language models alone.
    family = FAMILIES.get(record.objective)
    if family is not None and family.kind is ModelKind.causal:
        return f"shardtune chat {shlex.quote(str(run_dir))}"
    return f"read {export_dir / 'README.md'}, the model card"
