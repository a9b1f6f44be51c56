"""Finds runs and reads their state from a few small files each: fast enough for hundreds on a slow file system.

Files may be incomplete, torn, empty or unreadable: the run still gets a row, with what is known. Only a missing root
directory raises.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from launch.runs import job_record, metrics_tail
from launch.runs.ended_job import ended_job_text
from launch.runs.owner import LeaseHolder, read_lease_holder
from launch.runs.pipeline_jobs import PipelinePart, first_failed_part, pipeline_parts
from launch.runs.queue import SUBMITTED_FILE, JobQueue, QueuedJob, unfinished_job_id
from strategies import atomic_io
from trainer.reporting.run_record import RunRecord, readable_run_record
from trainer.reporting.status import RunState, read_failure, read_status

MAX_DEPTH = 4
"""Levels of directories below the named one in which runs are searched."""
MAX_DIRECTORIES = 5000
"""The search ends after so many directories, and says so: somebody may have named a home directory."""
PARALLEL_READS = 16
"""Runs that are read at the same time: on a slow file system, most of the time is waiting."""
CONFIG_HASH_LINE = b"# sha256: "
"""A line at the head of every `config.yaml` that shardtune froze."""
LOST = "lost"
"""The states LOST, QUEUED, UNKNOWN and NOT_STARTED are concluded here; those of `RunState` are in the run's `status.json`."""
QUEUED = "queued"
UNKNOWN = "unknown"
NOT_STARTED = "not started"
ENDED_STATES = (RunState.done, RunState.failed, RunState.preempted)
HANGING_REASON = "it was stopped, or hangs"
"""Reason of a run that is lost although its process lives. It must be stopped before it can continue."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunView:
    """The state of one run now; what is not known is None."""

    directory: Path
    state: str
    """`running`, `done`, `failed`, `preempted`, `lost` (its status says running, without a heartbeat), `queued`,
    `not started`, `unknown`."""
    state_reason: str | None = None
    """Why it is in this state, on one line."""
    step: int | None = None
    """The last optimizer step."""
    total_steps: int | None = None
    """Optimizer steps of the whole run."""
    loss: float | None = None
    tokens_per_s: float | None = None
    """Median over the last steps, all ranks together."""
    seconds_per_step: float | None = None
    """Median over the last steps."""
    memory_gib: float | None = None
    """The largest peak of a rank in the last steps."""
    last_evaluation: dict[str, float] = field(default_factory=dict)
    """Held-out metrics of the last evaluation by name, with its `step`; empty if it is not among the last rows."""
    restarts: int = 0
    """How often it was started again."""
    host: str | None = None
    pid: int | None = None
    job_id: str | None = None
    attempt_began_at: str | None = None
    """When the present attempt began, by its host's clock."""
    last_seen_s: float | None = None
    """Seconds since the last heartbeat; of a run that has ended, since its end."""
    job: QueuedJob | None = None
    """Its job in the queue."""
    pipeline_parts: tuple[PipelinePart, ...] = ()
    """The jobs of its pipeline, if it was submitted as one (`prepare`, `train`, `evaluate` ...)."""

    @property
    def remaining_s(self) -> float | None:
        """Seconds until the last step, at the speed of recent steps; None if the run is not running, or this is not known."""
        if (
            self.state != RunState.running
            or self.step is None
            or self.total_steps is None
            or self.seconds_per_step is None
        ):
            return None
        return max(0, self.total_steps - self.step) * self.seconds_per_step


@dataclass(slots=True)
class RunSearch:
    """The result of a search for runs below a directory."""

    runs: list[Path] = field(default_factory=list)
    unreadable: dict[Path, str] = field(default_factory=dict)
    """{directory that cannot be listed: why not}; any of them may hold runs."""
    stopped_early: bool = False
    """Whether the search stopped early, after `MAX_DIRECTORIES` directories."""


