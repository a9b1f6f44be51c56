"""Makes a run save and end: by a signal to its process, by SLURM, or with advice on what to type on another host."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launch.runs.owner import LeaseHolder, launcher_process, read_lease_holder
from launch.runs.queue import JobQueue, QueuedJob, unfinished_job_id
from strategies import exit_codes
from strategies.errors import ConfigError, ShardtuneError
from trainer.reporting.status import RunState
from trainer.session.lease_owner import process_identity

SHARDTUNE_SCRIPT_TEXT = "trap 'stopped=1"
"""Text in the job scripts of shardtune, which handle TERM: the run saves and ends, and the job is not requeued."""
SLURM_TIMEOUT_S = 60
"""Seconds that a command of SLURM's may take."""


class CannotStopError(ShardtuneError):
    """The run cannot be stopped from this host, or by this user; the message says what to type instead."""

    exit_code = exit_codes.CHECK_FAILED


@dataclass(frozen=True, slots=True)
class NotRunning:
    """Nothing has to be stopped: no process runs the run, and no job waits for it."""


@dataclass(frozen=True, slots=True)
class SignalProcess:
    """Stops a run by TERM to a process of this host: the run's own, or its launcher, which passes TERM on."""

    pid: int
    identity: str
    """`process_identity` of the process: its pid may be another process's by now."""

    def __str__(self) -> str:
        """The shell command that does the same."""
        return f"kill -TERM {self.pid}"

    def send(self) -> bool:
        """Send TERM, at which a run saves and ends; returns whether the process was still there.

        Raises CannotStopError if it is another user's process.
        """
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            # The pidfd stays with one process, even if that ends here and its pid is given to another one.
            if self.has_ended:
                return False
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        except ProcessLookupError:
            return False
        except PermissionError as error:
            raise CannotStopError(f"process {self.pid} is another user's: they have to stop it, or root") from error
        finally:
            os.close(pidfd)
        return True

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended, also if its pid is another process's by now."""
        return process_identity(self.pid) != self.identity


@dataclass(frozen=True, slots=True)
class SignalJob:
    """Stops a running job with a script of shardtune's: TERM to its shell, then USR2 to the ranks, which save and end."""

    job: QueuedJob

    @property
    def commands(self) -> list[list[str]]:
        """The calls of scancel, in order: after TERM the script does not requeue the job, so TERM must come first."""
        return [["scancel", "--batch", "--signal=TERM", self.job.id], ["scancel", "--signal=USR2", self.job.id]]

    def __str__(self) -> str:
        """The shell commands that do the same."""
        return "; ".join(shlex.join(command) for command in self.commands)

    def send(self) -> bool:
        """Send both signals; returns True: the job is there. Raises CannotStopError with scancel's message if it is not."""
        for command in self.commands:
            run_slurm_command(command)
        return True


@dataclass(frozen=True, slots=True)
class CancelJob:
    """Cancels a job that waits in the queue, and so has nothing to save."""

    job: QueuedJob

    def __str__(self) -> str:
        """The shell command that does the same."""
        return f"scancel {self.job.id}"

    def send(self) -> bool:
        """Take the job out of the queue; returns True: the job was there.

        Raises CannotStopError with scancel's message if not.
        """
        run_slurm_command(["scancel", self.job.id])
        return True


StopMethod = NotRunning | SignalProcess | SignalJob | CancelJob


def stop_method(run_dir: Path, queue: JobQueue, job: QueuedJob | None) -> StopMethod:
    """Find out how a run can be stopped from this host: by a signal, by SLURM, or not at all. The first case that applies:

    - A pending job with a script of shardtune's: cancel the job.
    - A running job with such a script: signal the job. Another script may react to a signal in any way.
    - A process on this host, also beside a job with another script: signal its launcher, or the process itself.
    - No job and no process on this host: nothing runs, or CannotStopError says on which host to stop it.
    - A job with another script, and no process on this host: CannotStopError says what to do.

    `job`: the run's job in the queue; None if it has none. Raises ConfigError if the lease, by which a process claims the
    run, cannot be read.
    """
    try:
        lease_holder = read_lease_holder(run_dir)
    except OSError as error:
        raise ConfigError(
            f"{run_dir / 'lease'}: cannot be read ({error.strerror}), so nobody knows who runs it"
        ) from error
    if job is not None and job.is_pending:
        if queue.job_by_run.get(run_dir.resolve()) is job or _runs_shardtune_script(job):
            return CancelJob(job)
    elif job is not None and _runs_shardtune_script(job):
        return SignalJob(job)
    owner = lease_holder.owner
    if owner is not None and lease_holder.is_alive:
        _raise_if_unrelated_process(run_dir, owner.pid)
        launcher = launcher_process(owner)
        if launcher is not None:  # it passes the signal on to the ranks, and does not start them again
            return SignalProcess(*launcher)
        return SignalProcess(owner.pid, owner.process)

    if job is None:
        return _method_without_local_process(run_dir, lease_holder, queue)
    if job.is_pending:
        raise CannotStopError(
            f"{run_dir}: job {job.id} waits in the queue, and its script is none of shardtune's. If it is for this run, take it "
            f"out of the queue: scancel {job.id}"
        )
    raise CannotStopError(
        f"{run_dir}: job {job.id} does not run a script of shardtune's, so nobody knows how it reacts to a signal. To save "
        f"and end: scancel --signal=USR2 {job.id} if srun started the ranks, else scancel --full "
        f"--signal=USR2 {job.id}; or type `shardtune stop {run_dir.absolute()}` on the host of the run"
    )


