"""Reads the user's jobs in SLURM's queue, and finds out which run each of them is for."""

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

FIELD_SEPARATOR = "\x1f"
"""Between the fields of squeue's rows: a character that no job name has."""
SQUEUE_FIELDS = ("%i", "%A", "%T", "%r", "%S", "%L", "%N", "%Z", "%j", "%o")
SQUEUE_TIMEOUT_S = 5.0
"""Seconds that squeue may take; a controller that is down lets it wait for minutes."""
SCRIPT_RUNS_REGEX = re.compile(r"^runs=\((.*)\)$", re.MULTILINE)
"""The line of a job script of `shardtune submit` that lists its runs, quoted for a shell."""
MAX_SCRIPT_BYTES = 2**20
JOB_ID_REGEX = re.compile(r"[0-9]+(_[0-9]+)?")
SUBMITTED_FILE = "submitted"
"""The file in a run's directory with the id of its job."""
WAITING_STATES = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"}
"""States of a job that waits in the queue: it has no node, and nothing to save."""
HELD_STATES = {"REQUEUE_HOLD", "SPECIAL_EXIT"}
"""Waiting states of a job that SLURM does not start by itself."""
HELD_TEXT = "held by SLURM after a requeue, and does not start by itself; `scontrol release {id}` lets it start"
"""What the `HELD_STATES` mean, and the reasons that SLURM gives for them."""
TEXT_BY_SLURM_REASON = {
    "job requeued in held state": HELD_TEXT,
    "job_requeued_in_held_state": HELD_TEXT,
    "launch failed requeued held": HELD_TEXT,
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
"""What SLURM's reasons for a waiting job mean; `{id}` stands for the job's id."""
OVER_LIMIT_REGEX = re.compile(r"(QOS|Assoc)Max\w+?Per(Job|Node)(Limit)?|(QOS|Assoc)MaxWall\w*")
"""SLURM's reasons for a job that alone asks for more than a limit allows, such as `QOSMaxWallDurationPerJobLimit`."""
LIMIT_USED_UP_REGEX = re.compile(r"(QOS|Assoc)(Grp|Max)\w+|MaxCpuPerAccount")
"""SLURM's reasons for a job that waits until other jobs within the same limit have ended, such as `QOSGrpCpuLimit`.

Also matches the reasons of `OVER_LIMIT_REGEX`, which must therefore be tried first.
"""


def explain_slurm_reason(slurm_reasons: str, job_id: str) -> str:
    """Explain to a user why a SLURM job waits: `Priority` -> `jobs of higher priority come first`.

    `slurm_reasons`: as squeue gives them, one or several with commas between them, perhaps in parentheses. Only the first
    one counts; an unknown one is returned as it is.
    """
    reason = slurm_reasons.split(",")[0].strip("()")
    if reason in TEXT_BY_SLURM_REASON:
        return TEXT_BY_SLURM_REASON[reason].format(id=job_id)
    if OVER_LIMIT_REGEX.fullmatch(reason):
        setting = "launcher.time" if "Wall" in reason else "what is asked for"
        return (
            f"asks for more than a limit of its QOS or account ({reason}): it never starts; "
            f"lower {setting}, or set launcher.qos"
        )
    if LIMIT_USED_UP_REGEX.fullmatch(reason):
        return f"a limit of its QOS or account is used up ({reason}): it starts when other jobs have ended"
    return slurm_reasons


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A job, or one task of a job array, with squeue's fields in the order of `SQUEUE_FIELDS`."""

    id: str
    """The id that scancel takes: `17`, or `17_3` for a task of an array."""
    raw_id: str
    """The id that the job itself has in SLURM_JOB_ID; of a task of an array another number, such as `21` for `17_3`."""
    state: str
    """In SLURM's words: `PENDING`, `RUNNING`, `COMPLETING` ..."""
    reason: str
    """Why it waits, in SLURM's words."""
    start_time: str
    """When it started, or is expected to, such as `2025-01-31T12:00:00`; `N/A` if nobody knows."""
    time_left: str
    """Time until its limit."""
    nodes: str
    working_dir: str
    """The working directory in which it was submitted."""
    name: str
    script_path: str

    @property
    def array_task_number(self) -> int | None:
        """Its number in its job array, `3` of `17_3`; None if it is in no array, or stands for several tasks of one."""
        number = self.id.partition("_")[2]
        return int(number) if number.isdigit() else None

    @property
    def is_pending(self) -> bool:
        """Whether it waits in the queue to be started."""
        return self.state in WAITING_STATES

    @property
    def waiting_text(self) -> str:
        """Why the job waits, as a sentence with the time at which SLURM expects to start it."""
        if self.state in HELD_STATES:
            return HELD_TEXT.format(id=self.id)
        sentence = explain_slurm_reason(self.reason, self.id)
        is_start_known = self.start_time[:1].isdigit()
        if is_start_known:
            day_and_minute = self.start_time.replace("T", " ")[: len("2025-01-31 12:00")]
            sentence += f"; expected at {day_and_minute}"
        return sentence

    @property
    def description(self) -> str:
        """Its id and state, such as `job 17 RUNNING`; of a job that waits also why, such as `job 17 pending: <reason>`."""
        if not self.is_pending:
            return f"job {self.id} {self.state}"
        return f"job {self.id} pending: {self.waiting_text}"


@dataclass(frozen=True, slots=True)
class JobQueue:
    """The jobs of this user in SLURM's queue, as squeue listed them."""

    jobs: tuple[QueuedJob, ...] = ()
    job_by_run: dict[Path, QueuedJob] = field(default_factory=dict)
    """The job that was submitted for a run, by the resolved run directory."""
    problem: str | None = None
    """Why squeue failed, so that nobody knows which jobs there are; None also on a host without squeue."""
    has_no_squeue: bool = False
    """Whether this host has no squeue: it has no SLURM, or is a compute node without SLURM's commands."""

    def find_job(self, run_dir: Path, job_id: str | None) -> QueuedJob | None:
        """Find the job of a run in the queue; None if it has none. It is found by the first of these that finds one:

        - `job_id`, which the run's own records name; None if they name none.
        - The id that `shardtune submit` wrote into the run directory.
        - The job's script, which is in the run directory or names it.
        """
        if not self.jobs:
            return None
        submitted_job_id = read_submitted_job_id(run_dir)
        for known_id in filter(None, (job_id, submitted_job_id)):
            for job in self.jobs:
                # A copy of a run names the job of the original, and somebody else's run could name any job.
                if known_id in (job.raw_id, job.id) and not _is_known_to_be_of_another_run(job, run_dir):
                    return job
        job_with_script = self.job_by_run.get(run_dir.resolve())
        if job_with_script is None:
            return None
        is_array_task = "_" in job_with_script.id  # as in 17_3
        if is_array_task and submitted_job_id:
            # The run was submitted as another job since. This is an earlier array, whose script was overwritten meanwhile.
            return None
        return job_with_script


def write_submitted_job_ids(run_dirs: list[Path], job_id: str) -> None:
    """Note in each run's directory the id of the job as which it was submitted. Raises StorageError.

    Several runs are the tasks of a job array: the id is then `17_0` for the first, `17_1` for the second, and so on.
    """
    for task_number, run_dir in enumerate(run_dirs):
        job_or_task_id = f"{job_id}_{task_number}" if len(run_dirs) > 1 else job_id
        write_text_atomic(run_dir / SUBMITTED_FILE, f"{job_or_task_id}\n")


def read_submitted_job_id(run_dir: Path) -> str | None:
    """The id of the job as which a run was last submitted, as scancel takes it; None if it never was, or the file names none."""
    try:
        job_id = (run_dir / SUBMITTED_FILE).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    # The id becomes part of commands for the user to paste, and in somebody else's run the file can hold any text.
    return job_id if JOB_ID_REGEX.fullmatch(job_id) else None


def unfinished_job_id(run_dir: Path) -> str | None:
    """The id of the job that may still be working on a run, or be waiting to: the job as which it was last submitted.

    None if it never was, or if the job's script has recorded that it will not start again.
    """
    submitted_job_id = read_submitted_job_id(run_dir)
    record = read_job_record(run_dir)
    if record is not None and record.job == submitted_job_id and record.is_over:
        return None
    return submitted_job_id


def read_queue_twice() -> JobQueue:
    """The queue now; if squeue fails, it is called once more, because a controller may be busy for a moment. Never raises."""
    queue = read_queue()
    if queue.problem is not None:
        queue = read_queue()
    return queue


def read_queue() -> JobQueue:
    """Read the user's jobs in SLURM's queue. Never raises: if squeue fails, `problem` of the queue says why."""
    if shutil.which("squeue") is None:
        return JobQueue(has_no_squeue=True)
    command = ["squeue", "--me", "--noheader", "--array", f"--format={FIELD_SEPARATOR.join(SQUEUE_FIELDS)}"]
    # The user's SQUEUE_STATES and the like would leave jobs out.
    env = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    try:
        completed = subprocess.run(
            command, env=env, capture_output=True, text=True, errors="replace", timeout=SQUEUE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return JobQueue(problem=f"squeue gave no answer within {SQUEUE_TIMEOUT_S:.0f} s")
    except OSError as error:
        return JobQueue(problem=f"squeue cannot be called ({error.strerror})")
    if completed.returncode:
        error_lines = (completed.stderr or completed.stdout).strip().splitlines() or ["without a message"]
        return JobQueue(problem=f"squeue failed: {error_lines[-1].removeprefix('squeue: ')}")
    return _parse_squeue_output(completed.stdout)


def _parse_squeue_output(output: str) -> JobQueue:
    """Read what squeue printed, a line for each job with the `SQUEUE_FIELDS`; other lines are ignored.

    If several jobs are for one run, `job_by_run` has the one that squeue lists last.
    """
    jobs = []
    job_by_run = {}
    for line in output.splitlines():
        field_values = line.split(FIELD_SEPARATOR)
        if len(field_values) != len(SQUEUE_FIELDS):
            continue
        job = QueuedJob(*field_values)
        jobs.append(job)
        run_dir = _run_dir_of_job(job)
        if run_dir is not None:
            job_by_run[run_dir] = job
    return JobQueue(tuple(jobs), job_by_run)


def _run_dir_of_job(job: QueuedJob) -> Path | None:
    """Find the run directory that a job was submitted for, resolved. The first case that applies:

    - The script is not shardtune's: None.
    - A task of an array: the script is in the directory of the first run, and lists the runs by task number. None if it has
      no run with this number.
    - slurm/train.sbatch, submitted by hand without `shardtune submit`: the directory `runs/slurm-<job>` that it makes.
    - Otherwise a single job: the script is in the run directory.
    """
    script = Path(job.script_path)
    if script.name != "train.sbatch":
        return None
    task_number = job.array_task_number
    # `submit` writes an array's script beside the config.yaml of its first run.
    if task_number is not None and (script.parent / "config.yaml").exists():
        run_dirs = run_dirs_of_script(script)
        return run_dirs[task_number].resolve() if task_number < len(run_dirs) else None
    dir_made_by_hand_submission = Path(job.working_dir) / "runs" / f"slurm-{job.raw_id}"
    if dir_made_by_hand_submission.is_dir():
        return dir_made_by_hand_submission.resolve()
    return script.parent.resolve()


def _is_known_to_be_of_another_run(job: QueuedJob, run_dir: Path) -> bool:
    """Whether the script of a job shows that the job is of another run than `run_dir`, whose records name it.

    False if it shows nothing.

    - A task of an array is of another run if its script lists runs, this run is none of them, and this run is not beside
      the script's directory: a later submission, for other runs there, may have overwritten the script.
    - Any other job is of another run if its script is in the directory of another run.
    """
    script = Path(job.script_path)
    if script.name == "train.sbatch" and job.array_task_number is not None:
        listed_runs = {listed_dir.resolve() for listed_dir in run_dirs_of_script(script)}
        this_run = run_dir.resolve()
        is_beside_script_dir = this_run.is_relative_to(script.parent.resolve().parent)
        return bool(listed_runs) and this_run not in listed_runs and not is_beside_script_dir
    run_of_job = _run_dir_of_job(job)
    try:
        return run_of_job is not None and (run_of_job / "config.yaml").is_file() and not run_of_job.samefile(run_dir)
    except OSError:  # one of the directories cannot be read
        return False


def run_dirs_of_script(script: Path) -> list[Path]:
    """Read the run directories from a job script of `shardtune submit`, in the order of an array's tasks; empty if it has none.

    They are in a line like `runs=(runs/sweep/0 runs/sweep/1)`.
    """
    try:
        with script.open(encoding="utf-8", errors="replace") as file:
            match = SCRIPT_RUNS_REGEX.search(file.read(MAX_SCRIPT_BYTES))
        if match is None:
            return []
        return [Path(run_dir) for run_dir in shlex.split(match[1])]
    except (OSError, ValueError):
        return []
