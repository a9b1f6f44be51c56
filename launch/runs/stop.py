"""Ways to make a run save and end: a signal to its process, SLURM, or advice for somebody on another host."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launch.runs.owner import Holder, holder, launcher
from launch.runs.queue import Queue, QueuedJob, unfinished_job
from strategies.errors import ConfigError, ShardtuneError
from trainer.reporting.status import State
from trainer.session.lease import process_identity

MARK = "trap 'stopped=1"
"""What a job script has that ends in good order, and is not requeued, once its shell was told TERM."""
CALL_S = 60
"""Seconds that a command of SLURM's may take."""


class CannotStop(ShardtuneError):
    """The run cannot be stopped from here."""

    exit_code = 69


@dataclass(frozen=True, slots=True)
class Nothing:
    """Nobody runs it."""


@dataclass(frozen=True, slots=True)
class Signal:
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
            if self.gone:
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
    def gone(self) -> bool:
        """Whether the process has ended."""
        return process_identity(self.pid) != self.identity


@dataclass(frozen=True, slots=True)
class Slurm:
    """A job that runs our script: its shell is told first that this is the end, then the ranks that they are to save."""

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
            call(command)


@dataclass(frozen=True, slots=True)
class Cancel:
    """A job that pends: it has nothing to save."""

    job: QueuedJob

    def __str__(self) -> str:
        return f"scancel {self.job.id}"

    def send(self) -> None:
        """Take it out of the queue. Raises CannotStop with scancel's words."""
        call(["scancel", self.job.id])


Way = Nothing | Signal | Slurm | Cancel


def way(run_dir: Path, queue: Queue, job: QueuedJob | None) -> Way:
    """How the run is stopped; `job` is its job in the queue. Raises CannotStop, with what to type, if it cannot be from here."""
    try:
        held = holder(run_dir)
    except OSError as error:
        raise ConfigError(
            f"{run_dir / 'lease'}: cannot be read ({error.strerror}), so nobody knows who runs it"
        ) from error
    if job is not None and job.pends and (queue.by_run.get(run_dir.resolve()) is job or _is_ours(job)):
        return Cancel(job)
    if job is not None and not job.pends and _is_ours(job):
        return Slurm(job)
    if held.owner is not None and held.lives:
        _refuse_foreign(run_dir, held.owner.pid)
        started_by = launcher(held.owner)
        return Signal(*started_by) if started_by else Signal(held.owner.pid, held.owner.process)
    if job is not None and job.pends:
        raise CannotStop(
            f"{run_dir}: job {job.id} waits in the queue, and its script is none of shardtune's. If it is for this run, take it "
            f"out of the queue: scancel {job.id}"
        )
    if job is not None:
        raise CannotStop(
            f"{run_dir}: job {job.id} does not run a script of shardtune's, so nobody knows what follows when it is told to "
            f"stop. To save and end: scancel --signal=USR2 {job.id} where srun started the ranks, else scancel --full "
            f"--signal=USR2 {job.id}; or type `shardtune stop {run_dir.absolute()}` on the host of the run"
        )
    return _elsewhere(run_dir, held, queue)


def refuse_unknown(run_dir: Path, queue: Queue, state: str) -> None:
    """Refuse to say that nothing runs while nobody knows whether the run's job waits in the queue. Errors: CannotStop."""
    job = unfinished_job(run_dir)
    if job is None or state == State.done or not (queue.problem or queue.missing):
        return
    why = queue.problem or "squeue is not on PATH here"
    raise CannotStop(
        f"{run_dir}: was submitted as job {job}, and whether that still waits or runs is not known ({why}). Try again when "
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


def _elsewhere(run_dir: Path, held: Holder, queue: Queue) -> Way:
    """A run without a job in the queue, and without a process of this host that lives."""
    owner = held.owner
    if owner is None or held.lives is False or held.silent:
        return Nothing()
    here = f"shardtune stop {shlex.quote(str(run_dir.absolute()))}"
    if owner.job is not None:
        why = f" ({queue.problem})" if queue.problem else ""
        raise CannotStop(
            f"{run_dir}: SLURM job {owner.job} on {owner.host} runs it, and this host's queue does not have it as yours{why}; "
            f"where its user can call squeue, type: {here}"
        )
    raise CannotStop(
        f"{run_dir}: process {owner.pid} on {owner.host} runs it, and no signal reaches it from here; "
        f"on {owner.host} type: {here}\n"
        f"  where shardtune is not at hand there: kill -TERM {owner.pid}"
    )


def _is_ours(job: QueuedJob) -> bool:
    """Whether the job runs our script, in which way ever it was submitted."""
    try:
        return MARK in call(["scontrol", "write", "batch_script", job.raw_id, "-"])
    except CannotStop:  # an allocation without a script
        return False


def call(command: list[str]) -> str:
    """What a command of SLURM's says. Raises CannotStop with its words where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=CALL_S)
    except FileNotFoundError as error:
        raise CannotStop(
            f"{command[0]} is not on PATH here; on a host that has it type: {shlex.join(command)}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise CannotStop(f"{shlex.join(command)}: no answer within {CALL_S} s; try again") from error
    if done.returncode:
        raise CannotStop(f"{shlex.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
