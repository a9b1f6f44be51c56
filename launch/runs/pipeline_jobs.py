"""The chain of jobs that a run was submitted as, and the state of each job."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from launch.runs.queue import Queue
from strategies import atomic_io

RECORD, PLACE = "pipeline.json", "pipeline"
MOST = 2**16


@dataclass(frozen=True, slots=True)
class PipelinePart:
    """One job of a chain."""

    part: str
    job: str
    state: str
    """`queued`, `running`, `done`, `failed`, `cancelled` (one before it failed), or `unknown`."""
    says: str
    """The same for people."""


def parts_of(run_dir: Path, queue: Queue) -> list[PipelinePart]:
    """The parts in their order; none where the run is no chain. Never raises."""
    found: list[PipelinePart] = []
    if not (run_dir / RECORD).exists():
        return found
    listed = _read(run_dir / RECORD)
    for entry in listed if isinstance(listed, list) else []:
        if not (isinstance(entry, dict) and {"part", "job"} <= entry.keys()):
            continue
        part, number = str(entry["part"]), str(entry["job"])
        told = _read(run_dir / PLACE / f"{part}.json")
        code = told.get("code") if isinstance(told, dict) and told.get("job") == number else None
        job = next((each for each in queue.jobs if number in (each.id, each.raw_id)), None)
        if job is not None and code is None:
            state, says = "queued" if job.pends else "running", job.says
        elif code is not None:
            state = "failed" if code else "done"
            says = f"failed with exit code {code}" if code else "done"
        elif found and found[-1].state in ("failed", "cancelled"):
            state, says = "cancelled", "cancelled, since one before it failed"
        elif queue.problem:
            state, says = "unknown", queue.problem
        else:
            state, says = "failed", "ended without a word (cancelled, out of time, or stopped before it began)"
        found.append(PipelinePart(part, number, state, says))
    return found


def failed(parts: list[PipelinePart]) -> PipelinePart | None:
    """The part at which a chain ended."""
    return next((part for part in parts if part.state == "failed"), None)


def _read(path: Path) -> object:
    try:
        return json.loads(atomic_io.read_bytes(path, most=MOST))
    except (OSError, ValueError, RecursionError):
        return None