def find_runs(root: Path) -> RunSearch:
    """Find the runs in `root` and in the directories below it; the result has them in the order of their names.

    A directory with a `config.yaml` is a run, and nothing below it is searched. Raises OSError if `root` cannot be listed.
    """
    search = RunSearch()
    num_directories_read = 0
    # Level by level, so that a search that stops early has found the runs nearest to `root`.
    directories_of_level = [root]
    for depth in range(MAX_DEPTH + 1):
        next_level: list[Path] = []
        for directory in directories_of_level:
            num_directories_read += 1
            if num_directories_read > MAX_DIRECTORIES:
                search.stopped_early = True
                break
            try:
                with os.scandir(directory) as scan:
                    entry_by_name = {entry.name: entry for entry in scan}
            except OSError as error:
                if directory == root:
                    raise
                search.unreadable[directory] = error.strerror or str(error)
                continue
            if "config.yaml" in entry_by_name:
                search.runs.append(directory)
            elif depth < MAX_DEPTH:
                next_level += [directory / name for name, entry in entry_by_name.items() if _may_hold_runs(entry, root)]
        directories_of_level = sorted(next_level, key=lambda path: number_aware_order(path.name))
    search.runs.sort(key=lambda path: [number_aware_order(name) for name in path.parts])
    return search


def number_aware_order(name: str) -> tuple[int, str]:
    """Sort key of file names with 2 before 10: the points of `train -m` are called 0, 1, ... 10. Other names come first."""
    number = int(name) if name.isdecimal() else -1
    return (number, name)


def _may_hold_runs(entry: os.DirEntry[str], root: Path) -> bool:
    """Whether the search for runs looks into a directory entry. It looks into every directory, except

    - hidden ones,
    - links to a directory below `root`, because the search meets that directory anyway,
    - links that lead to themselves, and what cannot be read.
    """
    if entry.name.startswith("."):
        return False
    try:
        if entry.is_symlink() and Path(entry.path).resolve().is_relative_to(root.resolve()):
            return False
        return entry.is_dir()
    except (OSError, RuntimeError):  # RuntimeError: a link that leads to itself
        return False


def read_run_views(search: RunSearch, queue: JobQueue) -> list[RunView]:
    """Read the state of each run that a search found, then add a row of state `unknown` for each directory that cannot be read.

    A directory whose `config.yaml` is not shardtune's is left out if nothing was started in it. `search.unreadable`: by
    directory, why it could not be searched.
    """
    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        views = list(pool.map(lambda run_dir: read_run_view(run_dir, queue), search.runs))
    # A file config.yaml alone makes no run: another program may have written it.
    views = [view for view in views if view.state != NOT_STARTED or has_shardtune_config(view.directory)]
    for path, reason in search.unreadable.items():
        views.append(RunView(directory=path, state=UNKNOWN, state_reason=f"cannot be read: {reason}"))
    return views


def read_run_view(run_dir: Path, queue: JobQueue) -> RunView:
    """Find out the state of one run now, from its files and from SLURM's queue.

    The files are its status, its lease (the claim and the heartbeats of the process that trains it), `run.json`, and the
    end of its metrics. Never raises: what cannot be read is left out, or is the reason of the state `unknown`.
    """
    # What the run's own files and SLURM's queue say of it.
    status = read_status(run_dir)
    lease_problem = None
    try:
        lease_holder = read_lease_holder(run_dir)
    except (OSError, ValueError) as error:
        lease_holder = LeaseHolder(attempt_number=0, owner=None, is_alive=None, heartbeat_age_s=None)
        lease_problem = f"its lease cannot be read: {atomic_io.error_summary(error)}"
    owner = lease_holder.owner
    # A run that never started has no run.json: one file less to look for on a slow file system.
    has_started = status.get("state") is not None or lease_holder.attempt_number > 0
    record = readable_run_record(run_dir) if has_started else RunRecord()
    job_id = _text_or_none(owner.job if owner is not None else record.slurm_job_id)
    job = queue.find_job(run_dir, job_id)
    parts = pipeline_parts(run_dir, queue)

    # Its state. Each source may correct the one before: files of the run, its last job, the other jobs of its pipeline.
    state, why = _state_from_files(run_dir, status, lease_holder, job)
    if job is None and state in (LOST, NOT_STARTED):
        state, why = _correct_state_by_last_job(run_dir, queue, state, why)
    state, why = _correct_state_by_pipeline(parts, state, why)
    if lease_problem and state == LOST:  # only the lease could have said whether it is lost
        state = UNKNOWN
        why = lease_problem

    # Who runs it, and the last heartbeat: while an attempt holds the lease, the lease says so; afterwards the status does.
    host = _text_or_none(status.get("host"))
    pid = _int_or_none(status.get("pid"))
    attempt_began_at = None
    if owner is not None:
        host = owner.host
        pid = owner.pid
        attempt_began_at = owner.since
    last_seen_s = _status_age_s(status)
    if owner is not None and state in (RunState.running, LOST):
        last_seen_s = lease_holder.heartbeat_age_s

    # How far it is, from the last rows of its metrics. Rows of evaluations have no loss.
    rows = metrics_tail.read_last_rows(run_dir / "metrics.jsonl")
    step_rows = [row for row in rows if "loss" in row]
    steps_reached = [status.get("step")]
    loss = None
    if step_rows:
        steps_reached.append(step_rows[-1]["step"])
        loss = metrics_tail.finite_number(step_rows[-1], "loss")
    memory_peaks = [metrics_tail.finite_number(row, "memory_gib") for row in step_rows]
    return RunView(
        directory=run_dir,
        state=state,
        state_reason=why or lease_problem,
        step=max((step for step in steps_reached if isinstance(step, int)), default=None),
        total_steps=record.total_steps or None,
        loss=loss,
        tokens_per_s=metrics_tail.recent_median(step_rows, "tokens_per_s"),
        seconds_per_step=metrics_tail.recent_median(step_rows, "step_s"),
        memory_gib=max((peak for peak in memory_peaks if peak is not None), default=None),
        last_evaluation=_last_held_out_metrics(rows),
        restarts=max(_int_or_none(status.get("restart")) or 0, lease_holder.attempt_number - 1),
        host=host,
        pid=pid,
        job_id=job.id if job is not None else job_id,
        attempt_began_at=attempt_began_at,
        last_seen_s=last_seen_s,
        job=job,
        pipeline_parts=tuple(parts),
    )


