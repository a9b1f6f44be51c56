"""What SLURM's queue holds of this user, and which run each job is for."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from trainer.records.status import write_text_atomic

SEPARATOR = "\x1f"
FIELDS = ("%i", "%A", "%T", "%r", "%S", "%L", "%N", "%Z", "%j", "%o")
PATIENCE_S = 5.0
"""Seconds that squeue may take; a controller that is down lets it wait for minutes."""
RUNS = re.compile(r"^runs=\((.*)\)$", re.MULTILINE)
MOST_SCRIPT = 2**20
SUBMITTED = "submitted"
"""The file in a run's directory with the id of its job."""
REASONS = {
    "Priority": "jobs of higher priority come first",
    "Resources": "waits for nodes to become free",
    "Dependency": "waits for another job",
    "DependencyNeverSatisfied": "waits for a job that failed: it never starts; cancel it",
    "BeginTime": "its time has not come (about two minutes after a requeue)",
    "JobHeldUser": "held: scontrol release {id}",
    "JobHeldAdmin": "held by an administrator",
    "PartitionTimeLimit": "asks for more time than its partition gives: it never starts; set launcher.time",
    "PartitionNodeLimit": "asks for more nodes than its partition gives: it never starts; set launcher.nodes",
    "ReqNodeNotAvail": "a node that it needs is down or reserved",
}


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A job, or one task of an array, in squeue's words."""

    id: str
    """As scancel takes it: `17`, or `17_3` for a task of an array."""
    raw_id: str
    """As the job itself knows it (SLURM_JOB_ID)."""
    state: str
    reason: str
    start: str
    """When it started, or is expected to."""
    left: str
    """Time until its limit."""
    nodes: str
    directory: str
    """Where it was submitted."""
    name: str
    command: str

    @property
    def pends(self) -> bool:
        """Whether it waits to be started."""
        return self.state == "PENDING"

    @property
    def says(self) -> str:
        """State and why, for people."""
        if not self.pends:
            return f"job {self.id} {self.state}"
        why = REASONS.get(self.reason.split(",")[0].strip("()"), self.reason).format(id=self.id)
        when = f"; expected at {self.start.replace('T', ' ')[:16]}" if self.start[:1].isdigit() else ""
        return f"job {self.id} pending: {why}{when}"


@dataclass(frozen=True, slots=True)
class Queue:
    """The jobs of this user, by squeue."""

    jobs: tuple[QueuedJob, ...] = ()
    by_run: dict[Path, QueuedJob] = field(default_factory=dict)
    """Jobs by the directory of the run that they were submitted for."""
    problem: str | None = None
    """Why it could not be asked; None also where there is no SLURM."""

    def job_of(self, run_dir: Path, job_id: str | None) -> QueuedJob | None:
        """The job of a run: by the id that its records name or that it was submitted as, or by the script in its directory."""
        if not self.jobs:
            return None
        submitted = submitted_as(run_dir)
        for known in filter(None, (job_id, submitted)):
            if (named := next((job for job in self.jobs if known in (job.raw_id, job.id)), None)) is not None:
                return named
        found = self.by_run.get(run_dir.resolve())
        # The script of an array that was submitted before may have been written anew, for other runs.
        return None if found is not None and submitted and "_" in found.id else found


def note_submitted(run_dirs: list[Path], job: str) -> None:
    """Leave in each run's directory which job it was submitted as; of an array the task. Errors: StorageError."""
    for number, run_dir in enumerate(run_dirs):
        write_text_atomic(run_dir / SUBMITTED, f"{job}_{number}\n" if len(run_dirs) > 1 else f"{job}\n")


def submitted_as(run_dir: Path) -> str | None:
    """The job that a run was submitted as last, as scancel takes it; None where it never was."""
    try:
        return (run_dir / SUBMITTED).read_text(encoding="utf-8").strip() or None
    except (OSError, ValueError):
        return None


def ask() -> Queue:
    """The queue now. Never raises: `problem` says what was wrong."""
    if shutil.which("squeue") is None:
        return Queue()
    command = ["squeue", "--me", "--noheader", "--array", f"--format={SEPARATOR.join(FIELDS)}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        return Queue(problem=f"squeue gave no answer within {PATIENCE_S:.0f} s")
    except OSError as error:
        return Queue(problem=f"squeue cannot be called ({error.strerror})")
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["without a word"]
        return Queue(problem=f"squeue failed: {said[-1].removeprefix('squeue: ')}")
    rows = [line.split(SEPARATOR) for line in done.stdout.splitlines()]
    jobs = tuple(QueuedJob(*row) for row in rows if len(row) == len(FIELDS))
    return Queue(jobs, {where: job for job in jobs if (where := _directory(job)) is not None})


def _directory(job: QueuedJob) -> Path | None:
    """The run that a job was submitted for: the directory of its script, or what the scripts' own rule says."""
    script = Path(job.command)
    if script.name != "train.sbatch":
        return None
    task = job.id.partition("_")[2]
    if not task.isdigit() or not (script.parent / "config.yaml").exists():
        own = Path(job.directory) / "runs" / f"slurm-{job.raw_id}"  # slurm/train.sbatch by hand
        return (own if own.is_dir() else script.parent).resolve()
    runs = runs_of(script)
    return runs[int(task)].resolve() if int(task) < len(runs) else None


def runs_of(script: Path) -> list[Path]:
    """The runs that a script of `shardtune submit` is for, in the order of an array's tasks; none where it cannot be read."""
    try:
        with script.open(encoding="utf-8", errors="replace") as file:
            found = RUNS.search(file.read(MOST_SCRIPT))
        return [Path(run) for run in shlex.split(found[1])] if found else []
    except (OSError, ValueError):
        return []
