"""Finds out how a job ended that has left the queue, from its script's record and SLURM, if its ranks wrote nothing."""

from __future__ import annotations

import os
import re
import subprocess
import time
from functools import lru_cache
from pathlib import Path

from launch.runs.job_record import JobRecord, read_job_record
from launch.runs.queue import Queue, read_submitted_job_id

SLURM_TIMEOUT_S = 5.0
"""Seconds that sacct and scontrol may take."""
SLURM_CACHE_S = 60.0
"""Seconds for which an answer of SLURM's is kept: `status --watch` would ask every two seconds for each run."""
JOB_FIELDS = re.compile(r"\b(JobState|Reason|ExitCode)=(\S+)")


def ended_job_text(run_dir: Path, queue: Queue) -> str | None:
    """A line on how the last SLURM job of a run ended; None if it had none, ended well, or may still wait or run.

    The job's script says it in `job.json`. If the script never began, SLURM says it, as far as it still knows the job.
    """
    submitted_job = read_submitted_job_id(run_dir)
    record = read_job_record(run_dir)
    # The record is of an earlier job if the run was submitted again since.
    if record is not None and submitted_job in (None, record.job):
        return _describe_record(record, queue)
    if submitted_job is None or queue.has_no_squeue or queue.problem is not None:
        return None
    end = slurm_end_text(submitted_job)
    if end is None:
        return (
            f"job {submitted_job} is not in the queue any more, and its script never started: it was cancelled (perhaps "
            "because a job that it waited for failed), or it failed before"
        )
    return f"job {submitted_job} ended before its script began; SLURM says: {end}"


def _describe_record(record: JobRecord, queue: Queue) -> str | None:
    """A line on how the last start of a job ended, by its `job.json`; None if it succeeded, restarts, or may still run."""
    start = f"job {record.job}, start {record.start}"
    if record.ended is not None:
        if record.code == 0 or record.will_restart:
            return None
        return f"{start}: {record.reason or 'ended'} (exit code {record.code})"
    # No end is recorded: the script was killed, or it still runs, and only the queue could tell.
    if queue.has_no_squeue or queue.problem is not None:
        return None
    end = slurm_end_text(record.job)
    reason = f"SLURM says: {end}" if end else "it was killed or cancelled, or its node was lost"
    return f"{start}, on {record.nodes}: ended, and its script wrote no reason; {reason}"


def slurm_end_text(job: str) -> str | None:
    """State, reason and exit code of an ended job, as SLURM has them; None if it does not know the job."""
    return _cached_slurm_end_text(job, int(time.monotonic() // SLURM_CACHE_S))


@lru_cache(maxsize=4096)
def _cached_slurm_end_text(job: str, cache_period: int) -> str | None:
    """`slurm_end_text`, cached. `cache_period` is only part of the cache's key: it changes with time, so that answers expire."""
    # sacct needs SLURM's accounting, which not every cluster has; scontrol forgets a job after some minutes.
    rows = _call_slurm(
        ["sacct", "--jobs", job, "--allocations", "--noheader", "--parsable2", "--format=State,ExitCode"]
    )
    if rows:
        state, _, exit_code = rows.splitlines()[-1].partition("|")
        return f"{state}, exit code {exit_code}" if state else None
    fields = dict(JOB_FIELDS.findall(_call_slurm(["scontrol", "--oneliner", "show", "job", job])))
    if "JobState" not in fields:
        return None
    state = fields["JobState"]
    reason = fields.get("Reason", "None")
    if reason != "None":
        state += f" {reason}"
    return f"{state}, exit code {fields.get('ExitCode', '-')}"


def _call_slurm(command: list[str]) -> str:
    """What a command of SLURM's prints; empty if it fails."""
    # The user's SACCT_FORMAT and the like would change what is printed.
    env = {name: value for name, value in os.environ.items() if not name.startswith("SACCT_")}
    try:
        completed = subprocess.run(
            command, env=env, capture_output=True, text=True, errors="replace", timeout=SLURM_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return "" if completed.returncode else completed.stdout.strip()
