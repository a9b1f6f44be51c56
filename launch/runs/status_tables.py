"""Prints the state of runs as tables and as JSON."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.output import Column, TableRow, cut, fold, table
from launch.runs import efficiency, pipeline_jobs
from launch.runs.checkpoints import CheckpointList, StoredCheckpoint
from launch.runs.metrics_tail import loss_curve
from launch.runs.queue import Queue, QueuedJob
from launch.runs.sparkline import sparkline
from launch.runs.status import HANGS, LOST, NOT_STARTED, QUEUED, UNKNOWN, RunView, age, one_line
from strategies.atomic_io import size_text
from trainer.reporting.status import State

MOST_JOBS = 20
"""Other jobs of the user that are listed; the rest is counted."""
MOST_STARTS = 5
"""Starts of a run whose usage is shown, the newest."""
LINES_BELOW = 8
"""Lines of a watched terminal that are kept free of the table."""
CURVE_POINTS = 60
SAME_COMMAND = "the same command continues it from the newest intact checkpoint"
COLUMNS = (
    Column(),
    Column("state"),
    Column("step", is_number=True),
    Column("loss", is_number=True),
    Column("tok/s", is_number=True),
    Column("eta", is_number=True),
    Column("GiB", is_number=True),
    Column("last seen", is_number=True),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunDetails:
    """What is shown of a run if `status` is asked for it alone."""

    store: CheckpointList
    failure: dict[str, Any]
    curve: list[float]
    """The loss at some places of the run."""
    logs: Path
    starts: list[dict[str, Any]]
    """What each start of its jobs used, as `launch/runs/efficiency.py` has recorded it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StatusAnswer:
    """The runs below a directory, and the queue."""

    root: Path
    runs: list[RunView]
    queue: Queue
    is_cut: bool
    """Whether there were too many directories to search all."""
    details: RunDetails | None = None
    """More about the only run, if `root` is a run."""


def text(answer: StatusAnswer, damaged: Mapping[Path, str] | None, *, live: bool = False) -> str:
    """The page for people.

    `damaged` says by checkpoint what is wrong with it; None if none was verified. `live` adds curves to runs that train, and
    leaves out the runs that do not fit on the terminal.
    """
    if answer.details is not None:
        lines = _run_in_full(answer.runs[0], answer.details, damaged)
        if answer.queue.problem:
            lines += ["", *fold(f"queue: {answer.queue.problem}")]
        return "\n".join(lines)
    lines = _table_of_runs(answer, live=live) if answer.runs else [f"no runs below {answer.root}"]
    if damaged:
        lines += ["", *(f"damaged: {path}: {why}" for path, why in damaged.items())]
    elif damaged is not None:
        lines += ["", "all checkpoints are intact"]
    lines += _other_jobs(answer)
    if answer.queue.problem:
        lines += ["", cut(f"queue: {answer.queue.problem}")]
    return "\n".join(lines)


def _table_of_runs(answer: StatusAnswer, *, live: bool) -> list[str]:
    """A row for each run, and how many there are of each state."""
    if live:
        lines = _most_urgent_runs(answer)
    else:
        lines = table(COLUMNS, [_row(run, answer.root, live=False) for run in answer.runs])
    counts = Counter(run.state for run in answer.runs)
    states = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    lines += ["", f"{len(answer.runs)} run{'s' * (len(answer.runs) != 1)}: {states}"]
    if answer.is_cut:
        lines.append(
            f"not all directories below {answer.root} were searched: there are too many; name one further down"
        )
    return lines


def _most_urgent_runs(answer: StatusAnswer) -> list[str]:
    """A table of the runs that fit on the terminal. Runs that do not fit are neither read nor drawn."""
    room = max(1, shutil.get_terminal_size((80, 24)).lines - LINES_BELOW)
    runs = sorted(answer.runs, key=_urgency)
    rows = [_row(run, answer.root, live=True) for run in runs[:room]]
    lines = table(COLUMNS, rows)
    while len(lines) > room and len(rows) > 1:
        rows.pop()
        lines = table(COLUMNS, rows)
    hidden = len(runs) - len(rows)
    return [*lines, f"... and {hidden} more"] if hidden else lines