def raise_if_job_state_unknown(run_dir: Path, queue: JobQueue, state: str) -> None:
    """Raise CannotStopError if a run that nothing seems to run may still be waiting in SLURM's queue.

    It may if it was submitted, is not done, and the queue cannot be read.
    """
    submitted_job_id = unfinished_job_id(run_dir)
    is_queue_known = not queue.problem and not queue.has_no_squeue
    if submitted_job_id is None or state == RunState.done or is_queue_known:
        return
    reason = queue.problem or "squeue is not on PATH here"
    raise CannotStopError(
        f"{run_dir}: was submitted as job {submitted_job_id}; whether it still waits or runs is not known ({reason}). Try again "
        f"when squeue answers, or take the job out of the queue: scancel {submitted_job_id}"
    )


def _raise_if_unrelated_process(run_dir: Path, pid: int) -> None:
    """Make sure that the process to be signalled is really the run's: it must have a file of the run's directory open.

    The lease in a copied run names the process of the other run, and in somebody else's run it can name any process. Raises
    CannotStopError if it has no such file open.
    """
    if not _has_open_file_in(run_dir, pid):
        raise CannotStopError(
            f"{run_dir}: process {pid} is named as its owner, and has no file of that directory open that this user can see. "
            f"If it is the run's, end it by: kill -TERM {pid}"
        )


def _has_open_file_in(run_dir: Path, pid: int) -> bool:
    """Whether a process has the run's directory open, or a file in it, so that it may be the one that trains the run.

    False if its files cannot be seen by this user.
    """
    resolved_run_dir = run_dir.resolve()
    try:
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False
    for descriptor in descriptors:
        with suppress(OSError):  # closed meanwhile
            # By its path, or as the same directory: a container has other paths.
            if descriptor.readlink().is_relative_to(resolved_run_dir) or descriptor.samefile(resolved_run_dir):
                return True
    return False


def _method_without_local_process(run_dir: Path, lease_holder: LeaseHolder, queue: JobQueue) -> StopMethod:
    """Find out how to stop a run that has no job in this host's queue and no living process on this host.

    - No process seems to run it: `NotRunning`.
    - A job or process on another host runs it: CannotStopError, with what to type there.

    `lease_holder`: the process that claims the run, and how old its last heartbeat is.
    """
    owner = lease_holder.owner
    if owner is None or lease_holder.is_alive is False or lease_holder.is_heartbeat_late:
        return NotRunning()
    command = f"shardtune stop {shlex.quote(str(run_dir.absolute()))}"
    if owner.job is not None:
        queue_problem = f" ({queue.problem})" if queue.problem else ""
        raise CannotStopError(
            f"{run_dir}: SLURM job {owner.job} on {owner.host} runs it, and this host's queue does not have it as "
            f"yours{queue_problem}; where its user can call squeue, type: {command}"
        )
    raise CannotStopError(
        f"{run_dir}: process {owner.pid} on {owner.host} runs it, and no signal reaches it from here; "
        f"on {owner.host} type: {command}\n"
        f"  or, without shardtune there: kill -TERM {owner.pid}"
    )


def _runs_shardtune_script(job: QueuedJob) -> bool:
    """Whether a job runs a script of shardtune, however it was submitted: by the text of the script that SLURM keeps."""
    try:
        script = run_slurm_command(["scontrol", "write", "batch_script", job.raw_id, "-"])
    except CannotStopError:  # an allocation without a script
        return False
    return SHARDTUNE_SCRIPT_TEXT in script


def run_slurm_command(command: list[str]) -> str:
    """Run a command of SLURM that stopping a run needs, and return what it prints.

    Raises CannotStopError if the command is not on this host, does not answer, or fails.
    """
    try:
        completed = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SLURM_TIMEOUT_S)
    except FileNotFoundError as error:
        raise CannotStopError(
            f"{command[0]} is not on PATH here; on a host that has it type: {shlex.join(command)}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise CannotStopError(f"{shlex.join(command)}: no answer within {SLURM_TIMEOUT_S} s; try again") from error
    if completed.returncode:
        raise CannotStopError(f"{shlex.join(command)}: {(completed.stderr or completed.stdout).strip()}")
    return completed.stdout
