"""Prints the state of runs as tables."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.output import TableColumn, TableRow, format_table, truncate_to_width, wrap_text
from launch.runs import efficiency, pipeline_jobs
from launch.runs.checkpoints import CheckpointList, StoredCheckpoint
from launch.runs.metrics_tail import loss_curve
from launch.runs.queue import JobQueue, QueuedJob
from launch.runs.sparkline import sparkline
from launch.runs.status import HANGING_REASON, LOST, NOT_STARTED, QUEUED, UNKNOWN, RunView, age_text
from strategies import exit_codes
from strategies.atomic_io import size_text
from trainer.pages.numbers import format_duration
from trainer.reporting.numbers import format_metric
from trainer.reporting.status import RunState, message_suffices

MAX_LISTED_JOBS = 20
"""Jobs of the user without a run that are listed; the rest is only counted."""
MAX_LISTED_STARTS = 5
"""Starts of a run whose resource usage is shown: the newest ones."""
NUM_LINES_BELOW_TABLE = 8
"""Terminal lines that --watch keeps free for what stands below the table."""
NUM_CURVE_POINTS = 60
"""Points of the loss curve below a run's row."""
SAME_COMMAND_ADVICE = "the same command continues it from the newest intact checkpoint"
CHANGE_AND_CONTINUE_ADVICE = "change what the message says; the same command then continues it"
RUN_COLUMNS = (
    TableColumn(),
    TableColumn("state"),
    TableColumn("step", is_number=True),
    TableColumn("loss", is_number=True),
    TableColumn("tok/s", is_number=True),
    TableColumn("eta", is_number=True),
    TableColumn("GiB", is_number=True),
    TableColumn("last seen", is_number=True),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunDetails:
    """What `status` shows only for a single run."""

    checkpoint_list: CheckpointList
    failure: dict[str, Any]
    """Its `failure.json`; empty if it has none."""
    sampled_losses: list[float]
    """The loss at evenly spread places of `metrics.jsonl`, in order."""
    log_dir: Path
    start_usages: list[dict[str, Any]]
    """What each start of its SLURM jobs used of its allocation: the lines of `jobs.jsonl`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunsStatus:
    """The state of the runs below a directory, and of the user's jobs in SLURM's queue."""

    root: Path
    runs: list[RunView]
    queue: JobQueue
    search_stopped_early: bool
    """Whether the search for runs ended early, because there were too many directories."""
    details: RunDetails | None = None
    """Details of the run, if `root` is one."""

    @property
    def jobs_without_run(self) -> list[QueuedJob]:
        """The user's jobs in the queue that are not shown with a run, as a run's own job and the jobs of its pipeline are."""
        ids_of_runs = set()
        for run in self.runs:
            if run.job is not None:
                ids_of_runs.add(run.job.id)
            ids_of_runs.update(part.job for part in run.pipeline_parts)
        return [job for job in self.queue.jobs if job.id not in ids_of_runs]


def status_text(status: RunsStatus, damage_by_checkpoint: Mapping[Path, str] | None, *, live: bool = False) -> str:
    """Write what `status` prints: a table of the runs, or the details of a single run.

    `damage_by_checkpoint`: what is wrong with each damaged checkpoint, empty if all are intact, None if they were not
    verified. `live` (for --watch) adds loss curves to runs that train, and leaves out runs that do not fit on the terminal.
    """
    if status.details is not None:  # the user named one run
        lines = _single_run_lines(status.runs[0], status.details, damage_by_checkpoint)
        if status.queue.problem:
            lines += ["", *wrap_text(f"queue: {status.queue.problem}")]
        return "\n".join(lines)

    if status.runs:
        lines = _runs_table_lines(status, live=live)
    else:
        lines = [f"no runs below {status.root}"]
    if damage_by_checkpoint:
        lines += ["", *(f"damaged: {path}: {damage}" for path, damage in damage_by_checkpoint.items())]
    elif damage_by_checkpoint is not None:
        lines += ["", "all checkpoints are intact"]
    lines += _other_job_lines(status)
    if status.queue.problem:
        lines += ["", truncate_to_width(f"queue: {status.queue.problem}")]
    return "\n".join(lines)


def _runs_table_lines(status: RunsStatus, *, live: bool) -> list[str]:
    """Write the table with a row for each run, and below it the number of runs in each state.

    `live` (for --watch): only the most urgent runs that fit on the terminal, with their loss curves.
    """
    if live:
        lines = _most_urgent_runs_table_lines(status)
    else:
        lines = format_table(RUN_COLUMNS, [_table_row(run, status.root, live=False) for run in status.runs])
    counts = Counter(run.state for run in status.runs)
    states = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    runs = "1 run" if len(status.runs) == 1 else f"{len(status.runs)} runs"
    lines += ["", f"{runs}: {states}"]
    if status.search_stopped_early:
        lines.append(
            f"not all directories below {status.root} were searched: there are too many; name one further down"
        )
    return lines


def _most_urgent_runs_table_lines(status: RunsStatus) -> list[str]:
    """Write the table of the runs that fit on the terminal, most urgent first; a last line counts the others."""
    max_lines = max(1, shutil.get_terminal_size((80, 24)).lines - NUM_LINES_BELOW_TABLE)
    runs = sorted(status.runs, key=_urgency_sort_key)
    rows = [_table_row(run, status.root, live=True) for run in runs[:max_lines]]
    lines = format_table(RUN_COLUMNS, rows)
    while len(lines) > max_lines and len(rows) > 1:
        rows.pop()  # a run takes several lines if its name is folded or it has notes
        lines = format_table(RUN_COLUMNS, rows)
    num_hidden = len(runs) - len(rows)
    return [*lines, f"... and {num_hidden} more"] if num_hidden else lines


def _table_row(run: RunView, root: Path, *, live: bool) -> TableRow:
    """Make a run's row of the table, with notes below: where it runs, why it is in its state, its loss curve if `live`."""
    is_below_root = run.directory.is_relative_to(root) and run.directory != root
    name = run.directory.relative_to(root) if is_below_root else run.directory
    cells = (
        str(name),
        run.state,
        _progress_text(run),
        _loss_text(run.loss),
        _speed_text(run.tokens_per_s),
        "-" if run.remaining_s is None else format_duration(run.remaining_s),
        "-" if run.memory_gib is None else f"{run.memory_gib:.3g}",
        "-" if run.last_seen_s is None else age_text(run.last_seen_s),
    )
    notes = []
    location_and_reason = _location_and_reason(run)
    if location_and_reason:
        notes.append(truncate_to_width(f"  {location_and_reason}"))
    if live and run.state == RunState.running:
        losses = loss_curve(run.directory / "metrics.jsonl", NUM_CURVE_POINTS)
        if losses:
            notes.append(f"  {sparkline(losses)}")
    return TableRow(cells, notes)


def _urgency_sort_key(run: RunView) -> tuple[int, float]:
    """Sort key: running, queued and lost runs, in this order, then all others; within these, the latest seen first."""
    order = (RunState.running, QUEUED, LOST)
    position = order.index(run.state) if run.state in order else len(order)
    last_seen_s = run.last_seen_s if run.last_seen_s is not None else math.inf
    return position, last_seen_s


def _location_and_reason(run: RunView) -> str:
    """The note below a run's row, such as `on node7, job 17, 2 restarts: <reason>`; empty if there is nothing to say.

    The host is shown of a running run, its job of one that is running or lost, its restarts unless it is done. A state is
    one of `RunState`, as the run writes it, or one that only a look from outside finds: LOST, QUEUED, NOT_STARTED.
    """
    if run.state in (RunState.done, NOT_STARTED) and not run.state_reason:
        return ""
    location = []
    if run.state == RunState.running and run.host:
        location.append(f"on {run.host}")
    if run.state in (RunState.running, LOST) and run.job_id:
        job = f"job {run.job_id}"
        # Its run is running, but the job is not: it is suspended, for example, or about to end.
        if run.job is not None and run.job.state != "RUNNING":
            job += f" {run.job.state}"
        location.append(job)
    if run.restarts and run.state != RunState.done:
        location.append(f"{run.restarts} restart{'s' if run.restarts > 1 else ''}")
    return ": ".join(filter(None, (", ".join(location), run.state_reason)))


def _other_job_lines(status: RunsStatus) -> list[str]:
    """List the user's jobs in the queue that belong to none of the runs, as a section of its own; no lines if there are none."""
    other_jobs = status.jobs_without_run
    if not other_jobs:
        return []
    lines = ["", "other jobs of yours in the queue:"]
    lines += [truncate_to_width(f"  {job.description}  ({job.name})") for job in other_jobs[:MAX_LISTED_JOBS]]
    if len(other_jobs) > MAX_LISTED_JOBS:
        lines.append(f"  and {len(other_jobs) - MAX_LISTED_JOBS} more")
    return lines


def _single_run_lines(run: RunView, details: RunDetails, damage_by_checkpoint: Mapping[Path, str] | None) -> list[str]:
    """Write what `status <run>` prints: state and step, a table of facts, advice, checkpoints, and where the logs are.

    `damage_by_checkpoint`: what is wrong with each damaged checkpoint; None if they were not verified.
    """
    heading = f"{run.directory}: {run.state}, step {_progress_text(run)}"
    if run.step and run.total_steps:
        heading += f" ({run.step / run.total_steps:.1%})"
    lines = [heading]
    if run.state_reason and run.state != RunState.failed:  # of a failed run, the advice below repeats the reason
        lines += wrap_text(f"  {run.state_reason}")
    facts = [*_training_facts(run, details), *_job_facts(run, details)]
    lines += format_table((TableColumn(), TableColumn()), [TableRow(fact) for fact in facts], indent=2)
    lines += _advice_lines(run, details.failure)
    lines += _checkpoint_lines(details.checkpoint_list, damage_by_checkpoint)
    if details.log_dir.is_dir():
        lines += ["", f"logs: {details.log_dir}"]
    return lines


def _training_facts(run: RunView, details: RunDetails) -> list[tuple[str, str]]:
    """How the training of a run goes, as (name, text) rows: loss, held-out metrics, speed and memory, where known."""
    facts = []
    if run.loss is not None:
        facts.append(("loss", f"{format_metric(run.loss)}  {sparkline(details.sampled_losses)}"))
    if run.last_evaluation:
        facts.append(("held out", _last_evaluation_text(run.last_evaluation)))
    if run.tokens_per_s is not None:
        speed_clauses = [f"{_speed_text(run.tokens_per_s)} tokens/s"]
        if run.seconds_per_step is not None:
            speed_clauses.append(f"{run.seconds_per_step:.3g} s a step")
        if run.remaining_s is not None:
            speed_clauses.append(f"{format_duration(run.remaining_s)} left")
        facts.append(("rate", ", ".join(speed_clauses)))
    if run.memory_gib is not None:
        facts.append(("memory", f"{run.memory_gib:.3g} GiB, the largest peak of a rank"))
    return facts


def _last_evaluation_text(last_evaluation: Mapping[str, float]) -> str:
    """Write the metrics of the last evaluation, and the step at which they were measured: `eval/loss 2.3451 (step 40)`."""
    metrics = ", ".join(f"{name} {format_metric(value)}" for name, value in last_evaluation.items() if name != "step")
    step = last_evaluation.get("step")
    return metrics if step is None else f"{metrics} (step {step:.0f})"


def _job_facts(run: RunView, details: RunDetails) -> list[tuple[str, str]]:
    """Who runs a run, as (name, text) rows: its process, its job in the queue, what its starts used, jobs of its pipeline.

    A run has several starts if it was restarted. `details.start_usages` has what each start of a SLURM job used.
    """
    facts = []
    runner = ", ".join(_runner_clauses(run))
    if runner:
        facts.append(("run by", runner))
    if run.restarts:  # starts after the first one: by a launcher, SLURM, or the same command
        facts.append(("restarts", str(run.restarts)))
    if run.job is not None and run.state != QUEUED:
        # squeue says INVALID of a job that is past its limit, and is about to be ended for it.
        time_left = "past its time limit" if run.job.time_left == "INVALID" else f"{run.job.time_left} left"
        facts.append(("queue", f"{run.job.description}, {time_left} on {run.job.nodes}"))
    for start_usage in details.start_usages[-MAX_LISTED_STARTS:]:
        facts.append(("used", efficiency.start_usage_text(start_usage)))
    for part in run.pipeline_parts:
        description = part.description.removeprefix(f"job {part.job} ")
        facts.append((part.part, f"job {part.job}: {description}"))
    return facts


def _runner_clauses(run: RunView) -> list[str]:
    """Clauses on who runs a run, or did: its process and job, since when, and when it was last seen.

    ["process 4711 on node7", "job 17", "since 2026-01-31 12:00", "last seen 3 s ago"].
    """
    clauses = []
    if run.host:
        clauses.append(f"process {run.pid} on {run.host}")
    if run.job_id:
        clauses.append(f"job {run.job_id}")
    if run.attempt_began_at:
        clauses.append(f"since {run.attempt_began_at}")
    if run.last_seen_s is not None:
        event = "last seen" if run.state in (RunState.running, LOST, UNKNOWN) else "ended"
        clauses.append(f"{event} {age_text(run.last_seen_s)} ago")
    return clauses


def _advice_lines(run: RunView, failure: Mapping[str, Any]) -> list[str]:
    """Say what the user can do about a run. The first case that applies:

    - It failed: see `_failure_advice`.
    - It is lost: give the same command again; if its process lives, stop it first.
    - It was preempted, and its last start was refused: change what the message says.
    - It was preempted and its job is still running: nothing, the job starts it again.
    - It was preempted: give the same command again.
    - Otherwise: no lines.

    `failure`: the run's `failure.json`, {"message": ..., "user_error": ..., ...}; empty if it has none.
    """
    if run.state == RunState.failed:
        return ["", *_failure_advice(run, failure)]
    if run.state == LOST:
        has_living_process = run.state_reason is not None and HANGING_REASON in run.state_reason
        stop_first = "stop it, then " if has_living_process else ""
        return ["", *wrap_text(f"to do: {stop_first}{SAME_COMMAND_ADVICE}")]
    if run.state != RunState.preempted:
        return []
    # Each start removes the failure of an earlier one: with such a failure, the last start was refused.
    if failure.get("exit_code") in (exit_codes.WRONG_SETTING, exit_codes.WRONG_DATA):
        return ["", *wrap_text(f"to do: {CHANGE_AND_CONTINUE_ADVICE}")]
    if run.job is not None and run.job.state == "RUNNING":
        return ["", f"{run.job.description} starts it again"]
    return ["", *wrap_text(f"to do: {SAME_COMMAND_ADVICE}")]


def _failure_advice(run: RunView, failure: Mapping[str, Any]) -> list[str]:
    """Say why a run failed and what to do: lines `failed: <reason>` and `to do: <advice>`. The first case that applies:

    - Another job of its pipeline failed, so that it never began.
    - The user's settings or data are wrong.
    - Any other error that would come again: its traceback.
    - Something that may not come again, such as a lost node, or no recorded failure: run the same command or, if the run
      made no step, look at its output and submit it again.

    `failure`: its `failure.json`, {"message": ..., "user_error": ..., "retry": ...}; empty if it has none.
    """
    broken_part = pipeline_jobs.first_failed_part(list(run.pipeline_parts))
    if broken_part is not None and not failure:  # the run itself has written no failure
        advice = f"shardtune logs {run.directory} job={broken_part.job} says why; submit the same settings again"
        return [*wrap_text(f"failed: {run.state_reason}"), *wrap_text(f"to do: {advice}")]

    # `retry` is the key of `launcher.retry` that would allow another start. Only `out_of_memory`, or none, fails again as it is.
    fails_again = failure.get("retry") in (None, "out_of_memory")
    if failure.get("user_error") and fails_again:
        advice = CHANGE_AND_CONTINUE_ADVICE
    elif failure and fails_again:
        advice = f"the traceback is in {run.directory / 'failure.json'}"
    elif run.step:  # it has trained, so that there may be a checkpoint
        advice = SAME_COMMAND_ADVICE
    else:
        advice = f"shardtune logs {run.directory} shows its output; submit the same settings again"
    reason = f"{_failure_origin(failure)}{run.state_reason or 'no reason was recorded'}"
    return [*wrap_text(f"failed: {reason}"), *wrap_text(f"to do: {advice}")]


def _failure_origin(failure: Mapping[str, Any]) -> str:
    """Say where a run failed, to stand before the reason: `rank 3 on node7, training, step 40: `; empty without a `failure.json`.

    The message of a user's error is enough. Of any other error, the type is shown, too.
    """
    if not failure:
        return ""
    step = f", step {failure['step']}" if failure.get("step") is not None else ""
    origin = f"rank {failure.get('rank')} on {failure.get('host')}, {failure.get('phase')}{step}: "
    if not message_suffices(dict(failure)):
        origin += f"{failure.get('error')}: "
    return origin


def _checkpoint_lines(checkpoint_list: CheckpointList, damage_by_checkpoint: Mapping[Path, str] | None) -> list[str]:
    """Write the section with the table of a run's checkpoints, or why they cannot be listed.

    `damage_by_checkpoint`: what is wrong with each damaged checkpoint; None if none was verified.
    """
    if checkpoint_list.problem:
        return ["", *wrap_text(f"checkpoints: {checkpoint_list.problem}")]
    checkpoints = checkpoint_list.checkpoints
    if not checkpoints:
        return ["", "no checkpoints"]
    columns = (TableColumn(), TableColumn(is_number=True), TableColumn(is_number=True), TableColumn())
    rows = []
    for checkpoint in checkpoints:
        rows.append(_checkpoint_row(checkpoint, checkpoint_list.monitored_metric, damage_by_checkpoint))
    return ["", f"checkpoints in {checkpoints[0].path.parent}:", *format_table(columns, rows, indent=2)]


def _checkpoint_row(
    checkpoint: StoredCheckpoint, monitored_metric: str | None, damage_by_checkpoint: Mapping[Path, str] | None
) -> TableRow:
    """Make a checkpoint's row of the table: name, age, size and remarks, such as `best: eval/loss 2.3100`.

    `monitored_metric`: by which the best checkpoint is chosen; None if it is not known. `damage_by_checkpoint`: what is
    wrong with each damaged checkpoint; None if none was verified.
    """
    remarks = []
    if damage_by_checkpoint is not None:
        damage = damage_by_checkpoint.get(checkpoint.path)
        remarks.append("intact" if damage is None else f"damaged: {damage}")
    if checkpoint.best_metric is not None:
        remarks.append(f"best: {monitored_metric or 'held out'} {format_metric(checkpoint.best_metric)}")
    if checkpoint.is_given_up:  # a rollback went back to an earlier one, and moved it aside
        remarks.append(f"given up, in {checkpoint.path.parent.name}")
    notes = []
    if checkpoint.is_in_fallback_dir:  # on a line of its own, so that the directory can be pasted
        notes = wrap_text(f"    in {checkpoint.path.parent}")
    size = size_text(checkpoint.num_bytes)
    return TableRow((checkpoint.path.name, f"{age_text(checkpoint.age_s)} old", size, "; ".join(remarks)), notes)


def _loss_text(loss: float | None) -> str:
    """A loss with four decimals; one of 1000 or more, as at the start of a broken run, with four digits. `-` for None."""
    if loss is None:
        return "-"
    return format(loss, ".4f" if loss < 1000 else ".4g")


def _speed_text(tokens_per_s: float | None) -> str:
    """Tokens per second: `3.45M`, `12,345`, `98.7`; `-` for None."""
    if tokens_per_s is None:
        return "-"
    if tokens_per_s >= 1e6:
        return f"{tokens_per_s / 1e6:.2f}M"
    return format(tokens_per_s, ",.0f" if tokens_per_s >= 100 else ".1f")


def _progress_text(run: RunView) -> str:
    """The last step and the total number of steps: `300/1000`; `-` if neither is known."""
    if not run.step and not run.total_steps:
        return "-"
    return f"{_step_count_text(run.step)}/{_step_count_text(run.total_steps)}"


def _step_count_text(num_steps: int | None) -> str:
    """A number of steps: `300`, `1,200k`; `-` for None."""
    if num_steps is None:
        return "-"
    return str(num_steps) if num_steps < 1e5 else f"{num_steps / 1e3:,.0f}k"
