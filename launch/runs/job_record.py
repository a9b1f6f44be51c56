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

JOB_RECORD_FILE = "job.json"
MAX_FILE_BYTES = 2**16
KEY_BY_FIELD = {"will_restart": "goes_on"}
"""Keys of the file that differ from the names of the fields: the file keeps the keys of earlier versions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRecord:
    """One start of a job; what is not known is None. The field names are keys of `job.json`, except for `KEY_BY_FIELD`."""

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
    """How many starts in a row, this one included, were preempted before they had made a step."""

    @property
    def is_over(self) -> bool:
        """Whether this job will not start again, as far as its script knows."""
        return self.ended is not None and self.will_restart is False


def read_job_record(run_dir: Path) -> JobRecord | None:
    """Read the `job.json` of a run, what its job script noted of its last start; None if there is none that can be read."""
    try:
        contents = json.loads(atomic_io.read_bytes(run_dir / JOB_RECORD_FILE, max_bytes=MAX_FILE_BYTES))
        values_by_field = {}
        for field in fields(JobRecord):
            key = KEY_BY_FIELD.get(field.name, field.name)
            if key in contents:  # a file of another version may lack some keys; further keys are ignored
                values_by_field[field.name] = contents[key]
        record = JobRecord(**values_by_field)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    return record if isinstance(record.job, str) and isinstance(record.start, int) else None


def record_job_start(run_dir: Path, job_id: str, start_number: int, nodes: str) -> None:
    """Note in `job.json` that a start of a job now works on the run; called before the ranks start. Raises StorageError.

    `start_number`: 0 for the first start, then one more for each requeue. `nodes`: as SLURM lists them, such as `n[1-2]`.
    """
    earlier_record = read_job_record(run_dir)
    record = JobRecord(job=job_id, start=start_number, nodes=nodes, began=time.time())
    # A requeue of the same job goes on counting idle starts; a job that was submitted anew begins at 0.
    if earlier_record is not None and earlier_record.job == job_id:
        record = replace(record, step=earlier_record.step, idle_starts=earlier_record.idle_starts)
    _write_job_record(run_dir, record)


def record_job_end(run_dir: Path, job_id: str, start_number: int, exit_code: int, **more_fields: object) -> None:
    """Note in `job.json` how a start of a job ended, also one that started no ranks. Raises StorageError.

    `more_fields`: further fields of `JobRecord`, such as `reason` and `will_restart`.
    """
    record = read_job_record(run_dir)
    if record is None or (record.job, record.start) != (job_id, start_number):
        # It is of another start: `record_job_start` could not write the beginning of this one.
        record = JobRecord(job=job_id, start=start_number)
    _write_job_record(run_dir, replace(record, ended=time.time(), code=exit_code, **more_fields))  # type: ignore[arg-type]


def _write_job_record(run_dir: Path, record: JobRecord) -> None:
    """Write the record as the run's `job.json`. Raises StorageError if it cannot be written."""
    contents = {KEY_BY_FIELD.get(name, name): value for name, value in asdict(record).items()}
    write_text_atomic(run_dir / JOB_RECORD_FILE, json.dumps(contents) + "\n")
