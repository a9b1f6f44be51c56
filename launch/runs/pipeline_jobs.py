"""The chain of jobs that a run was submitted as, and the state of each job."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from launch.runs.queue import Queue
from strategies import atomic_io

RECORD, DIRECTORY = "pipeline.json", "pipeline"
MOST = 2**16


@dataclass(frozen=True, slots=True)
class PipelinePart:
    """One job of a chain."""

    part: str
    job: str
    state: str
    """`queued`, `running`, `done`, `failed_part`, `cancelled` (one before it failed), or `unknown`."""
    description: str
    """The same for people."""


def pipeline_parts(run_dir: Path, queue: Queue) -> list[PipelinePart]:
    """The parts in their order; none where the run is no chain. Never raises."""
    parts: list[PipelinePart] = []
    if not (run_dir / RECORD).exists():
        return parts
    entries = _read(run_dir / RECORD)
    for entry in entries if isinstance(entries, list) else []:
        if not (isinstance(entry, dict) and {"part", "job"} <= entry.keys()):
            continue
        part, job_id = str(entry["part"]), str(entry["job"])
        end = _read(run_dir / DIRECTORY / f"{part}.json")
        code = end.get("code") if isinstance(end, dict) and end.get("job") == job_id else None
        job = next((job for job in queue.jobs if job_id in (job.id, job.raw_id)), None)
        if job is not None and code is None:
            state, description = "queued" if job.is_pending else "running", job.description
        elif code is not None:
            state = "failed" if code else "done"
            description = f"failed with exit code {code}" if code else "done"
        elif parts and parts[-1].state in ("failed", "cancelled"):
            state, description = "cancelled", "cancelled, since one before it failed"
        elif queue.problem:
            state, description = "unknown", queue.problem
        else:
            state, description = "failed", "ended without a word (cancelled, out of time, or stopped before it began)"
        parts.append(PipelinePart(part, job_id, state, description))
    return parts


def failed_part(parts: list[PipelinePart]) -> PipelinePart | None:
    """The part at which a chain ended."""
    return next((part for part in parts if part.state == "failed"), None)


def _read(path: Path) -> object:
    try:
        return json.loads(atomic_io.read_bytes(path, most=MOST))
    except (OSError, ValueError, RecursionError):
        return None
