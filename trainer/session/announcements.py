"""What a run reports while it trains: on the screen, in `run.json` and `status.json`, and to trackers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from strategies import runtime as processes
from strategies.base import Progress
from strategies.errors import LimitExceeded, ShardtuneError, StorageError
from trainer.checkpoints.layout import checkpoint_dirs_of, checkpoints_in
from trainer.checkpoints.manager import Checkpoints
from trainer.config.launching import run_writes_export
from trainer.config.resuming import settings_as_dict
from trainer.config.run import RunConfig
from trainer.data.prepare import PreparedData
from trainer.data.report.preview import start_preview_text, summary_text
from trainer.monitors.divergence import Verdict
from trainer.monitors.stragglers import ReportSlow, SlowRank
from trainer.objectives.registry import data_spec_of
from trainer.planner.predicted_vs_measured import measured_cost
from trainer.reporting.config import LoggingConfig
from trainer.reporting.console import Console
from trainer.reporting.energy import energy_of_run, measure_energy
from trainer.reporting.findings import findings_in, findings_summary
from trainer.reporting.metric_names import CURRENT_NAMES_EDITION
from trainer.reporting.metrics import Meter
from trainer.reporting.outcome import TrainingOutcome
from trainer.reporting.run_record import RunRecord, readable_run_record
from trainer.reporting.status import RunState, write_status
from trainer.reporting.trackers.base import LoggedTable, RunEnding, TrackedRun
from trainer.reporting.tracking import (
    OpenedTrackers,
    Trackers,
    final_summary,
    open_trackers,
    open_trackers_without_rows,
)
from trainer.session.context import RunContext
from trainer.session.last_lines import end_text
from trainer.session.run_facts import outcome_record, start_screen_text, write_run_record
from trainer.session.tracker_columns import name_of, tracker_settings

FAILED_SAVE_PATIENCE_S = 20.0
"""Seconds that a failed run waits for a checkpoint that is still being written."""


def open_console(
    config: RunConfig, run_dir: Path, data: PreparedData, tokenizer: Any, runtime: processes.Runtime
) -> Console:
    """Open this rank's console, and show on it what the run will learn: the run, the data report and samples of its text.

    Only rank 0 shows them on the screen; the log file of every rank has them. A run that goes on from a checkpoint with the data
    that it began with shows one line in their place. `data.label_names`: the labels of a classification,
    which stand beside its samples.
    """
    console = Console(enabled=runtime.is_main, log=run_dir / "logs" / f"rank-{runtime.rank}.log")
    headline = f"run {run_dir}: {config.strategy.name}, {config.tuning.name}, {runtime.world_size} process(es)"
    if _goes_on_with_same_data(config, run_dir, data):
        console.print_line(f"{headline}\n{_same_data_line(data)}")
        return console
    data_spec = data_spec_of(config.objective)
    samples = start_preview_text(
        data.train,
        tokenizer,
        data_spec,
        data.label_names,
        width=console.width,
        report=data.report,
        privacy=config.data.privacy,
    )
    console.print_line("\n".join([headline, summary_text(data.report), samples]))
    return console


def _goes_on_with_same_data(config: RunConfig, run_dir: Path, data: PreparedData) -> bool:
    """Whether a run goes on from a checkpoint with data that an earlier start of it has shown: `run.json` has its fingerprint."""
    try:
        has_checkpoint = bool(checkpoints_in(checkpoint_dirs_of(run_dir, config.checkpoint.fallback_dir)))
    except StorageError:  # all ranks agree on that later, when they look for the checkpoint
        return False
    return has_checkpoint and readable_run_record(run_dir).data_fingerprint == data.train.fingerprint


def _same_data_line(data: PreparedData) -> str:
    """The line that stands for the data report and the sample where a run goes on with the data that it began with."""
    train = data.report.get("train") or {}
    sizes = f"{train['documents']:,} documents, {train['tokens']:,} tokens; " if train else ""
    return f"data: as at the first start: {sizes}see {data.directory / 'audit.html'}"


def open_trackers_and_records(
    config: RunConfig, record: RunRecord, progress: Progress, context: RunContext
) -> Trackers:
    """Show the start screen of a run, open its trackers (W&B, TensorBoard, ...) and write `run.json` and `status.json`.

    Trackers and files are rank 0's alone: other ranks get trackers that do nothing. All ranks must call. Raises LeaseLost if
    another attempt owns the run directory.
    """
    context.console.print_line(start_screen_text(record))
    context.attempt.require_run_dir_ownership(context.runtime)
    if not context.runtime.is_main:
        return Trackers()
    opened = _open_trackers_of_run(config, record, progress, context)
    record.substitutions |= opened.substitutions
    record.from_environment = opened.from_environment or None
    for key, value in opened.substitutions.items():
        context.console.print_line(f"resolved: {key}: {value}")
    # A line on environment variables that have no effect, such as those that lose to a setting; None if there are none.
    if opened.passed_over:
        context.console.print_line(opened.passed_over)
    write_run_record(context.run_dir, record)
    write_status(context.run_dir, RunState.running, step=progress.step)
    return opened.trackers


def _open_trackers_of_run(
    config: RunConfig, record: RunRecord, progress: Progress, context: RunContext
) -> OpenedTrackers:
    """Open the trackers on rank 0, or continue the W&B run of an earlier start. They follow a renamed run directory.

    Notes in `progress` which W&B run it is, and in `progress` and `record` in which edition the run's metrics are named.
    """
    if progress.wandb_id is None:  # a run that begins in trackers now; any other keeps the names it has there
        progress.metric_names = CURRENT_NAMES_EDITION
    record.metric_names = progress.metric_names
    opened = open_trackers(
        TrackedRun(
            config=config.logging,
            run_dir=context.run_dir,
            run_id=progress.wandb_id or "",
            name=name_of(config),
            resumed_at=progress.step,
            settings=tracker_settings(config, record),
            data=Path(record.data_directory),
            print_line=context.console.print_line,
            metric_names=record.metric_names,
        )
    )
    context.attempt.on_run_dir_renamed.append(opened.trackers.follow_renamed_run_dir)
    # In the next checkpoint too, so that a resumed run continues the same W&B run.
    progress.wandb_id = opened.run_id
    return opened


def build_slow_rank_reporter(context: RunContext) -> ReportSlow:
    """Build the function that rank 0 calls when a rank becomes slow or recovers: it warns, and keeps `status.json` up to date."""

    return partial(_report_slow_rank, context)


def _report_slow_rank(context: RunContext, changed_rank: SlowRank, slow_ranks: list[SlowRank], step: int) -> None:
    """Print that `changed_rank` became slow or recovered, and write all `slow_ranks` of now into `status.json`.

    A slow rank's text is "rank 3 on node-1 computes 1.4 times as long as the other ranks". `step`: the one just logged.
    """
    if changed_rank in slow_ranks:
        context.console.print_line(f"warning: step {step}: {changed_rank}")
    else:
        context.console.print_line(
            f"step {step}: rank {changed_rank.rank} on {changed_rank.host} is as fast as the other ranks again"
        )
    if context.attempt.reason_run_dir_was_lost() is not None:
        return  # the directory is another attempt's: nothing may be written there
    reasons = []
    if context.attempt.note:  # what the detectors found, which stands in `status.json` too
        reasons.append(context.attempt.note)
    reasons += [slow_rank.text_with_steps() for slow_rank in slow_ranks]
    reason = "; ".join(reasons) or None
    rows = [asdict(slow_rank) for slow_rank in slow_ranks]
    with suppress(ShardtuneError):  # if the disk is full, a file that must be written will say so
        write_status(context.run_dir, RunState.running, step=step, reason=reason, slow=rows)


def build_findings_reporter(context: RunContext) -> Callable[[dict[str, Any]], None]:
    """Build the function that is called with the detectors' record after each evaluation: it keeps `status.json` up to date."""
    return partial(_report_findings, context)


