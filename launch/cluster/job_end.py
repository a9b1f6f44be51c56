"""The end of one start of a job: whether and how often the job is requeued, and what is recorded.

Records of an earlier start are recognised by the job's id and the number of its start, never by a clock.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from launch.cluster import pipeline_part
from launch.cluster.requeue import (
    ENDED_BY_SLURM,
    TermSignal,
    is_ended_by_slurm,
    request_requeue_repeatedly,
    signal_lead_s,
    was_killed_for_memory,
)
from launch.config.process_role import expand_hosts
from launch.runs import efficiency
from launch.runs.job_record import read_job_record, record_job_end
from strategies import exit_codes
from strategies.errors import ConfigError, OutOfMemory, StorageError
from trainer.reporting.status import (
    RunState,
    is_refused_start,
    read_failure,
    read_status,
    record_failure,
    restart_count,
)

MAX_IDLE_STARTS = 3
"""Starts in a row that were told to save before they had made a step, after which a job is not requeued."""


class RetryCause(NamedTuple):
    """A cause for which a job may be requeued although its run has not saved."""

    reason: str
    """The cause in messages."""
    lost_starts_file_prefix: str
    """Begins the name of the file that has a line for each start that ended so."""


RETRY_CAUSE_BY_KEY = {
    "node_fail": RetryCause("a rank was lost", "lost"),
    "out_of_memory": RetryCause("a rank ran out of memory", "out-of-memory"),
}
"""The causes by their keys in `launcher.retry`."""


@dataclass(frozen=True, slots=True)
class JobStart:
    """One start of a SLURM job. A job that is requeued has several, which share its id and its run directory."""

    name: str
    """The job as scontrol takes it; in an array a bare job id can mean all its tasks."""
    id: str
    num_earlier_starts: int
    """How often SLURM has started the job before."""
    nodes: list[str] = field(default_factory=list)
    """Its hosts, in SLURM's order."""

    @classmethod
    def from_environment(cls) -> JobStart:
        """The job of this process, by SLURM's environment variables. Raises ConfigError outside a job."""
        env = os.environ
        if "SLURM_JOB_ID" not in env:
            raise ConfigError("SLURM_JOB_ID: not set; this is for job scripts of SLURM")
        return cls(
            name=job_name() or env["SLURM_JOB_ID"],
            id=env["SLURM_JOB_ID"],
            num_earlier_starts=int(env.get("SLURM_RESTART_COUNT") or 0),
            nodes=hosts_of_job(),
        )

    def has_written(self, record: dict[str, Any]) -> bool:
        """Whether a record such as `status.json` was written by this start of the job, and not by an earlier one.

        `record`: the file as a dictionary, with the id of the job and the number of its restart.
        """
        return record.get("job") == self.id and record.get("restart") == restart_count()


def hosts_of_job() -> list[str]:
    """The hosts of this process's SLURM job, in the order in which SLURM numbers them: ["gpu01", "gpu02"].

    Raises ConfigError if SLURM's variables name no host, or another number of hosts than the job has nodes.
    """
    node_list = os.environ.get("SLURM_JOB_NODELIST", "")
    hosts = expand_hosts(node_list)
    num_nodes = os.environ.get("SLURM_JOB_NUM_NODES", "")
    if not hosts or (num_nodes.isdecimal() and int(num_nodes) != len(hosts)):
        raise ConfigError(
            f"SLURM_JOB_NODELIST={node_list}: names {len(hosts)} hosts, and SLURM_JOB_NUM_NODES={num_nodes}"
        )
    return hosts


def job_name() -> str | None:
    """This process's job as scontrol takes it, `5_1` for a task of an array; None outside a job."""
    array_id = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array_id:
        return f"{array_id}_{os.environ.get('SLURM_ARRAY_TASK_ID')}"
    return os.environ.get("SLURM_JOB_ID")