def _row(run: RunView, root: Path, *, live: bool) -> TableRow:
    """The table's row of a run, with where it runs and why it is in its state below it; `live`: also its loss curve."""
    is_below_root = run.directory.is_relative_to(root) and run.directory != root
    name = run.directory.relative_to(root) if is_below_root else run.directory
    cells = (
        str(name),
        run.state,
        _step(run),
        _loss(run.loss),
        _rate(run.tokens_per_s),
        clock(run.left_s),
        _number(run.memory_gib, ".3g"),
        "-" if run.last_seen_s is None else age(run.last_seen_s),
    )
    notes = []
    where_and_why = _where_and_why(run)
    if where_and_why:
        notes.append(cut(f"  {where_and_why}"))
    if live and run.state == State.running:
        losses = loss_curve(run.directory / "metrics.jsonl", CURVE_POINTS)
        if losses:
            notes.append(f"  {sparkline(losses)}")
    return TableRow(cells, notes)


def _urgency(run: RunView) -> tuple[int, float]:
    """Sort key if not all runs may fit: those that train, wait, or need somebody; then those that ended last."""
    order = (State.running, QUEUED, LOST)
    rank = order.index(run.state) if run.state in order else len(order)
    return rank, run.last_seen_s if run.last_seen_s is not None else math.inf


def _where_and_why(run: RunView) -> str:
    """The line below a run's row: where it runs, and why it does not."""
    if run.state in (State.done, NOT_STARTED) and not run.why:
        return ""
    where = []
    if run.state == State.running and run.host:
        where.append(f"on {run.host}")
    if run.state in (State.running, LOST) and run.job_id:
        # A job that is not RUNNING although its run is: suspended, or about to be ended.
        state = "" if run.job is None or run.job.state == "RUNNING" else f" {run.job.state}"
        where.append(f"job {run.job_id}{state}")
    if run.restarts and run.state != State.done:
        where.append(f"{run.restarts} restart{'s' if run.restarts > 1 else ''}")
    return ": ".join(part for part in (", ".join(where), run.why) if part)


def _other_jobs(answer: StatusAnswer) -> list[str]:
    """The user's jobs in the queue that belong to none of the runs."""
    run_jobs = _jobs_of_runs(answer)
    others = [job for job in answer.queue.jobs if job.id not in run_jobs]
    if not others:
        return []
    lines = ["", "other jobs of yours in the queue:"]
    lines += [cut(f"  {job.description}  ({job.name})") for job in others[:MOST_JOBS]]
    lines += [f"  and {len(others) - MOST_JOBS} more"] if len(others) > MOST_JOBS else []
    return lines


def _jobs_of_runs(answer: StatusAnswer) -> set[str]:
    """Jobs of the queue that are shown with their runs."""
    jobs = set()
    for run in answer.runs:
        if run.job is not None:
            jobs.add(run.job.id)
        jobs.update(part.job for part in run.parts)
    return jobs


def _run_in_full(run: RunView, details: RunDetails, damaged: Mapping[Path, str] | None) -> list[str]:
    """The page of one run: facts, what to do next, checkpoints, logs."""
    share = f" ({run.step / run.total:.1%})" if run.step and run.total else ""
    lines = [f"{run.directory}: {run.state}, step {_step(run)}{share}"]
    lines += fold(f"  {run.why}") if run.why and run.state != State.failed else []
    facts = [*_training_facts(run, details), *_job_facts(run, details)]
    lines += table((Column(), Column()), [TableRow(fact) for fact in facts], indent=2)
    lines += _next_steps(run, details.failure)
    lines += _checkpoints(details.store, damaged)
    if details.logs.is_dir():
        lines += ["", f"logs: {details.logs}"]
    return lines


def _training_facts(run: RunView, details: RunDetails) -> list[tuple[str, str]]:
    """(name, text) of loss, held-out metrics, speed and memory, as far as the run has written them."""
    facts = []
    if run.loss is not None:
        facts.append(("loss", f"{run.loss:.4f}  {sparkline(details.curve)}"))
    if run.evaluated:
        step = run.evaluated.get("step")
        metrics = ", ".join(f"{key} {metric:.4f}" for key, metric in run.evaluated.items() if key != "step")
        facts.append(("held out", metrics if step is None else f"{metrics} (step {step:.0f})"))
    if run.tokens_per_s is not None:
        pace = f", {run.step_s:.3g} s a step" if run.step_s is not None else ""
        left = f", {clock(run.left_s)} left" if run.left_s is not None else ""
        facts.append(("rate", f"{_rate(run.tokens_per_s)} tokens/s{pace}{left}"))
    if run.memory_gib is not None:
        facts.append(("memory", f"{run.memory_gib:.3g} GiB, the largest peak of a rank"))
    return facts


