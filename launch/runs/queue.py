"""The user's jobs in SLURM's queue, and the run that each is for."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from launch.runs.job_record import read_job_record
from trainer.reporting.status import write_text_atomic

SEPARATOR = "\x1f"
FIELDS = ("%i", "%A", "%T", "%r", "%S", "%L", "%N", "%Z", "%j", "%o")
PATIENCE_S = 5.0
"""Seconds that squeue may take; a controller that is down lets it wait for minutes."""
RUNS = re.compile(r"^runs=\((.*)\)$", re.MULTILINE)
MOST_SCRIPT_BYTES = 2**20
JOB_ID = re.compile(r"[0-9]+(_[0-9]+)?")
SUBMITTED = "submitted"
"""The file in a run's directory with the id of its job."""
WAITING_STATES = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"}
"""States of a job that has no node, and nothing to save."""
HELD_STATES = {"REQUEUE_HOLD", "SPECIAL_EXIT"}
HELD_REASONS = {"job requeued in held state", "job_requeued_in_held_state", "launch failed requeued held"}
HELD = "held by SLURM after a requeue, and does not start by itself; `scontrol release {id}` lets it start"
REASONS = {
    "Priority": "jobs of higher priority come first",
    "Resources": "waits for nodes to become free",
    "Dependency": "waits for another job",
    "DependencyNeverSatisfied": "waits for a job that failed: it never starts; cancel it",
    "BeginTime": "its time has not come (about two minutes after a requeue)",
    "JobHeldUser": "held; `scontrol release {id}` lets it start",
    "JobHeldAdmin": "held by an administrator",
    "PartitionTimeLimit": "asks for more time than its partition gives: it never starts; set launcher.time",
    "PartitionNodeLimit": "asks for more nodes than its partition gives: it never starts; set launcher.nodes",
    "PartitionDown": "its partition is down: it starts when that is up again; or set launcher.partition",
    "PartitionInactive": "its partition starts no jobs now; or set launcher.partition",
    "ReqNodeNotAvail": "a node that it needs is down or reserved",
    "JobArrayTaskLimit": "waits for other tasks of its array to end (launcher.array_limit)",
    "Licenses": "waits for a license",
    "Reservation": "waits for its reservation to begin",
    "InvalidAccount": "its account is not known: it never starts; set launcher.account",
    "InvalidQOS": "its QOS is not known: it never starts; set launcher.qos",
}
TOO_MUCH = re.compile(r"(QOS|Assoc)Max(?P<what>\w+?)Per(Job|Node)(Limit)?|(QOS|Assoc)Max(?P<time>Wall\w*)")
"""Reasons of a job that alone asks for more than a limit allows."""
USED_UP = re.compile(r"(?P<whose>QOS|Assoc)(Grp|Max)\w+|MaxCpuPerAccount")
"""Reasons of a job that waits until others have left a limit."""


def reason_text(reason: str, job_id: str) -> str:
    """Why a job waits, for people; `reason` as squeue has it, which is given back if it is not known."""
    name = reason.split(",")[0].strip("()")
    if name in HELD_REASONS:
        return HELD.format(id=job_id)
    if name in REASONS:
        return REASONS[name].format(id=job_id)
    if TOO_MUCH.fullmatch(name):
        setting = "launcher.time" if "Wall" in name else "what is asked for"
        return f"asks for more than a limit of its QOS or account ({name}): it never starts; lower {setting}, or set launcher.qos"
    if USED_UP.fullmatch(name):
        return f"a limit of its QOS or account is used up ({name}): it starts when other jobs have ended"
    return reason


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
    time_left: str
    """Time until its limit."""
    nodes: str
    directory: str
    """Where it was submitted."""
    name: str
    command: str

    @property
    def is_pending(self) -> bool:
        """Whether it waits to be started."""
        return self.state in WAITING_STATES

    @property
    def why(self) -> str:
        """Why it waits, for people."""
        if self.state in HELD_STATES:
            return HELD.format(id=self.id)
        when = f"; expected at {self.start.replace('T', ' ')[:16]}" if self.start[:1].isdigit() else ""
        return reason_text(self.reason, self.id) + when

    @property
    def description(self) -> str:
        """State and why, for people."""
        if not self.is_pending:
            return f"job {self.id} {self.state}"
        return f"job {self.id} pending: {self.why}"