class StateAndReason(NamedTuple):
    """The state of a run, in the words of `RunView.state`, and why it is in this state on one line, or None."""

    state: str
    reason: str | None


def _state_from_files(
    run_dir: Path, status: dict[str, Any], lease_holder: LeaseHolder, job: QueuedJob | None
) -> StateAndReason:
    """Conclude the state of a run from its own files and its job in the queue. The first case that applies:

    - Its job waits in the queue, and it is not done: queued.
    - Its status says running, or it holds its lease (a run that starts has no status yet): running, or lost without
      heartbeats.
    - Its status says that it has ended: done, failed or preempted.
    - It has a `failure.json`: failed.
    - Its `status.json` cannot be read: unknown.
    - Otherwise it has not started.

    `status`: its `status.json`, {"state": "running", "reason": ..., ...}; empty without one. `lease_holder`: the process
    that claims the run, and how old its last heartbeat is.
    """
    recorded_state = status.get("state")
    if job is not None and job.is_pending and recorded_state != RunState.done:
        return StateAndReason(QUEUED, job.description)
    is_starting = recorded_state not in ENDED_STATES and lease_holder.owner is not None
    if recorded_state == RunState.running or is_starting:
        if lease_holder.seems_to_be_running:
            return StateAndReason(RunState.running, _text_or_none(status.get("reason")))
        return StateAndReason(LOST, _lost_reason(lease_holder))
    # If the run was started again after a failure, its failure.json is out of date.
    failure = read_failure(run_dir) if recorded_state in (None, RunState.failed) else {}
    if recorded_state in ENDED_STATES:
        return StateAndReason(str(recorded_state), one_line(failure.get("message") or status.get("reason")))
    if failure:
        return StateAndReason(RunState.failed, one_line(failure.get("message")))
    if (run_dir / "status.json").exists():
        return StateAndReason(UNKNOWN, "its status.json cannot be read")
    return StateAndReason(NOT_STARTED, job.description if job is not None else None)


