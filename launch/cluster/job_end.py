"""The end of one start of a job: whether and how often the job is requeued, and what is recorded.

Records of an earlier start are recognised by the job's id and the number of its start, never by a clock.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launch.cluster import pipeline_part
from launch.cluster.requeue import ENDED_BY_SLURM, TermSignal, ended_by_slurm, killed_for_memory, requeue, signal_lead_s
from launch.config.process_role import expand_hosts
from launch.runs import efficiency
from launch.runs.job_record import read_job_record, record_job_end
from strategies.errors import ConfigError, OutOfMemory, StorageError
from trainer.reporting.status import State, read_failure, read_status, record_failure, restart_count

PREEMPTED = 75
"""Exit code of a run that has saved and can be resumed."""
MOST_IDLE_STARTS = 3
"""Starts in a row that were told to save before they had made a step, after which a job is not requeued."""
RETRY_CAUSES = {
    "node_fail": ("a rank was lost", "lost"),
    "out_of_memory": ("a rank ran out of memory", "out-of-memory"),
}
"""Causes for which a job may be requeued although its run has not saved: (reason in messages, prefix of the counting file)."""


@dataclass(frozen=True, slots=True)
class JobStart:
    """One start of a SLURM job; a job that is requeued has several."""

    name: str
    """The job as scontrol takes it; in an array a bare job id can mean all its tasks."""
    id: str
    restart: int
    """How often SLURM has started the job before."""
    nodes: list[str] = field(default_factory=list)
    """Its hosts, in SLURM's order."""

    @classmethod
    def here(cls) -> JobStart:
        """The job of this process. Raises ConfigError outside a job."""
        env = os.environ
        if "SLURM_JOB_ID" not in env:
            raise ConfigError("SLURM_JOB_ID: not set; this is for job scripts of SLURM")
        name = job_name() or env["SLURM_JOB_ID"]
        return cls(name, env["SLURM_JOB_ID"], int(env.get("SLURM_RESTART_COUNT") or 0), hosts_of_job())

    def is_of_this_start(self, record: dict[str, Any]) -> bool:
        """Whether a record such as `status.json` was written by this start of the job, and not by an earlier one."""
        return (record.get("job"), record.get("restart")) == (self.id, restart_count())


def hosts_of_job() -> list[str]:
    """The hosts of this process's job, in the order in which SLURM numbers them. Errors: ConfigError."""
    node_list = os.environ.get("SLURM_JOB_NODELIST", "")
    hosts = expand_hosts(node_list)
    count = os.environ.get("SLURM_JOB_NUM_NODES", "")
    if not hosts or (count.isdecimal() and int(count) != len(hosts)):
        raise ConfigError(f"SLURM_JOB_NODELIST={node_list}: names {len(hosts)} hosts, and SLURM_JOB_NUM_NODES={count}")
    return hosts


def job_name() -> str | None:
    """This process's job as scontrol takes it, `5_1` for a task of an array; None outside a job."""
    array_id = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array_id:
        return f"{array_id}_{os.environ.get('SLURM_ARRAY_TASK_ID')}"
    return os.environ.get("SLURM_JOB_ID")


def count_lost_start(logs: Path, job: JobStart, limit: int, counter: str = "lost") -> bool:
    """Count one more start of a job that was lost, in the file `<counter>-<job>`; returns whether another start is allowed.

    `limit`: how many lost starts `launcher.retry` allows. Errors: StorageError.
    """
    path = logs / f"{counter}-{job.name}"
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{job.restart}\n")
        return len(path.read_text(encoding="utf-8").splitlines()) <= limit
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror or error}); free space") from error


@dataclass(frozen=True, slots=True)
class JobOutcome:
    """How a start of a job ended."""

    code: int
    """Exit code of the job script."""
    reason: str
    """Why, on one line."""
    requeue: bool = False
    """Whether the script asks SLURM to start the job again."""
    will_restart: bool | None = False
    """Whether the job starts again; None if only SLURM knows."""
    step: int | None = None
    """The training step that was saved; None if nothing was."""
    idle_starts: int = 0
    """Starts in a row, this one included, that made no step before they were told to save."""


def end(code: int, stopped: bool, *, unstarted: bool = False) -> int:
    """Record how this start of a job ended, and requeue the job if its run is to go on; returns the job's exit code.

    `code`: the exit code of the srun step that ran the training. `stopped`: whether the job script received TERM.
    `unstarted`: whether it was told to stop before it had started a rank.
    """
    job = JobStart.here()
    run_dir = Path(os.environ["SHARDTUNE_RUN_DIR"])
    term = TermSignal()
    if not unstarted:
        print(efficiency.record_start(run_dir, job.name, job.restart, code), flush=True)
    outcome = _determine_outcome(job, run_dir, code, stopped=stopped, unstarted=unstarted)
    if outcome.requeue:
        # Recorded before SLURM is asked, because SLURM ends this process at once.
        _record_end(run_dir, job, replace(outcome, will_restart=True))
        print(f"job {job.name}: {outcome.reason}; it is to be requeued", flush=True)
        refusal = requeue(job, signal_lead_s(run_dir), term)
        if refusal is None:
            return outcome.code
        print(f"job {job.name}: not requeued: {refusal}", flush=True)
        has_saved = outcome.step is not None
        outcome = replace(
            outcome,
            code=PREEMPTED if has_saved else outcome.code,
            reason=f"{outcome.reason}; not requeued: {refusal}",
            # Of a job that SLURM ends, only SLURM knows whether it starts again.
            will_restart=None if refusal == ENDED_BY_SLURM else False,
        )
    else:
        print(f"job {job.name}: {outcome.reason}", flush=True)
    _record_end(run_dir, job, outcome)
    pipeline_part.record_part_end("train", run_dir, outcome.code)
    return outcome.code