@dataclass(frozen=True, slots=True)
class Queue:
    """The jobs of this user, by squeue."""

    jobs: tuple[QueuedJob, ...] = ()
    by_run: dict[Path, QueuedJob] = field(default_factory=dict)
    """Jobs by the directory of the run that they were submitted for."""
    problem: str | None = None
    """Why it could not be asked; None also if there is no SLURM here. Then nobody knows which jobs there are."""
    has_no_squeue: bool = False
    """Whether this host has no squeue."""

    def find_job(self, run_dir: Path, job_id: str | None) -> QueuedJob | None:
        """The job of a run: by the id that its records name or that it was submitted as, or by the script in its directory."""
        if not self.jobs:
            return None
        submitted = submitted_as(run_dir)
        for known_id in filter(None, (job_id, submitted)):
            for job in self.jobs:
                # A copied run names the job of the other one, and somebody else's run could name any job.
                if known_id in (job.raw_id, job.id) and not _is_of_another_run(job, run_dir):
                    return job
        job_by_script = self.by_run.get(run_dir.resolve())
        if job_by_script is not None and submitted and "_" in job_by_script.id:
            # The script of an array that was submitted before may have been written anew, for other runs.
            return None
        return job_by_script


def note_submitted(run_dirs: list[Path], job: str) -> None:
    """Leave in each run's directory which job it was submitted as, or which task of an array. Errors: StorageError."""
    for task, run_dir in enumerate(run_dirs):
        job_id = f"{job}_{task}" if len(run_dirs) > 1 else job
        write_text_atomic(run_dir / SUBMITTED, f"{job_id}\n")


def submitted_as(run_dir: Path) -> str | None:
    """The job that a run was submitted as last, as scancel takes it; None where it never was, or the file names none."""
    try:
        job = (run_dir / SUBMITTED).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    # It stands in commands that are to be pasted, and in somebody else's run it can be any text.
    return job if JOB_ID.fullmatch(job) else None


def unfinished_job(run_dir: Path) -> str | None:
    """The job that a run was submitted as, unless its script has recorded that it will not start again."""
    submitted = submitted_as(run_dir)
    record = read_job_record(run_dir)
    if record is not None and record.job == submitted and record.is_over:
        return None
    return submitted


def read_queue_twice() -> Queue:
    """The queue now, asked once more if it cannot be asked: a controller may be busy for a moment. Never raises."""
    queue = read_queue()
    return read_queue() if queue.problem is not None else queue


def read_queue() -> Queue:
    """The queue now. Never raises: `problem` says what was wrong."""
    if shutil.which("squeue") is None:
        return Queue(has_no_squeue=True)
    command = ["squeue", "--me", "--noheader", "--array", f"--format={SEPARATOR.join(FIELDS)}"]
    # The user's SQUEUE_STATES and the like would leave jobs out.
    env = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    try:
        answer = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        return Queue(problem=f"squeue gave no answer within {PATIENCE_S:.0f} s")
    except OSError as error:
        return Queue(problem=f"squeue cannot be called ({error.strerror})")
    if answer.returncode:
        error_lines = (answer.stderr or answer.stdout).strip().splitlines() or ["without a message"]
        return Queue(problem=f"squeue failed: {error_lines[-1].removeprefix('squeue: ')}")
    jobs = []
    by_run = {}
    for line in answer.stdout.splitlines():
        cells = line.split(SEPARATOR)
        if len(cells) != len(FIELDS):
            continue
        job = QueuedJob(*cells)
        jobs.append(job)
        run = _run_of_job(job)
        if run is not None:
            by_run[run] = job
    return Queue(tuple(jobs), by_run)


def _run_of_job(job: QueuedJob) -> Path | None:
    """The run that a job was submitted for: the directory of its script, or by the scripts' own rule."""
    script = Path(job.command)
    if script.name != "train.sbatch":
        return None
    task = job.id.partition("_")[2]
    if not task.isdigit() or not (script.parent / "config.yaml").exists():
        by_hand = Path(job.directory) / "runs" / f"slurm-{job.raw_id}"  # slurm/train.sbatch without `shardtune submit`
        return (by_hand if by_hand.is_dir() else script.parent).resolve()
    runs = runs_of(script)
    return runs[int(task)].resolve() if int(task) < len(runs) else None


def _is_of_another_run(job: QueuedJob, run_dir: Path) -> bool:
    """Whether the script of a job shows that it was submitted for another run than `run_dir`."""
    script = Path(job.command)
    task = job.id.partition("_")[2]
    if script.name == "train.sbatch" and task.isdigit():
        # The script may have been written anew since, for other runs of the same directory.
        runs = {run.resolve() for run in runs_of(script)}
        run = run_dir.resolve()
        return bool(runs) and run not in runs and not run.is_relative_to(script.parent.resolve().parent)
    job_run = _run_of_job(job)
    try:
        return job_run is not None and (job_run / "config.yaml").is_file() and not job_run.samefile(run_dir)
    except OSError:
        return False


def runs_of(script: Path) -> list[Path]:
    """The runs that a script of `shardtune submit` is for, in the order of an array's tasks; none if it cannot be read."""
    try:
        with script.open(encoding="utf-8", errors="replace") as file:
            match = RUNS.search(file.read(MOST_SCRIPT_BYTES))
        if match is None:
            return []
        return [Path(run) for run in shlex.split(match[1])]
    except (OSError, ValueError):
        return []