def _report_findings(context: RunContext, findings_by_detector: dict[str, Any]) -> None:
    """Write a summary of what the detectors found (overfitting, forgetting, instability) into `status.json`, if it has changed.

    Also kept as the attempt's note, since later writes replace the whole file.
    """
    note = findings_summary(findings_by_detector)
    if note == context.attempt.note:
        return
    context.attempt.note = note
    if context.runtime.is_main and context.attempt.reason_run_dir_was_lost() is None:
        with suppress(ShardtuneError):  # if the disk is full, a file that must be written will say so
            write_status(context.run_dir, RunState.running, step=context.attempt.step, reason=note)


@contextmanager
def recording_end_of_training(
    config: RunConfig,
    trackers: Trackers,
    outcome: TrainingOutcome,
    record: RunRecord,
    meter: Meter,
    checkpoints: Checkpoints,
    context: RunContext,
) -> Iterator[None]:
    """A context around the steps of a run: however they end, trackers are closed, and `run.json` gets what the run took.

    `outcome`: filled while the run goes on; holds the findings that `record` gets.
    `meter`: speed and memory are read from it.
    `checkpoints`: the cost of saving is read from it.

    An error goes on to the caller.
    """
    ending = RunEnding(RunState.done)
    may_have_diverged = True
    try:
        yield
    except BaseException as error:
        # A stopped run will be resumed, and may recover; a run that failed, as of a full disk, has that as its reason.
        may_have_diverged = isinstance(error, LimitExceeded)
        # The state that trackers show: stopped for now, or failed, with the error as the reason.
        ending = RunEnding.from_error(error)
        if ending.state is RunState.failed and isinstance(error, Exception):  # not after a Ctrl-C
            checkpoints.wait_at_most(FAILED_SAVE_PATIENCE_S)
        raise
    finally:
        context.console.end_progress_bar()
        if may_have_diverged:
            ending = _with_divergence(ending, outcome.findings_by_detector)
        _summarise_and_close_trackers(trackers, ending, outcome, meter, config, context)
        record.challenges = outcome.findings_by_detector
        record_measured_cost(record, meter, checkpoints, context)