def _record_end(run_dir: Path, job: JobStart, outcome: JobOutcome) -> None:
    """Record in the run directory how this start of the job ended. A full disk only prints a message: the requeue goes on."""
    facts: dict[str, object] = {
        "reason": outcome.reason,
        "will_restart": outcome.will_restart,
        "step": outcome.step,
        "idle_starts": outcome.idle_starts,
    }
    try:
        record_job_end(run_dir, job.name, job.restart, outcome.code, **facts)
    except StorageError as error:
        print(f"job {job.name}: {error}", flush=True)


def _determine_outcome(job: JobStart, run_dir: Path, code: int, *, stopped: bool, unstarted: bool) -> JobOutcome:
    """How a start of a job ended, from what its ranks recorded in the run directory, and whether the job is to start again.

    The cases, in order; the last two look at the recorded failure:
    - told to stop before a rank was started, or saved (`preempted`): requeued within limits;
    - done: not requeued;
    - a rank was lost or ran out of memory: requeued within limits;
    - any other error: not requeued.
    Records of an earlier start of the job do not count. Parameters as for `end`.
    """
    if unstarted:
        return _outcome_after_save(job, run_dir, code, step=None, stopped=stopped, unstarted=True)
    status = read_status(run_dir)
    state = status.get("state") if job.is_of_this_start(status) else None
    if state == State.preempted:
        return _outcome_after_save(job, run_dir, code, step=status.get("step"), stopped=stopped, unstarted=False)
    if state == State.done:
        return JobOutcome(code, "done")

    # The run has failed: by its own record, else by SLURM's.
    failure = read_failure(run_dir)
    retry_cause = None  # a key of RETRY_CAUSES
    why = ""
    if job.is_of_this_start(failure):
        retry_cause = failure.get("retry")
        why = str(failure.get("message"))
    if not why and code:
        why = f"its ranks ended with exit code {code} and wrote no reason; their output is in {run_dir / 'logs'}"
        if killed_for_memory(job):
            retry_cause = "out_of_memory"
            why = f"{why}. SLURM ended them for the memory limit of the job: raise launcher.mem, or lower batch.micro"
            record_failure(run_dir, 0, OutOfMemory(why), "starting or training")  # 0: the rank
    if retry_cause in RETRY_CAUSES:  # never after an error of the run itself
        return _outcome_after_loss(job, run_dir, code, retry_cause, stopped=stopped)
    return JobOutcome(code, " ".join(why.split()) or f"ended with exit code {code}")


def _outcome_after_save(
    job: JobStart, run_dir: Path, code: int, *, step: int | None, stopped: bool, unstarted: bool
) -> JobOutcome:
    """The outcome of a start that was told to stop, and has saved at `step` (None: it had nothing to save).

    The job is requeued unless SLURM ends it, it restarted as often as `launcher.retry` allows, or `MOST_IDLE_STARTS` starts in a
    row made no step. In the last two cases the exit code is `PREEMPTED`: the run can be resumed by hand.
    """
    state = "told to stop before its ranks were started" if unstarted else "state saved"
    # Progress since the start before this one, which the job's record tells.
    record = read_job_record(run_dir)
    earlier_step = 0
    idle_starts = 0
    if record is not None and record.job == job.name:
        earlier_step = record.step or 0
        idle_starts = record.idle_starts
    step = earlier_step if step is None else step
    idle_starts = idle_starts + 1 if step == earlier_step else 0
    outcome = JobOutcome(code, state, step=step, idle_starts=idle_starts)

    # Reasons not to requeue.
    if ended_by_slurm(job, stopped):
        reason = f"stopped by SLURM or by scancel, {state}; not requeued from here"
        return replace(outcome, reason=reason, will_restart=None)
    limit = _retry_limit("preempted")
    if job.restart >= limit:
        why = f"since it restarted {job.restart} times already (limit {limit})"
        return replace(outcome, code=PREEMPTED, reason=f"{state}; not requeued, {why}")
    if idle_starts >= MOST_IDLE_STARTS:
        why = f"since {idle_starts} starts in a row made no step: set a longer launcher.time, or a shorter launcher.signal_lead_s"
        return replace(outcome, code=PREEMPTED, reason=f"{state}; not requeued, {why}")
    return replace(outcome, requeue=True)


def _retry_limit(cause: str) -> int:
    """How often the run may be started again for a cause, by `launcher.retry`; the job script exports it as `retry_<cause>`."""
    return int(os.environ.get(f"retry_{cause}") or 0)


def _outcome_after_loss(job: JobStart, run_dir: Path, code: int, cause: str, *, stopped: bool) -> JobOutcome:
    """The outcome of a start that lost a rank, or ran out of memory (`cause`: a key of `RETRY_CAUSES`).

    The job is requeued unless SLURM ends it or that happened too often. After memory ran out, the micro-batch is halved in the
    run's configuration before the job starts again; if that is not possible, the job is not requeued.
    """
    why, counter = RETRY_CAUSES[cause]
    limit = _retry_limit(cause)
    if ended_by_slurm(job, stopped):
        reason = f"stopped by SLURM or by scancel, and {why}; not requeued from here"
        return JobOutcome(code, reason, will_restart=None)
    if not count_lost_start(run_dir / "logs", job, limit, counter):
        return JobOutcome(code, f"{why}; not requeued, since that happened more than {limit} times")
    if cause == "out_of_memory":
        from launch.cluster.oom_retry import write_smaller_settings

        change = write_smaller_settings(run_dir)
        if change is None:
            return JobOutcome(code, f"{why}; not requeued, since batch.micro cannot be halved")
        why = f"{why}, {change}"
    return JobOutcome(code, why, requeue=True)
