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
FIRST_WAIT_S, LONGEST_WAIT_S = 2.0, 20.0
"""Seconds between two tries: they double."""
END_S = 10.0
"""Seconds before the end of the job's time at which it is not tried again: the script has still to end."""
DEFAULT_LEAD_S = 180.0
FINAL_REFUSALS = ("disabled", "denied", "Invalid job id", "not supported")
"""In the words of scontrol: it will not be taken later either."""
BY_SLURM = "SLURM or scancel ends the job"
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
    """Whether TERM came to this process. From its construction on TERM does not end it."""

    def __init__(self) -> None:
        self.came = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, _: int, __: FrameType | None) -> None:
        self.came = True


def lead_s(run_dir: Path) -> float:
    """Seconds that the end of a start may take: those by which SLURM's signal comes before the time limit."""
    try:
        lead = read_tree(run_dir / "config.yaml")["launcher"].get("signal_lead_s")
    except (ConfigError, KeyError, AttributeError):
        lead = None
    return float(lead or DEFAULT_LEAD_S)


def requeue(job: NamedJob, patience_s: float, term: TermSignal) -> str | None:
    """Ask SLURM to start the job again, until it takes that or `patience_s` seconds are over; why it did not, else None.

    The job's own time limit bounds the seconds, too.
    """
    end_time = os.environ.get("SLURM_JOB_END_TIME", "")
    if end_time.isdecimal():
        patience_s = min(patience_s, int(end_time) - time.time() - END_S)
    deadline = time.monotonic() + patience_s
    wait_s = FIRST_WAIT_S
    while True:
        refusal = _ask(job)
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
        # Both together would run the job once too often.
        if term.came or by_slurm(job, False):
            return BY_SLURM


def _ask(job: NamedJob) -> str | None:
    """Ask once; why SLURM did not take it."""
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


def by_slurm(job: NamedJob, stopped: bool) -> bool:
    """Whether SLURM ends the job, or requeues it by itself: asking for it as well would run it once too often."""
    if stopped:
        return True
    try:
        done = subprocess.run(
            ["scontrol", "show", "job", job.name], capture_output=True, text=True, errors="replace", timeout=CALL_S
        )
    except (OSError, subprocess.SubprocessError):
        return False
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