def _summarise_and_close_trackers(
    trackers: Trackers,
    ending: RunEnding,
    outcome: TrainingOutcome,
    meter: Meter,
    config: RunConfig,
    context: RunContext,
) -> None:
    """Give the trackers the last numbers and the ending of the run, with its export if there is one, and close them.

    Prints for each tracker where the run can be seen, unless the run is done: then its last lines show it.
    """
    speed = outcome.speed or meter.median_speeds()  # a run that failed has no speed in its outcome yet
    last_row = {**outcome.last_row, **meter.peaks}
    trackers.summarise(final_summary(last_row, speed, outcome.last_metrics | outcome.test))
    export_dir = context.run_dir / "export"
    has_export = ending.state is RunState.done and run_writes_export(config) and export_dir.is_dir()
    trackers.close(replace(ending, exported=export_dir if has_export else None))
    if ending.state is not RunState.done:
        for name, link in trackers.hints:
            context.console.print_line(f"{name + ':':<11} {link}")


def _with_divergence(ending: RunEnding, findings_by_detector: dict[str, Any]) -> RunEnding:
    """Mark the ending as diverged if the detectors found that the losses at the end are worse than at the beginning.

    Their sentence becomes the reason if the ending has none.
    """
    for finding in findings_in(findings_by_detector):
        if finding.name == Verdict.diverged:
            return replace(ending, diverged=True, reason=ending.reason or finding.sentence)
    return ending


def record_measured_cost(record: RunRecord, meter: Meter, checkpoints: Checkpoints, context: RunContext) -> None:
    """Write into `run.json` what the run took (memory, bytes exchanged, saving), beside the prediction, however it ended.

    On rank 0 alone; no collective.
    """
    if not context.runtime.is_main:
        return
    # Writing a checkpoint beside training needs a copy of the state in the host's memory, for which there may be no room.
    no_background_reason = checkpoints.state_buffer.refusal_reason
    if no_background_reason is not None:  # checkpoints could not be written beside training, as the setting asks
        record.substitutions["checkpoint.background"] = f"false: {no_background_reason}"
    assert record.receipt is not None  # set by `build_run_record`
    record.receipt.measured = measured_cost(meter, context.runtime.device, checkpoints.last_published)
    # An error here would hide what ended the run. A run that succeeds writes the file once more.
    with suppress(OSError, ShardtuneError):
        if context.attempt.lease is not None:
            context.attempt.lease.check()  # raises LeaseLost if the directory is another attempt's
        write_run_record(context.run_dir, record)


def metering_energy(config: RunConfig, context: RunContext) -> AbstractContextManager[None]:
    """A context in which each host measures its energy, if `logging.energy` asks for it."""
    return measure_energy(config.logging.energy, context.run_dir, context.runtime, context.console.print_line)


def close_records(
    record: RunRecord, outcome: TrainingOutcome, exported: Path | None, trackers: Trackers, context: RunContext
) -> None:
    """Write the outcome of a finished run into `run.json`, and show the last lines on the screen. All ranks must call.

    `exported`: the directory of the export; None without one.
    """
    if context.runtime.is_main:
        record.energy = energy_of_run(context.run_dir)
        record.outcome = outcome_record(outcome)
        write_run_record(context.run_dir, record)
        context.console.print_line(end_text(record, context.run_dir, outcome, exported, trackers.hints))
    # No rank ends, and with it the job, before the record is written.
    processes.barrier(context.runtime)