def record_lost_start(logs: Path, job: JobStart, file_prefix: str = "lost") -> int:
    """Count a start of a job that ended without saving, so that a job whose node fails again and again is given up.

    A start is lost if its node failed, one of its ranks was killed, or memory ran out. Adds a line to the file
    `<file_prefix>-<job>` in `logs`, and returns how many were lost so far, for this reason. Raises StorageError if the file
    cannot be written.
    """
    path = logs / f"{file_prefix}-{job.name}"
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{job.num_earlier_starts}\n")
        return len(path.read_text(encoding="utf-8").splitlines())
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror or error}); free space") from error


@dataclass(frozen=True, slots=True)
class JobOutcome:
    """How a start of a job ended."""

    exit_code: int
    """Of the job script."""
    reason: str
    """Why, on one line."""
    should_requeue: bool = False
    """Whether the script asks SLURM to start the job again."""
    will_restart: bool | None = False
    """Whether the job starts again; None if only SLURM knows."""
    step: int | None = None
    """The training step that was saved; None if nothing was."""
    idle_starts: int = 0
    """Idle starts in a row, this one included: they made no step before they were told to save."""


def record_end_and_requeue(srun_exit_code: int, *, received_term: bool, has_started_ranks: bool = True) -> int:
    """Record how this start of a job ended, and ask SLURM to start the job again if its run is to go on.

    Called by the job script after its training step; returns the exit code of the script.

    `srun_exit_code`: of the srun step that ran the training.
    `received_term`: whether SLURM has sent TERM to the job script, because it or `scancel` ends the job.
    `has_started_ranks`: False if the script was told to stop before it had started a rank.

    If the job is not requeued, its training has ended. A run may be a chain of jobs (prepare, train, evaluate, export), of which
    this part is then recorded too.
    """
    job = JobStart.from_environment()
    run_dir = Path(os.environ["SHARDTUNE_RUN_DIR"])
    # From here on TERM does not end this process, so that the end is recorded.
    term = TermSignal()
    if has_started_ranks:
        print(efficiency.record_start_usage(run_dir, job.name, job.num_earlier_starts, srun_exit_code), flush=True)
    outcome = _determine_outcome(
        job, run_dir, srun_exit_code, received_term=received_term, has_started_ranks=has_started_ranks
    )
    if outcome.should_requeue:
        # Recorded before SLURM is asked, because SLURM ends this process at once.
        _record_end(run_dir, job, replace(outcome, will_restart=True))
        print(f"job {job.name}: {outcome.reason}; it is to be requeued", flush=True)
        refusal = request_requeue_repeatedly(job, signal_lead_s(run_dir), term)
        if refusal is None:
            return outcome.exit_code
        print(f"job {job.name}: not requeued: {refusal}", flush=True)
        outcome = _outcome_after_refusal(outcome, refusal)
    else:
        print(f"job {job.name}: {outcome.reason}", flush=True)
    _record_end(run_dir, job, outcome)
    pipeline_part.record_part_end("train", run_dir, outcome.exit_code)
    return outcome.exit_code


def _outcome_after_refusal(outcome: JobOutcome, refusal: str) -> JobOutcome:
    """The outcome of a start whose job should have been requeued, which SLURM refused for the reason `refusal`.

    `outcome`: as it would have been. `refusal`: scontrol's message, or `ENDED_BY_SLURM` if SLURM ends the job itself.
    """
    has_saved = outcome.step is not None
    return replace(
        outcome,
        exit_code=exit_codes.PREEMPTED if has_saved else outcome.exit_code,  # a saved run can be resumed by hand
        reason=f"{outcome.reason}; not requeued: {refusal}",
        # Of a job that SLURM ends, only SLURM knows whether it starts again.
        will_restart=None if refusal == ENDED_BY_SLURM else False,
    )


def _record_end(run_dir: Path, job: JobStart, outcome: JobOutcome) -> None:
    """Record in the run directory how this start of the job ended, for `shardtune status` and the next start.

    A full disk only prints a message, since the job must be requeued all the same.
    """
    try:
        record_job_end(
            run_dir,
            job.name,
            job.num_earlier_starts,
            outcome.exit_code,
            reason=outcome.reason,
            will_restart=outcome.will_restart,
            step=outcome.step,
            idle_starts=outcome.idle_starts,
        )
    except StorageError as error:
        print(f"job {job.name}: {error}", flush=True)