def _correct_state_by_last_job(run_dir: Path, queue: JobQueue, state: str, reason: str | None) -> StateAndReason:
    """Correct the state of a run that is lost or has not started, by how its last SLURM job ended. The first case that applies:

    - It was never submitted: unchanged.
    - Its job ended: a run that has not started has failed; a lost run gets the end as a further reason.
    - Its job may still be waiting, because the queue cannot be read: the reason says so.
    - Otherwise: unchanged.

    Called for a run that has no job in the queue any more.
    """
    was_submitted = (run_dir / job_record.JOB_RECORD_FILE).exists() or (run_dir / SUBMITTED_FILE).exists()
    if not was_submitted:
        return StateAndReason(state, reason)
    end = ended_job_text(run_dir, queue)
    if end is not None:
        if state == NOT_STARTED:
            return StateAndReason(RunState.failed, end)
        return StateAndReason(state, f"{reason}; {end}" if reason else end)
    submitted_job_id = unfinished_job_id(run_dir)
    is_queue_known = not queue.problem and not queue.has_no_squeue
    if submitted_job_id is None or is_queue_known:
        return StateAndReason(state, reason)
    queue_problem = queue.problem or "this host has no squeue"
    doubt = f"was submitted as job {submitted_job_id}; whether it still waits or runs is not known: {queue_problem}"
    return StateAndReason(state, f"{reason}; {doubt}" if reason else doubt)


def _correct_state_by_pipeline(parts: list[PipelinePart], state: str, reason: str | None) -> StateAndReason:
    """Correct the state of a run by the other jobs of its pipeline, which prepare its data or evaluate it, for example.

    If one of them failed, the reason names it, and a run that has not begun has failed. Otherwise the state is unchanged.
    """
    failed_part = first_failed_part(parts)
    if failed_part is None or failed_part.part == "train":
        return StateAndReason(state, reason)
    corrected_reason = f"{failed_part.part} (job {failed_part.job}) {failed_part.description}"
    if reason and state != NOT_STARTED:
        corrected_reason += f"; {reason}"
    has_not_begun = state in (NOT_STARTED, QUEUED)
    return StateAndReason(RunState.failed if has_not_begun else state, corrected_reason)


def _lost_reason(lease_holder: LeaseHolder) -> str:
    """Say why a run is lost: it has not ended by its own account, and does not seem to run. The first case that applies:

    - No process holds the lease: it ended without a message.
    - The process is on this host and has ended: it was killed.
    - The process is on this host and lives, without heartbeats: it was stopped, or hangs.
    - The process is on another host: since when it sends no heartbeat.

    `lease_holder`: the process that claims the run, and how old its last heartbeat is.
    """
    owner = lease_holder.owner
    if owner is None:
        return "ended without a message: its status says running, but no process runs it"
    process = f"process {owner.pid} on {owner.host}"
    silence = "never sent a heartbeat"
    if lease_holder.heartbeat_age_s is not None:
        silence = f"no heartbeat for {age_text(lease_holder.heartbeat_age_s)}"
    if lease_holder.is_alive is False:
        return f"{process} ended without a message (killed, or its host went down)"
    if lease_holder.is_alive:
        return f"{process} lives, but {silence}: {HANGING_REASON}"
    return f"{silence} from {process}"


def has_shardtune_config(run_dir: Path) -> bool:
    """Whether shardtune wrote the `config.yaml` of a directory; True also if the file cannot be read."""
    try:
        with atomic_io.open_regular_file(run_dir / "config.yaml") as (descriptor, _):
            return CONFIG_HASH_LINE in os.pread(descriptor, 4096, 0)
    except OSError:
        return True


def _last_held_out_metrics(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The metrics of the last evaluation among the last rows of `metrics.jsonl`: {"step": 40, "eval/loss": 2.31}.

    Metrics that are not finite are left out. Empty if none of the rows is of an evaluation.
    """
    evaluation_rows = [row for row in rows if "loss" not in row]  # only a row of a training step has `loss`
    if not evaluation_rows:
        return {}
    last_row = evaluation_rows[-1]
    metrics = {}
    for name in last_row:
        value = metrics_tail.finite_number(last_row, name)
        if name not in ("tokens", "epoch") and value is not None:
            metrics[name] = value
    return metrics


def _status_age_s(status: dict[str, Any]) -> float | None:
    """Seconds since `status.json` was written; None if it does not say when."""
    written_at = status.get("time")
    if not isinstance(written_at, int | float):
        return None
    return max(0.0, time.time() - written_at)


def _int_or_none(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text_or_none(value: Any) -> str | None:
    return None if value is None else str(value)


def one_line(message: Any) -> str | None:
    """A message with its lines joined to one; None if it is empty or None."""
    return " ".join(str(message).split()) if message else None


def age_text(seconds: float) -> str:
    """A duration rounded to one unit: `119 s`, `89 min`, `47 h`, `3 d`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.0f} h"
    return f"{seconds / 86400:.0f} d"