def track_evaluation(
    config: RunConfig,
    directory: Path,
    report: dict[str, Any],
    tables: dict[str, LoggedTable],
    print_line: Callable[[str], None],
) -> None:
    """Log an evaluation to W&B, if W&B is on, as a run of its own with the numbers and tables of its report. On rank 0 alone.

    `report`: the content of `evaluation.json`.
    `tables`: rows of tasks, by name.
    `directory`: for W&B's files.

    A tracker that fails is reported and ends nothing.
    """
    model = report["model"]
    model_name = Path(model["run"] or model["path"]).name
    # The number in `step-000500`; 0 for a model that is no checkpoint.
    step_digits = re.sub(r"\D", "", model["checkpoint"] or "")
    step = int(step_digits or 0)
    conditions = {key: report[key] for key in ("strategy", "processes", "precision", "device", "versions")}
    opened = _open_own_wandb_run(
        config,
        replace(config.logging, artifacts=False),  # an evaluation makes no model or data set to keep in W&B
        job_type="evaluate",
        trained_name=model_name,
        directory=directory,
        settings={**model, **conditions, "against": report.get("against", {}).get("what")},
        print_line=print_line,
    )
    metrics = _metrics_of_report(report)
    opened.trackers.log(metrics, step=step)
    opened.trackers.log_tables(tables, step=step)
    opened.trackers.summarise(metrics)
    _close_trackers(opened, RunEnding(RunState.done), print_line)


def track_export(config: RunConfig, exported: Path, trained_id: str, print_line: Callable[[str], None]) -> None:
    """Register an export in W&B, if W&B is on, after the run that trained the model has ended. On one process alone.

    It becomes a W&B run of its own, in the group of the run, whose artifact has the name that the run would have given it.
    `exported`: the directory, in the run directory. `trained_id`: the run's id in W&B; empty if it has none. A tracker that fails
    is reported and ends nothing.
    """
    run_dir = exported.parent
    opened = _open_own_wandb_run(
        config,
        config.logging,
        job_type="export",
        trained_name=run_dir.name,
        directory=run_dir,
        settings={},
        print_line=print_line,
        trained_id=trained_id,
    )
    _close_trackers(opened, RunEnding(RunState.done, exported=exported), print_line)


def _open_own_wandb_run(
    config: RunConfig,
    logging_config: LoggingConfig,
    *,
    job_type: str,
    trained_name: str,
    directory: Path,
    settings: dict[str, Any],
    print_line: Callable[[str], None],
    trained_id: str = "",
) -> OpenedTrackers:
    """Start a W&B run of its own for an evaluation or an export, in the W&B group of the run that trained the model.

    `logging_config`: which trackers are on; `config` is only shown.
    `job_type`: `evaluate` or `export`.
    `trained_name`, `trained_id`: name and W&B id of the run that trained the model; an export becomes a version of that run's
    artifact.
    `directory`: for W&B's files.
    `settings`: shown in W&B beside the configuration.
    """
    opened = open_trackers_without_rows(
        TrackedRun(
            config=replace(
                logging_config,
                tensorboard=False,
                trackio=False,
                mlflow=False,
                name=None,
                job_type=job_type,
                group=logging_config.group or trained_name,
            ),
            run_dir=directory,
            run_id="",
            name=f"{job_type}-{trained_name}",
            resumed_at=0,
            settings={**settings, "metric_names": CURRENT_NAMES_EDITION, "config": settings_as_dict(config)},
            trained_by_run=trained_id,
            print_line=print_line,
        )
    )
    for key, value in opened.substitutions.items():
        print_line(f"resolved: {key}: {value}")
    return opened


def _close_trackers(opened: OpenedTrackers, ending: RunEnding, print_line: Callable[[str], None]) -> None:
    """Close the trackers, and print for each where its run can be seen."""
    opened.trackers.close(ending)
    for tracker, link in opened.trackers.hints:
        print_line(f"{tracker}: {link}")


def _metrics_of_report(report: dict[str, Any]) -> dict[str, float]:
    """Flatten an evaluation report for trackers: `eval/TASK/METRIC`, with `.../low` and `.../high` if it has an interval."""
    metrics: dict[str, float] = {}
    for task, task_report in report["tasks"].items():
        for metric, record in task_report["metrics"].items():
            name = f"eval/{task}/{metric}"
            for field, suffix in (("value", ""), ("low", "/low"), ("high", "/high")):
                if record.get(field) is not None:
                    metrics[name + suffix] = record[field]
    return metrics