def _determine_outcome(
    job: JobStart, run_dir: Path, srun_exit_code: int, *, received_term: bool, has_started_ranks: bool
) -> JobOutcome:
    """Find out how a start of a job ended, from what its ranks recorded in the run directory, and whether the job starts again.

    Exit codes say little, because torchrun and srun lose those of the ranks. Records of an earlier start do not count. The first
    case that holds; the last two look at the recorded failure:

    - told to stop before a rank was started, or saved (`preempted`): requeued within limits;
    - done: not requeued;
    - a rank was lost or ran out of memory: requeued within limits. If only SLURM knows that memory ran out, this writes
      `failure.json`;
    - any other error, also one for which a preempted run was refused before it trained: not requeued.

    `srun_exit_code`: the exit code of the srun step. `received_term`: whether SLURM has sent TERM to the job script.
    """
    if not has_started_ranks:
        reached = "told to stop before its ranks were started"
        return _outcome_after_stop(job, run_dir, srun_exit_code, reached, saved_step=None, received_term=received_term)
    status = read_status(run_dir)
    run_state = status.get("state") if job.has_written(status) else None
    if run_state == RunState.preempted and not is_refused_start(status):
        saved_step = status.get("step")
        return _outcome_after_stop(
            job, run_dir, srun_exit_code, "state saved", saved_step=saved_step, received_term=received_term
        )
    if run_state == RunState.done:
        return JobOutcome(srun_exit_code, "done")

    failure = _failure_of_start(job, run_dir, srun_exit_code)
    if failure.retry_cause in RETRY_CAUSE_BY_KEY:  # never after an error of the run itself
        return _outcome_after_loss(job, run_dir, srun_exit_code, failure.retry_cause, received_term=received_term)
    return JobOutcome(srun_exit_code, " ".join(failure.reason.split()) or f"ended with exit code {srun_exit_code}")


class _FailureOfStart(NamedTuple):
    """Why the run failed in one start of its job."""

    reason: str
    """The message; empty if nobody knows."""
    retry_cause: str | None
    """The key of `launcher.retry` that allows another start, such as "node_fail"; None after an error of the run itself."""


def _failure_of_start(job: JobStart, run_dir: Path, srun_exit_code: int) -> _FailureOfStart:
    """Why the run failed in this start of its job: by its own record (`failure.json`), else by what SLURM says.

    A record of an earlier start does not count. If only SLURM knows that memory ran out, this writes the record.
    `srun_exit_code`: the exit code of the srun step that ran the ranks.
    """
    failure = read_failure(run_dir)
    reason = ""
    retry_cause = None
    if job.has_written(failure):
        reason = str(failure.get("message"))
        retry_cause = failure.get("retry")
    if reason or not srun_exit_code:
        return _FailureOfStart(reason, retry_cause)
    reason = (
        f"its ranks ended with exit code {srun_exit_code} and wrote no reason; their output is in {run_dir / 'logs'}"
    )
    if was_killed_for_memory(job):
        retry_cause = "out_of_memory"
        reason = f"{reason}. SLURM ended them for the memory limit of the job: raise launcher.mem, or lower batch.micro"
        record_failure(run_dir, rank=0, error=OutOfMemory(reason), phase="starting or training")
    return _FailureOfStart(reason, retry_cause)


