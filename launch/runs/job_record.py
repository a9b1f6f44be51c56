"""`job.json` of a run: which start of which job worked on it last, and how that start ended.

The job script writes it before the ranks start and after they end, so it also covers a start whose ranks wrote
nothing. A record without an end belongs to a script that was killed or still runs.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from strategies import atomic_io
from trainer.reporting.status import write_text_atomic

FILE = "job.json"
MOST_BYTES = 2**16
FILE_KEYS = {"will_restart": "goes_on"}
"""Keys of the file for fields that are called otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRecord:
    """One start of a job; what is not known is None."""

    job: str
    """As scancel takes it: `17`, or `17_3` for a task of an array."""
    start: int
    """0 for the first start, then one more for each requeue."""
    nodes: str | None = None
    began: float | None = None
    """Seconds since the epoch, by the clock of the first node; so is `ended`."""
    ended: float | None = None
    code: int | None = None
    """Exit code of the job script."""
    reason: str | None = None
    """Why the start ended, on one line."""
    will_restart: bool | None = None
    """Whether SLURM starts the job again; None if only SLURM knows."""
    step: int | None = None
    """The optimizer step that was saved at its end."""
    idle_starts: int = 0
    """How many starts in a row, this one included, were told to save before they had made a step."""

    @property
    def is_over(self) -> bool:
        """Whether this job will not start again, as far as its script knows."""
        return self.ended is not None and self.will_restart is False


def read_job_record(run_dir: Path) -> JobRecord | None:
    """The record of a run; None if there is none that can be read."""
    try:
        contents = json.loads(atomic_io.read_bytes(run_dir / FILE, most=MOST_BYTES))
        known = {}
        for field in fields(JobRecord):
            key = FILE_KEYS.get(field.name, field.name)
            if key in contents:  # another version may have other fields
                known[field.name] = contents[key]
        record = JobRecord(**known)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    return record if isinstance(record.job, str) and isinstance(record.start, int) else None


def note_begun(run_dir: Path, job: str, start: int, nodes: str) -> None:
    """Record that a start of a job works on the run. Errors: StorageError."""
    earlier = read_job_record(run_dir)
    record = JobRecord(job=job, start=start, nodes=nodes, began=time.time())
    if earlier is not None and earlier.job == job:
        record = replace(record, step=earlier.step, idle_starts=earlier.idle_starts)
    _write(run_dir, record)


def note_ended(run_dir: Path, job: str, start: int, code: int, **facts: object) -> None:
    """Record how a start of a job ended; `facts` are further fields of the record. Errors: StorageError."""
    record = read_job_record(run_dir)
    if record is None or (record.job, record.start) != (job, start):
        record = JobRecord(job=job, start=start)
    _write(run_dir, replace(record, ended=time.time(), code=code, **facts))  # type: ignore[arg-type]


def _write(run_dir: Path, record: JobRecord) -> None:
    contents = {FILE_KEYS.get(name, name): fact for name, fact in asdict(record).items()}
    write_text_atomic(run_dir / FILE, json.dumps(contents) + "\n")
