"""Finds out how a job ended that has left the queue, from its script's record and SLURM, if its ranks wrote nothing."""

from __future__ import annotations

import os
import re
import subprocess
import time
from functools import lru_cache
from pathlib import Path

from launch.runs.job_record import JobRecord, read_job_record
from launch.runs.queue import JobQueue, read_submitted_job_id

SLURM_TIMEOUT_S = 5.0
"""Seconds that sacct and scontrol may take."""
SLURM_CACHE_S = 60.0
"""Seconds for which an answer of SLURM's is kept: `status --watch` would ask every two seconds for each run."""
JOB_FIELD_REGEX = re.compile(r"\b(JobState|Reason|ExitCode)=(\S+)")
"""A field of what `scontrol show job` prints."""


def ended_job_text(run_dir: Path, queue: JobQueue) -> str | None:
    """Explain how the last SLURM job of a run ended, on one line; None if it had none, ended well, or may still wait or run.

    The job's script says how it ended in `job.json`. If the script never began, SLURM says it, as long as it knows the job.
    """
    submitted_job_id = read_submitted_job_id(run_dir)
    record = read_job_record(run_dir)
    # The record is of an earlier job if the run was submitted again since.
    if record is not None and submitted_job_id in (None, record.job):
        return _recorded_end_text(record, queue)
    if submitted_job_id is None or queue.has_no_squeue or queue.problem is not None:
        return None
    end = slurm_end_text(submitted_job_id)
    if end is None:
        return (
            f"job {submitted_job_id} is not in the queue any more, and its script never started: it was cancelled (perhaps "
            "because a job that it waited for failed), or it failed before"
        )
    return f"job {submitted_job_id} ended before its script began; SLURM says: {end}"


def _recorded_end_text(record: JobRecord, queue: JobQueue) -> str | None:
    """Explain how the last start of a job ended, by its `job.json`; a requeued job has several. The first case that applies:

    - An end is recorded: its reason and exit code; None if the start succeeded, or SLURM starts the job again.
    - The queue is not known: None, because the script may still be running.
    - Otherwise: that the script was killed, with what SLURM says of it.
    """
    job_and_start = f"job {record.job}, start {record.start}"
    if record.ended is not None:
        if record.code == 0 or record.will_restart:
            return None
        return f"{job_and_start}: {record.reason or 'ended'} (exit code {record.code})"
    if queue.has_no_squeue or queue.problem is not None:
        return None
    end = slurm_end_text(record.job)
    reason = f"SLURM says: {end}" if end else "it was killed or cancelled, or its node was lost"
    return f"{job_and_start}, on {record.nodes}: ended, and its script wrote no reason; {reason}"


def slurm_end_text(job_id: str) -> str | None:
    """Ask SLURM how a job ended: `FAILED NonZeroExitCode, exit code 1:0`; None if SLURM does not know the job.

    An answer is kept for `SLURM_CACHE_S` seconds.
    """
    cache_period = int(time.monotonic() // SLURM_CACHE_S)
    return _cached_slurm_end_text(job_id, cache_period)


@lru_cache(maxsize=4096)
def _cached_slurm_end_text(job_id: str, cache_period: int) -> str | None:
    """Ask SLURM how a job ended, once for each `cache_period`, which changes with time so that cached answers expire."""
    # sacct needs SLURM's accounting, which not every cluster has; scontrol forgets a job after some minutes.
    sacct_output = _slurm_output(
        ["sacct", "--jobs", job_id, "--allocations", "--noheader", "--parsable2", "--format=State,ExitCode"]
    )
    if sacct_output:
        state, _, exit_code = sacct_output.splitlines()[-1].partition("|")
        return f"{state}, exit code {exit_code}" if state else None
    scontrol_output = _slurm_output(["scontrol", "--oneliner", "show", "job", job_id])
    value_by_field = dict(JOB_FIELD_REGEX.findall(scontrol_output))
    if "JobState" not in value_by_field:
        return None
    state = value_by_field["JobState"]
    reason = value_by_field.get("Reason", "None")
    if reason != "None":
        state += f" {reason}"
    return f"{state}, exit code {value_by_field.get('ExitCode', '-')}"


def _slurm_output(command: list[str]) -> str:
    """Run a command of SLURM and return what it prints; empty if it fails or takes longer than `SLURM_TIMEOUT_S`."""
    # The user's SACCT_FORMAT and the like would change what is printed.
    env = {name: value for name, value in os.environ.items() if not name.startswith("SACCT_")}
    try:
        completed = subprocess.run(
            command, env=env, capture_output=True, text=True, errors="replace", timeout=SLURM_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return "" if completed.returncode else completed.stdout.strip()
