"""How a run is made to save and end: a signal to its process, SLURM, or advice for somebody on another host."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launch.runs.owner import Holder, holder, launcher_of
from launch.runs.queue import Queue, QueuedJob, unfinished_job
from strategies.errors import ConfigError, ShardtuneError
from trainer.reporting.status import State
from trainer.session.lease import process_identity

SCRIPT_MARK = "trap 'stopped=1"
"""Text in a job script that handles TERM: it saves, ends, and is not requeued."""
CALL_S = 60
"""Seconds that a command of SLURM's may take."""


class CannotStop(ShardtuneError):
    """The run cannot be stopped from here."""

    exit_code = 69


@dataclass(frozen=True, slots=True)
class NotRunning:
    """No process runs the run."""


@dataclass(frozen=True, slots=True)
class SignalProcess:
    """TERM to a process of this host: that of the run, or the launcher that passes it on and does not start it again."""

    pid: int
    identity: str
    """As `process_identity` has it: the number may be another process's by now."""

    def __str__(self) -> str:
        return f"kill -TERM {self.pid}"

    def send(self) -> bool:
        """Send it; whether the process was still there. Raises CannotStop where it is another user's."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            # The handle is of one process, whatever its number is given to later.
            if self.has_ended:
                return False
            signal.pidfd_send_signal(handle, signal.SIGTERM)
        except ProcessLookupError:
            return False
        except PermissionError as error:
            raise CannotStop(f"process {self.pid} is another user's: they have to stop it, or root") from error
        finally:
            os.close(handle)
        return True

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended."""
        return process_identity(self.pid) != self.identity


@dataclass(frozen=True, slots=True)
class SignalJob:
    """Signals to a job that runs our script: TERM to its shell, then USR2 to the ranks, which save."""

    job: QueuedJob

    @property
    def commands(self) -> list[list[str]]:
        """In their order: after the first the script requeues nothing."""
        return [["scancel", "--batch", "--signal=TERM", self.job.id], ["scancel", "--signal=USR2", self.job.id]]

    def __str__(self) -> str:
        return "; ".join(shlex.join(command) for command in self.commands)

    def send(self) -> None:
        """Send both. Raises CannotStop with scancel's words."""
        for command in self.commands:
            call_slurm(command)


@dataclass(frozen=True, slots=True)
class CancelJob:
    """Cancels a job that waits in the queue, and so has nothing to save."""

    job: QueuedJob

    def __str__(self) -> str:
        return f"scancel {self.job.id}"

    def send(self) -> None:
        """Take it out of the queue. Raises CannotStop with scancel's words."""
        call_slurm(["scancel", self.job.id])


StopMethod = NotRunning | SignalProcess | SignalJob | CancelJob


def stop_method(run_dir: Path, queue: Queue, job: QueuedJob | None) -> StopMethod:
    """How the run is stopped; `job` is its job in the queue. Raises CannotStop, with what to type, if it cannot be from here."""
    try:
        lease_holder = holder(run_dir)
    except OSError as error:
        raise ConfigError(
            f"{run_dir / 'lease'}: cannot be read ({error.strerror}), so nobody knows who runs it"
        ) from error
    if job is not None:
        if job.is_pending and (queue.by_run.get(run_dir.resolve()) is job or _runs_our_script(job)):
            return CancelJob(job)
        if not job.is_pending and _runs_our_script(job):
            return SignalJob(job)
    owner = lease_holder.owner
    if owner is not None and lease_holder.is_alive:
        _refuse_foreign(run_dir, owner.pid)
        launcher = launcher_of(owner)
        if launcher is not None:  # it passes the signal on, and does not start the ranks again
            return SignalProcess(*launcher)
        return SignalProcess(owner.pid, owner.process)
    if job is None:
        return _not_from_here(run_dir, lease_holder, queue)
    if job.is_pending:
        raise CannotStop(
            f"{run_dir}: job {job.id} waits in the queue, and its script is none of shardtune's. If it is for this run, take it "
            f"out of the queue: scancel {job.id}"
        )
    raise CannotStop(
        f"{run_dir}: job {job.id} does not run a script of shardtune's, so nobody knows how it reacts to a signal. To save "
        f"and end: scancel --signal=USR2 {job.id} if srun started the ranks, else scancel --full "
        f"--signal=USR2 {job.id}; or type `shardtune stop {run_dir.absolute()}` on the host of the run"
    )


def refuse_unknown(run_dir: Path, queue: Queue, state: str) -> None:
    """Refuse to say that nothing runs while nobody knows whether the run's job waits in the queue. Errors: CannotStop."""
    job = unfinished_job(run_dir)
    if job is None or state == State.done or not (queue.problem or queue.has_no_squeue):
        return
    why = queue.problem or "squeue is not on PATH here"
    raise CannotStop(
        f"{run_dir}: was submitted as job {job}; whether it still waits or runs is not known ({why}). Try again when "
        f"squeue answers, or take the job out of the queue: scancel {job}"
    )


def _refuse_foreign(run_dir: Path, pid: int) -> None:
    """Refuse a process that does not work in the run's directory. Errors: CannotStop.

    The claim in a copied run names the process of the other run, and in somebody else's run it can name any process.
    """
    if not _works_in(run_dir, pid):
        raise CannotStop(
            f"{run_dir}: process {pid} is named as its owner, and has no file of that directory open that this user can see. "
            f"If it is the run's, end it by: kill -TERM {pid}"
        )


def _works_in(run_dir: Path, pid: int) -> bool:
    """Whether a process has the directory of a run open, or a file in it."""
    home = run_dir.resolve()
    try:
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False
    for descriptor in descriptors:
        with suppress(OSError):  # closed meanwhile
            # By its path, or as the same directory: a container has other paths.
            if descriptor.readlink().is_relative_to(home) or descriptor.samefile(home):
                return True
    return False


def _not_from_here(run_dir: Path, lease_holder: Holder, queue: Queue) -> StopMethod:
    """For a run without a job in the queue and without a living process on this host. Errors: CannotStop if it runs elsewhere."""
    owner = lease_holder.owner
    if owner is None or lease_holder.is_alive is False or lease_holder.is_silent:
        return NotRunning()
    command = f"shardtune stop {shlex.quote(str(run_dir.absolute()))}"
    if owner.job is not None:
        why = f" ({queue.problem})" if queue.problem else ""
        raise CannotStop(
            f"{run_dir}: SLURM job {owner.job} on {owner.host} runs it, and this host's queue does not have it as yours{why}; "
            f"where its user can call squeue, type: {command}"
        )
    raise CannotStop(
        f"{run_dir}: process {owner.pid} on {owner.host} runs it, and no signal reaches it from here; "
        f"on {owner.host} type: {command}\n"
        f"  or, without shardtune there: kill -TERM {owner.pid}"
    )


def _runs_our_script(job: QueuedJob) -> bool:
    """Whether the job runs our script, however it was submitted."""
    try:
        return SCRIPT_MARK in call_slurm(["scontrol", "write", "batch_script", job.raw_id, "-"])
    except CannotStop:  # an allocation without a script
        return False


def call_slurm(command: list[str]) -> str:
    """The output of a command of SLURM's. Raises CannotStop with its message if it fails."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=CALL_S)
    except FileNotFoundError as error:
        raise CannotStop(
            f"{command[0]} is not on PATH here; on a host that has it type: {shlex.join(command)}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise CannotStop(f"{shlex.join(command)}: no answer within {CALL_S} s; try again") from error
    if answer.returncode:
        raise CannotStop(f"{shlex.join(command)}: {(answer.stderr or answer.stdout).strip()}")
    return answer.stdout
