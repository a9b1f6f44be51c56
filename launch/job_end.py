"""The end of a job's start: whether it is requeued, and how often; and which job this is.

What an earlier start left is told apart by the job's id and the number of its start, never by a clock.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch import efficiency, pipeline_part
from strategies.errors import ConfigError, StorageError
from trainer.records.status import State, read_failure, read_status, restart_count

AGAIN = {"node_fail": ("a rank was lost", "lost"), "out_of_memory": ("a rank ran out of memory", "out-of-memory")}
"""Why a job may be requeued whose run has not saved, in words, and what the file that counts it is called."""


@dataclass(frozen=True, slots=True)
class JobStart:
    """This start of this job."""

    name: str
    """As scontrol takes it; in an array a bare job id can mean all its tasks."""
    id: str
    restart: int
    nodes: list[str] = field(default_factory=list)
    """Its hosts, in SLURM's order."""

    @classmethod
    def here(cls) -> JobStart:
        """The job of this process. Raises ConfigError outside a job."""
        env = os.environ
        if "SLURM_JOB_ID" not in env:
            raise ConfigError("SLURM_JOB_ID: not set; this is for job scripts of SLURM")
        array = env.get("SLURM_ARRAY_JOB_ID")
        name = f"{array}_{env.get('SLURM_ARRAY_TASK_ID')}" if array else env["SLURM_JOB_ID"]
        return cls(name, env["SLURM_JOB_ID"], int(env.get("SLURM_RESTART_COUNT") or 0), hosts_of_job())

    def wrote(self, record: dict[str, Any]) -> bool:
        """Whether a record is of this start."""
        return (record.get("job"), record.get("restart")) == (self.id, restart_count())


def hosts_of_job() -> list[str]:
    """The job's hosts, in the order in which SLURM numbers them. Raises ConfigError."""
    listed = os.environ.get("SLURM_JOB_NODELIST", "")
    try:
        command = ["scontrol", "show", "hostnames", listed]
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"SLURM_JOB_NODELIST={listed}: scontrol cannot tell its hosts ({error})") from error
    if not found:
        raise ConfigError(f"SLURM_JOB_NODELIST={listed}: scontrol names no host")
    return found


def lost(logs: Path, job: JobStart, limit: int, how: str = "lost") -> bool:
    """Count one more start whose rank or node was `lost`; whether there may be another. Errors: StorageError."""
    count = logs / f"{how}-{job.name}"
    try:
        with count.open("a", encoding="utf-8") as file:
            file.write(f"{job.restart}\n")
        return len(count.read_text(encoding="utf-8").splitlines()) <= limit
    except OSError as error:
        raise StorageError(f"{count}: cannot be written ({error.strerror or error}); free space") from error


def end(code: int, stopped: bool) -> int:
    """Requeue where the run wants it and may; the job's exit code. `stopped`: whether TERM came to the script."""
    job, run_dir = JobStart.here(), Path(os.environ["SHARDTUNE_RUN_DIR"])
    print(efficiency.record(run_dir, job.name, job.restart, code), flush=True)
    requeued, code = _settle(job, run_dir, code, stopped)
    if not requeued:
        pipeline_part.ended("train", run_dir, code)
    return code


def _settle(job: JobStart, run_dir: Path, code: int, stopped: bool) -> tuple[bool, int]:
    """(whether the job was requeued, its exit code)."""
    status, failure = read_status(run_dir), read_failure(run_dir)
    saved = job.wrote(status) and status.get("state") == State.preempted
    cause = "preempted" if saved else failure.get("retry") if job.wrote(failure) else None
    limit = int(os.environ.get(f"retry_{cause}") or 0)
    if saved:
        if _by_slurm(job, stopped):
            print(f"job {job.name}: stopped by SLURM or by scancel, state saved; not requeued from here")
        elif job.restart >= limit:
            print(
                f"job {job.name}: state saved; not requeued, since it restarted {job.restart} times already (limit {limit})"
            )
            return False, 75
        else:
            return _requeue(job, "state saved"), code
    elif cause in AGAIN:  # never after an error of the run itself
        why, counted = AGAIN[cause]
        if _by_slurm(job, stopped):
            print(f"job {job.name}: stopped by SLURM or by scancel, and {why}; not requeued from here")
        elif not lost(run_dir / "logs", job, limit, counted):
            print(f"job {job.name}: {why}; not requeued, since that happened more than {limit} times")
        else:
            return _requeue(job, why) if cause == "node_fail" else _requeue_lowered(job, run_dir, why), code
    return False, code


def _requeue_lowered(job: JobStart, run_dir: Path, why: str) -> bool:
    from launch.lowered import lower_micro

    if (lowered := lower_micro(run_dir)) is None:
        print(f"job {job.name}: {why}; not requeued, since batch.micro cannot be halved")
        return False
    return _requeue(job, f"{why}, {lowered}")


def _by_slurm(job: JobStart, stopped: bool) -> bool:
    """Whether SLURM ends the job, or requeues it by itself: asking for it as well would run it once too often."""
    if stopped:
        return True
    shown = subprocess.run(["scontrol", "show", "job", job.name], capture_output=True, text=True).stdout
    return any(word.startswith("PreemptTime=") and word[12:13].isdigit() for word in shown.split())


def _requeue(job: JobStart, why: str) -> bool:
    """Whether SLURM took it."""
    print(f"job {job.name}: {why}; requeued", flush=True)
    done = subprocess.run(["scontrol", "requeue", job.name], capture_output=True, text=True)
    if done.returncode:
        print(f"job {job.name}: scontrol requeue failed: {(done.stderr or done.stdout).strip()}", flush=True)
    return done.returncode == 0
