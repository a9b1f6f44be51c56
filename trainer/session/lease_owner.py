"""Who owns a run directory: the process that a claim names, and whether it still lives on this host."""

from __future__ import annotations

import os
import socket
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

HEARTBEATS_PER_TIMEOUT = 12
"""Heartbeats that an owner writes within the time after which it is taken for dead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseOwner:
    """The content of a claim: the attempt that made it. The fields are the keys of the JSON file."""

    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    process: str = ""
    """Identity of the process on its host, from `process_identity`. No clock time is in it."""
    job: str | None = None
    task: str | None = None
    """Array and task of the job, as scancel takes it."""
    restart: int = 0  # how often SLURM has requeued the job
    since: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))
    """Local time, to be read by people."""
    beat_s: float = 10.0
    """Seconds between two heartbeats."""

    @property
    def is_torn(self) -> bool:
        """Whether the claim exists and cannot be read, since its host crashed while it was written."""
        return self.token == ""

    def describe(self) -> str:
        """The attempt in words, for a message."""
        start = f", start {self.restart}" if self.restart else ""
        job = f", SLURM job {self.task or self.job}{start}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


def owner_of_this_process(lease_timeout_s: float) -> LeaseOwner:
    """Describe this process as it would own a run directory: its host, its process and its SLURM job.

    `lease_timeout_s`: seconds without a heartbeat after which others take it for dead; it promises one in a twelfth of that time.
    `task` of the result is set only in a job array, such as `4711_3`.
    """
    job = os.environ.get("SLURM_JOB_ID")
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    task = None
    if job and array:
        task = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}"
    return LeaseOwner(
        process=process_identity(os.getpid()),
        job=job,
        task=task,
        # SLURM counts how often it has requeued the job, so that a later start knows an earlier one.
        restart=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        beat_s=lease_timeout_s / HEARTBEATS_PER_TIMEOUT,
    )


def process_identity(pid: int) -> str:
    """Identify a process of this host: process ids are used again, but not with the same boot and start time.

    Returns "<boot id>/<namespace of process ids>/<start in ticks>"; empty if the process is gone, or on systems other than Linux.
    """
    if sys.platform != "linux":
        return ""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        # Fields of proc(5) behind the second one, the name in brackets, which may contain blanks.
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        state, *fields = stat.rpartition(")")[2].split()
        if state in "ZX":  # a zombie or dead process holds nothing any more
            return ""
        namespace = os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116
        start_ticks = fields[18]  # field 22, `starttime`
        return f"{boot}/{namespace}/{start_ticks}"
    except (OSError, IndexError):
        return ""


def is_alive_here(owner: LeaseOwner, this_process: LeaseOwner) -> bool | None:
    """Whether the owner of a claim is a living process of this host; None if this host cannot tell.

    `this_process`: what a claim of this process would say; boot and namespace of process ids are compared with it.
    """
    owner_identity = owner.process.split("/")  # boot id, namespace of process ids, start of the process
    identity_of_this_process = this_process.process.split("/")
    same_host = len(owner_identity) == 3 and owner_identity[:2] == identity_of_this_process[:2]
    if not same_host:  # another host, the same one before a reboot, or another container
        return None
    identity_now = process_identity(owner.pid)  # empty if there is no such process, or /proc does not show it
    if not identity_now and _is_process_of_other_user(owner.pid):
        return None
    return identity_now == owner.process


def _is_process_of_other_user(pid: int) -> bool:
    """Whether a process exists and is another user's: /proc may not show those (`hidepid`)."""
    try:
        os.kill(pid, 0)  # sends no signal, only checks that one could be sent
    except PermissionError:
        return True
    except OSError:
        return False
    return False
