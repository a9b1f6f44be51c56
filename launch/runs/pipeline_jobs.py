"""The chain of jobs that a run was submitted as, and the state of each job."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from launch.runs.queue import Queue
from strategies import atomic_io

RECORD = "pipeline.json"
"""The file in a run's directory that lists the jobs of its chain."""
DIRECTORY = "pipeline"
"""Holds a file for each part that has ended."""
MOST_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class PipelinePart:
    """One job of a chain."""

    part: str
    job: str
    state: str
    """`queued`, `running`, `done`, `failed`, `cancelled` (one before it failed), or `unknown`."""
    description: str
    """The same for people."""


def pipeline_parts(run_dir: Path, queue: Queue) -> list[PipelinePart]:
    """The parts in their order; none if the run is no chain. Never raises."""
    parts: list[PipelinePart] = []
    if not (run_dir / RECORD).exists():
        return parts
    entries = _read(run_dir / RECORD)
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and {"part", "job"} <= entry.keys():
            part = str(entry["part"])
            job_id = str(entry["job"])
            state, description = _part_state(run_dir, queue, part, job_id, parts[-1].state if parts else None)
            parts.append(PipelinePart(part, job_id, state, description))
    return parts


def _part_state(run_dir: Path, queue: Queue, part: str, job_id: str, state_before: str | None) -> tuple[str, str]:
    """(state, the same for people) of one part; `state_before`: that of the part before it."""
    end = _read(run_dir / DIRECTORY / f"{part}.json")
    if isinstance(end, dict) and end.get("job") == job_id:  # else of an earlier submission
        code = end.get("code")
        if code:
            return "failed", f"failed with exit code {code}"
        if code is not None:
            return "done", "done"
    for job in queue.jobs:
        if job_id in (job.id, job.raw_id):
            return "queued" if job.is_pending else "running", job.description
    if state_before in ("failed", "cancelled"):
        return "cancelled", "cancelled, since one before it failed"
    if queue.problem:
        return "unknown", queue.problem
    return "failed", "ended without a message (cancelled, out of time, or stopped before it began)"


def failed_part(parts: list[PipelinePart]) -> PipelinePart | None:
    """The part at which a chain ended."""
    return next((part for part in parts if part.state == "failed"), None)


def _read(path: Path) -> object:
    try:
        return json.loads(atomic_io.read_bytes(path, most=MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
