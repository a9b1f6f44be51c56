"""Asks SLURM to start a job again, within the job's time limit; and reads how SLURM itself ended a job."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from types import FrameType
from typing import Protocol

from strategies.errors import ConfigError
from trainer.reporting.settings_file import read_tree

CALL_S = 60.0
"""Seconds that scontrol may take; without a controller it waits for minutes."""
FIRST_WAIT_S = 2.0
"""Seconds between the first two tries; the pause doubles from try to try."""
LONGEST_WAIT_S = 20.0
SCRIPT_END_S = 10.0
"""Seconds that are left of the job's time for the script to end: no further try is made then."""
DEFAULT_LEAD_S = 180.0
FINAL_REFUSALS = ("disabled", "denied", "Invalid job id", "not supported")
"""Words of scontrol after which another try is pointless."""
ENDED_BY_SLURM = "SLURM or scancel ends the job"
LAST_OUTPUT_BYTES = 2**16
MEMORY_KILL = re.compile(r"exceeded (job )?memory limit|oom[-_ ]kill", re.IGNORECASE)
"""What slurmstepd writes into the output of a job whose processes it has killed for memory."""


class NamedJob(Protocol):
    """A job with the name that scontrol takes."""

    @property
    def name(self) -> str: ...

    @property
    def restart(self) -> int: ...


class TermSignal:
    """Records whether TERM came to this process. While it exists, TERM does not end the process."""

    def __init__(self) -> None:
        self.received = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, _: int, __: FrameType | None) -> None:
        self.received = True


def lead_s(run_dir: Path) -> float:
    """Seconds that the end of a start may take: those by which SLURM's signal comes before the time limit."""
    try:
        lead = read_tree(run_dir / "config.yaml")["launcher"].get("signal_lead_s")
    except (ConfigError, KeyError, AttributeError):
        lead = None
    return float(lead or DEFAULT_LEAD_S)


def requeue(job: NamedJob, patience_s: float, term: TermSignal) -> str | None:
    """Ask SLURM to start the job again, until it agrees or `patience_s` seconds are over; returns why it did not, else None.

    The job's own time limit bounds the seconds, too.
    """
    end_time = os.environ.get("SLURM_JOB_END_TIME", "")
    if end_time.isdecimal():
        patience_s = min(patience_s, int(end_time) - time.time() - SCRIPT_END_S)
    deadline = time.monotonic() + patience_s
    wait_s = FIRST_WAIT_S
    while True:
        refusal = _request_requeue(job)
        if refusal is None:
            return None
        if any(words in refusal for words in FINAL_REFUSALS):
            return f"scontrol requeue failed: {refusal}"
        left_s = deadline - time.monotonic()
        if left_s < wait_s:
            return f"scontrol requeue failed until the end: {refusal}"
        print(f"job {job.name}: scontrol requeue failed: {refusal}; tried again for {left_s:.0f} s", flush=True)
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        # SLURM requeues a job that it preempts. Requeued from here as well, the job would run once too often.
        if term.received or ended_by_slurm(job, False):
            return ENDED_BY_SLURM


def _request_requeue(job: NamedJob) -> str | None:
    """Ask SLURM once to requeue the job; returns why it refused, None if it agreed."""
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job.name], capture_output=True, text=True, errors="replace", timeout=CALL_S
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {CALL_S:.0f} s"
    except OSError as error:
        return f"scontrol cannot be called ({error.strerror})"
    if done.returncode == 0:
        return None
    return " ".join((done.stderr or done.stdout).split()) or "without a word"


def ended_by_slurm(job: NamedJob, stopped: bool) -> bool:
    """Whether SLURM ends the job, or requeues it by itself: asking for it as well would run it once too often."""
    if stopped:
        return True
    try:
        done = subprocess.run(
            ["scontrol", "show", "job", job.name], capture_output=True, text=True, errors="replace", timeout=CALL_S
        )
    except (OSError, subprocess.SubprocessError):
        return False
    # `PreemptTime=None`, or the time at which SLURM decided to take the nodes away.
    return any(word.startswith("PreemptTime=") and word[12:13].isdigit() for word in done.stdout.split())


def killed_for_memory(job: NamedJob) -> bool:
    """Whether SLURM has killed processes of this start for memory, as it writes into the output of the job script."""
    output = Path(os.path.realpath("/proc/self/fd/1"))
    try:
        with output.open("rb") as file:
            file.seek(max(0, output.stat().st_size - LAST_OUTPUT_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return False
    start = f"job {job.name}, start {job.restart}, on "
    return MEMORY_KILL.search(text.rpartition(start)[2]) is not None
