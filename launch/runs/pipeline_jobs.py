"""Reads the pipeline of jobs that a run was submitted as (prepare, train, evaluate ...), and the state of each job."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from launch.runs.queue import JobQueue
from strategies import atomic_io

PIPELINE_FILE = "pipeline.json"
"""The file in a run's directory that lists the jobs of its pipeline."""
PART_RESULTS_DIRECTORY = "pipeline"
"""The directory in a run's directory with a file for each part that has ended."""
MAX_FILE_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class PipelinePart:
    """One job of a pipeline, and its state. The field names are keys of `status --json`."""

    part: str
    """Its name: `prepare`, `train`, `evaluate` ..."""
    job: str
    """The id of its job."""
    state: str
    """`queued`, `running`, `done`, `failed`, `cancelled` (one before it failed), or `unknown`."""
    description: str
    """The state as a clause for people, such as `failed with exit code 65`."""


def pipeline_parts(run_dir: Path, queue: JobQueue) -> list[PipelinePart]:
    """Read the jobs of a run's pipeline (prepare, train, evaluate ...), in order, with their states. Never raises.

    Empty if the run was not submitted as a pipeline.
    """
    parts: list[PipelinePart] = []
    if not (run_dir / PIPELINE_FILE).exists():
        return parts
    entries = _read_json(run_dir / PIPELINE_FILE)
    if not isinstance(entries, list):
        return parts
    for entry in entries:
        if isinstance(entry, dict) and {"part", "job"} <= entry.keys():
            previous_state = parts[-1].state if parts else None  # if that failed, SLURM never starts this one
            parts.append(_read_pipeline_part(run_dir, queue, str(entry["part"]), str(entry["job"]), previous_state))
    return parts


def _read_pipeline_part(
    run_dir: Path, queue: JobQueue, name: str, job_id: str, previous_state: str | None
) -> PipelinePart:
    """Find out the state of one job of a pipeline. The first case that applies:

    - It left a file with its exit code: done or failed.
    - Its job is in the queue: queued or running.
    - The previous part failed or was cancelled: cancelled, as SLURM does.
    - The queue cannot be read: unknown.
    - Otherwise its job has ended without a file: failed.

    `name`: such as `evaluate`. `previous_state`: that of the previous part; None for the first one.
    """

    def part_in_state(state: str, description: str) -> PipelinePart:
        return PipelinePart(part=name, job=job_id, state=state, description=description)

    result = _read_json(run_dir / PART_RESULTS_DIRECTORY / f"{name}.json")
    if isinstance(result, dict) and result.get("job") == job_id:  # else the file is of an earlier submission
        exit_code = result.get("code")
        if exit_code:
            return part_in_state("failed", f"failed with exit code {exit_code}")
        if exit_code is not None:
            return part_in_state("done", "done")
    for job in queue.jobs:
        if job_id in (job.id, job.raw_id):
            return part_in_state("queued" if job.is_pending else "running", job.description)
    if previous_state in ("failed", "cancelled"):
        return part_in_state("cancelled", "cancelled, since one before it failed")
    if queue.problem:
        return part_in_state("unknown", queue.problem)
    return part_in_state("failed", "ended without a message (cancelled, out of time, or stopped before it began)")


def first_failed_part(parts: list[PipelinePart]) -> PipelinePart | None:
    """The part at which a pipeline failed; None if none has. The parts after it are cancelled."""
    return next((part for part in parts if part.state == "failed"), None)


def _read_json(path: Path) -> object:
    """The JSON value in a file; None if it cannot be read."""
    try:
        return json.loads(atomic_io.read_bytes(path, max_bytes=MAX_FILE_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