def _outcome_after_stop(
    job: JobStart, run_dir: Path, srun_exit_code: int, reached: str, *, saved_step: int | None, received_term: bool
) -> JobOutcome:
    """The outcome of a start that was told to stop, such as before its time limit, and whether its job is requeued.

    An idle start is one that made no step before it was told to save. The job is requeued unless one of these holds; the first
    that does decides:

    - SLURM ends or preempts the job: only SLURM knows whether it starts again (`will_restart` None);
    - the job restarted as often as `launcher.retry` allows: the exit code is 75, the run can be resumed by hand;
    - `MAX_IDLE_STARTS` idle starts in a row: the exit code is 75 too.

    `srun_exit_code`: of the srun step.
    `reached`: what the run has reached, for the reason, such as "state saved".
    `saved_step`: the training step that was saved; None if there was nothing to save.
    """
    # Whether this start made a step since the one before it, whose progress the job's record tells.
    record = read_job_record(run_dir)
    earlier_step = 0
    earlier_idle_starts = 0
    if record is not None and record.job == job.name:
        earlier_step = record.step or 0
        earlier_idle_starts = record.idle_starts
    step = earlier_step if saved_step is None else saved_step
    idle_starts = earlier_idle_starts + 1 if step == earlier_step else 0
    outcome = JobOutcome(srun_exit_code, reached, step=step, idle_starts=idle_starts)

    if is_ended_by_slurm(job, received_term=received_term):
        reason = f"stopped by SLURM or by scancel, {reached}; not requeued from here"
        return replace(outcome, reason=reason, will_restart=None)
    max_restarts = _max_retries("preempted")
    if job.num_earlier_starts >= max_restarts:
        reason = (
            f"{reached}; not requeued, since it restarted {job.num_earlier_starts} times already (limit {max_restarts})"
        )
        return replace(outcome, exit_code=exit_codes.PREEMPTED, reason=reason)
    if idle_starts >= MAX_IDLE_STARTS:
        reason = (
            f"{reached}; not requeued, since {idle_starts} starts in a row made no step: set a longer launcher.time, or a "
            "shorter launcher.signal_lead_s"
        )
        return replace(outcome, exit_code=exit_codes.PREEMPTED, reason=reason)
    return replace(outcome, should_requeue=True)


def _max_retries(cause: str) -> int:
    """How often the run may be started again for a cause, by `launcher.retry`; the job script exports it as `retry_<cause>`."""
    return int(os.environ.get(f"retry_{cause}") or 0)


def _outcome_after_loss(
    job: JobStart, run_dir: Path, srun_exit_code: int, cause: str, *, received_term: bool
) -> JobOutcome:
    """The outcome of a start that lost a rank or ran out of memory, and whether its job is requeued.

    `cause`: a key of `launcher.retry`, "node_fail" or "out_of_memory".
    The job is requeued unless one of these holds; the first that does decides:

    - SLURM ends or preempts the job: only SLURM knows whether it starts again (`will_restart` None);
    - starts were lost for this cause more often than `launcher.retry` allows;
    - memory ran out, and the micro-batch cannot be halved.

    Unless SLURM ends the job, this start is recorded as lost. If memory ran out, the run's `config.yaml` is also rewritten with
    the halved micro-batch.
    `srun_exit_code`: the exit code of the srun step.
    """
    reason = RETRY_CAUSE_BY_KEY[cause].reason
    if is_ended_by_slurm(job, received_term=received_term):
        reason = f"stopped by SLURM or by scancel, and {reason}; not requeued from here"
        return JobOutcome(srun_exit_code, reason, will_restart=None)
    max_lost_starts = _max_retries(cause)
    num_lost_starts = record_lost_start(
        run_dir / "logs", job, file_prefix=RETRY_CAUSE_BY_KEY[cause].lost_starts_file_prefix
    )
    if num_lost_starts > max_lost_starts:
        return JobOutcome(
            srun_exit_code, f"{reason}; not requeued, since that happened more than {max_lost_starts} times"
        )
    if cause == "out_of_memory":
        from launch.cluster.oom_retry import write_smaller_settings

        settings_change = write_smaller_settings(run_dir)
        if settings_change is None:
            return JobOutcome(srun_exit_code, f"{reason}; not requeued, since batch.micro cannot be halved")
        reason = f"{reason}, {settings_change}"
    return JobOutcome(srun_exit_code, reason, should_requeue=True)
