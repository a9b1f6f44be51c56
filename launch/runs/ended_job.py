"""How a job ended that has left the queue, by its script's record and SLURM: for runs whose ranks wrote nothing."""

from __future__ import annotations

import os
import re
import subprocess
import time
from functools import lru_cache
from pathlib import Path

from launch.runs.job_record import JobRecord, read_job_record
from launch.runs.queue import Queue, submitted_as

CALL_S = 5.0
"""Seconds that sacct and scontrol may take."""
ANSWER_S = 60.0
"""Seconds for which their answer is taken."""
JOB_FIELDS = re.compile(r"\b(JobState|Reason|ExitCode)=(\S+)")


def describe_end(run_dir: Path, queue: Queue) -> str | None:
    """How the last job of a run ended, on one line; None if it has none, or its job may still wait or run."""
    submitted = submitted_as(run_dir)
    record = read_job_record(run_dir)
    if record is not None and submitted in (None, record.job):
        return _describe_record(record, queue)
    if submitted is None or queue.has_no_squeue or queue.problem is not None:
        return None
    slurm_words = slurm_end(submitted)
    if slurm_words is None:
        return (
            f"job {submitted} is not in the queue any more, and its script never started: it was cancelled (perhaps because a "
            "job that it waited for failed), or it failed before"
        )
    return f"job {submitted} ended before its script began; SLURM says: {slurm_words}"


def _describe_record(record: JobRecord, queue: Queue) -> str | None:
    """Why the start of a job ended by its record; None if it ended well, restarts, or may still run."""
    start = f"job {record.job}, start {record.start}"
    if record.ended is not None:
        if record.code == 0 or record.will_restart:
            return None
        return f"{start}: {record.reason or 'ended'} (exit code {record.code})"
    if queue.has_no_squeue or queue.problem is not None:
        return None
    slurm_words = slurm_end(record.job)
    why = f"SLURM says: {slurm_words}" if slurm_words else "it was killed or cancelled, or its node was lost"
    return f"{start}, on {record.nodes}: ended, and its script wrote no reason; {why}"


def slurm_end(job: str) -> str | None:
    """How SLURM says that a job ended; None if it does not know."""
    return _slurm_end(job, int(time.monotonic() // ANSWER_S))


@lru_cache(maxsize=4096)
def _slurm_end(job: str, minute: int) -> str | None:
    """The same, asked again in another `minute`: the argument only makes the cache forget."""
    rows = _call(["sacct", "--jobs", job, "--allocations", "--noheader", "--parsable2", "--format=State,ExitCode"])
    if rows:
        state, _sep, code = rows.splitlines()[-1].partition("|")
        return f"{state}, exit code {code}" if state else None
    fields = dict(JOB_FIELDS.findall(_call(["scontrol", "--oneliner", "show", "job", job])))
    if "JobState" not in fields:
        return None
    reason = fields.get("Reason", "None")
    words = [fields["JobState"]] + ([reason] if reason != "None" else [])
    return f"{' '.join(words)}, exit code {fields.get('ExitCode', '-')}"


def _call(command: list[str]) -> str:
    """The output of a command of SLURM's; empty if it fails."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SACCT_")}
    try:
        answer = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", timeout=CALL_S)
    except (OSError, subprocess.SubprocessError):
        return ""
    return "" if answer.returncode else answer.stdout.strip()