def _job_facts(run: RunView, details: RunDetails) -> list[tuple[str, str]]:
    """Who runs it or did, its job in the queue, what its starts took, and the jobs of its chain."""
    facts = []
    if runner := ", ".join(_runner(run)):
        facts.append(("run by", runner))
    if run.restarts:
        facts.append(("restarts", str(run.restarts)))
    if run.job is not None and run.state != QUEUED:
        # squeue says INVALID of a job that is past its limit, and is about to be ended for it.
        left = "past its time limit" if run.job.time_left == "INVALID" else f"{run.job.time_left} left"
        facts.append(("queue", f"{run.job.description}, {left} on {run.job.nodes}"))
    facts += [("used", efficiency.describe_start(start)) for start in details.starts[-MOST_STARTS:]]
    for part in run.parts:
        facts.append((part.part, f"job {part.job}: {part.description.removeprefix(f'job {part.job} ')}"))
    return facts


def _runner(run: RunView) -> list[str]:
    """Which process or job runs the run or did, and when it was last seen."""
    words = []
    if run.host:
        words.append(f"process {run.pid} on {run.host}")
    if run.job_id:
        words.append(f"job {run.job_id}")
    if run.since:
        words.append(f"since {run.since}")
    if run.last_seen_s is not None:
        event = "last seen" if run.state in (State.running, LOST, UNKNOWN) else "ended"
        words.append(f"{event} {age(run.last_seen_s)} ago")
    return words


def _next_steps(run: RunView, failure: Mapping[str, Any]) -> list[str]:
    """Why the run does not train, and what its user can do."""
    if run.state == State.failed:
        return ["", *_failure_and_way_out(run, failure)]
    if run.state == LOST:
        stop_first = "stop it, then " if run.why and HANGS in run.why else ""
        return ["", *fold(f"to do: {stop_first}{SAME_COMMAND}")]
    if run.state != State.preempted:
        return []
    if run.job is not None and run.job.state == "RUNNING":
        return ["", f"{run.job.description} starts it again"]
    return ["", *fold(f"to do: {SAME_COMMAND}")]


def _failure_and_way_out(run: RunView, failure: Mapping[str, Any]) -> list[str]:
    """Why a run failed, and what to do so that it continues."""
    broken_part = pipeline_jobs.failed_part(list(run.parts))
    if broken_part is not None and not failure:
        way_out = f"shardtune logs {run.directory} job={broken_part.job} says why; submit the same words again"
        return [*fold(f"failed: {run.why}"), *fold(f"to do: {way_out}")]
    where = ""
    if failure:
        step = f", step {failure['step']}" if failure.get("step") is not None else ""
        where = f"rank {failure.get('rank')} on {failure.get('host')}, {failure.get('phase')}{step}: "
        where += "" if failure.get("user_error") else f"{failure.get('error')}: "
    # Any other word of `retry` means that the same command may succeed.
    fails_again = failure.get("retry") in (None, "out_of_memory")
    if failure.get("user_error") and fails_again:
        way_out = "change what the message says; the same command then continues it"
    elif failure and fails_again:
        way_out = f"the traceback is in {run.directory / 'failure.json'}"
    elif run.step:
        way_out = SAME_COMMAND
    else:
        way_out = f"shardtune logs {run.directory} shows its output; submit the same words again"
    return [*fold(f"failed: {where}{run.why or 'no reason was recorded'}"), *fold(f"to do: {way_out}")]


def _checkpoints(store: CheckpointList, damaged: Mapping[Path, str] | None) -> list[str]:
    if store.problem:
        return ["", *fold(f"checkpoints: {store.problem}")]
    if not store.checkpoints:
        return ["", "no checkpoints"]
    columns = (Column(), Column(is_number=True), Column(is_number=True), Column())
    rows = [_checkpoint_row(checkpoint, store.watch, damaged) for checkpoint in store.checkpoints]
    return ["", f"checkpoints in {store.checkpoints[0].path.parent}:", *table(columns, rows, indent=2)]


