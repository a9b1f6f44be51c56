"""Reads the pipeline of jobs that a run was submitted as (prepare, train, evaluate ...), and the state of each job."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from launch.runs.queue import Queue
from strategies import atomic_io

PIPELINE_FILE = "pipeline.json"
"""The file in a run's directory that lists the jobs of its pipeline."""
PART_RESULTS_DIRECTORY = "pipeline"
"""The directory in a run's directory with a file for each part that has ended."""
MAX_FILE_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class PipelinePart:
    """One job of a pipeline."""

    part: str
    job: str
    state: str
    """`queued`, `running`, `done`, `failed`, `cancelled` (one before it failed), or `unknown`."""
    description: str
    """The state as a clause for people, such as `failed with exit code 65`."""


def pipeline_parts(run_dir: Path, queue: Queue) -> list[PipelinePart]:
    """The jobs of a run's pipeline, in order, with their states; empty if it was not submitted as one. Never raises."""
    parts: list[PipelinePart] = []
    if not (run_dir / PIPELINE_FILE).exists():
        return parts
    entries = _read_json(run_dir / PIPELINE_FILE)
    if not isinstance(entries, list):
        return parts
    for entry in entries:
        if isinstance(entry, dict) and {"part", "job"} <= entry.keys():
            name = str(entry["part"])
            job_id = str(entry["job"])
            state_before = parts[-1].state if parts else None
            state, description = _part_state(run_dir, queue, name, job_id, state_before)
            parts.append(PipelinePart(name, job_id, state, description))
    return parts


def _part_state(run_dir: Path, queue: Queue, part_name: str, job_id: str, state_before: str | None) -> tuple[str, str]:
    """(state, description) of one part of a pipeline. The first case that applies:

    - It left a file with its exit code: done or failed.
    - Its job is in the queue: queued or running.
    - The part before it failed: cancelled, as SLURM does.
    - The queue cannot be read: unknown.
    - Otherwise its job has ended without a file: failed.
    """
    end = _read_json(run_dir / PART_RESULTS_DIRECTORY / f"{part_name}.json")
    if isinstance(end, dict) and end.get("job") == job_id:  # else the file is of an earlier submission
        exit_code = end.get("code")
        if exit_code:
            return "failed", f"failed with exit code {exit_code}"
        if exit_code is not None:
            return "done", "done"
    for job in queue.jobs:
        if job_id in (job.id, job.raw_id):
            return "queued" if job.is_pending else "running", job.description
    if state_before in ("failed", "cancelled"):
        return "cancelled", "cancelled, since one before it failed"
    if queue.problem:
        return "unknown", queue.problem
    return "failed", "ended without a message (cancelled, out of time, or stopped before it began)"


def first_failed_part(parts: list[PipelinePart]) -> PipelinePart | None:
    """The part at which a pipeline failed; None if none has. The parts after it are cancelled."""
    return next((part for part in parts if part.state == "failed"), None)


def _read_json(path: Path) -> object:
    """The JSON value in a file; None if it cannot be read."""
    try:
        return json.loads(atomic_io.read_bytes(path, max_bytes=MAX_FILE_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