def _checkpoint_row(
    checkpoint: StoredCheckpoint, watched_metric: str | None, damaged: Mapping[Path, str] | None
) -> TableRow:
    """The table's row of a checkpoint. `damaged`: what is wrong with each damaged one; None if that was not checked."""
    remarks = []
    if damaged is not None:
        damage = damaged.get(checkpoint.path)
        remarks.append("intact" if damage is None else f"damaged: {damage}")
    if checkpoint.best is not None:
        remarks.append(f"best: {watched_metric or 'held out'} {checkpoint.best:.4f}")
    if checkpoint.given_up:
        remarks.append(f"given up, in {checkpoint.path.parent.name}")
    # A directory stands on a line of its own, so that it can be pasted.
    place = fold(f"    in {checkpoint.path.parent}") if checkpoint.elsewhere else []
    size = size_text(checkpoint.size)
    return TableRow((checkpoint.path.name, f"{age(checkpoint.age_s)} old", size, "; ".join(remarks)), place)


def _number(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)


def _loss(loss: float | None) -> str:
    return _number(loss, ".4f" if loss is not None and loss < 1000 else ".4g")


def _rate(per_second: float | None) -> str:
    if per_second is None:
        return "-"
    if per_second >= 1e6:
        return f"{per_second / 1e6:.2f}M"
    return format(per_second, ",.0f" if per_second >= 100 else ".1f")


def _step(run: RunView) -> str:
    """Steps that were taken, and all: `300/1000`."""
    if not run.step and not run.total:
        return "-"
    return f"{_steps(run.step)}/{_steps(run.total)}"


def _steps(steps: int | None) -> str:
    if steps is None:
        return "-"
    return str(steps) if steps < 1e5 else f"{steps / 1e3:,.0f}k"


def clock(seconds: float | None) -> str:
    """Hours, minutes and seconds; days and hours from 100 hours on."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    total = int(seconds)
    if total >= 100 * 3600:
        return f"{total // 86400} d {total % 86400 // 3600} h"
    return f"{total // 3600}:{total % 3600 // 60:02d}:{total % 60:02d}"


def as_dict(answer: StatusAnswer, damaged: Mapping[Path, str] | None) -> dict[str, Any]:
    """The same as JSON values: seconds, GiB, bytes, tokens a second of all ranks together."""
    run_jobs = _jobs_of_runs(answer)
    runs = [_run_as_dict(run) for run in answer.runs]
    if answer.details is not None:
        runs[0] |= _details_as_dict(answer.details, damaged or {})
    fields: dict[str, Any] = {"directory": str(answer.root), "runs": runs}
    if damaged is not None:
        fields["damaged"] = {str(path): why for path, why in damaged.items()}
    fields["other_jobs"] = [_job_as_dict(job) for job in answer.queue.jobs if job.id not in run_jobs]
    fields["queue_problem"] = answer.queue.problem
    fields["all_searched"] = not answer.is_cut
    return fields


def _details_as_dict(details: RunDetails, damaged: Mapping[Path, str]) -> dict[str, Any]:
    """What `status --json` has of a run beyond its row, if the run alone was asked for."""
    checkpoints = []
    for checkpoint in details.store.checkpoints:
        row = asdict(checkpoint) | {"path": str(checkpoint.path), "damage": damaged.get(checkpoint.path)}
        checkpoints.append(row)
    return {
        "failure": details.failure or None,
        "watch": details.store.watch,
        "checkpoints": checkpoints,
        "starts": details.starts,
        "checkpoints_problem": details.store.problem,
    }


def _run_as_dict(run: RunView) -> dict[str, Any]:
    fields = asdict(run)
    fields |= {"directory": str(run.directory), "why": one_line(run.why), "left_s": run.left_s}
    fields["job"] = None if run.job is None else _job_as_dict(run.job)
    return fields


def _job_as_dict(job: QueuedJob) -> dict[str, str]:
    return {
        "id": job.id,
        "state": job.state,
        "reason": job.reason,
        "name": job.name,
        "start": job.start,
        "left": job.time_left,
    }
