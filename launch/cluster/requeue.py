"""Asks SLURM to start a job again, within the job's time limit; and reads how SLURM itself ended a job."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from types import FrameType
from typing import Protocol

from strategies.errors import ConfigError
from trainer.reporting.settings_file import read_settings_tree

SCONTROL_TIMEOUT_S = 60.0
"""Seconds that scontrol may take; without a controller it waits for minutes."""
FIRST_WAIT_S = 2.0
"""Seconds between the first two attempts; the pause doubles from attempt to attempt."""
LONGEST_WAIT_S = 20.0
SCRIPT_END_S = 10.0
"""Seconds that are left of the job's time for the script to end: no further attempt is made then."""
DEFAULT_LEAD_S = 180.0
FINAL_REFUSALS = ("disabled", "denied", "Invalid job id", "not supported")
"""Phrases in scontrol's messages after which another attempt is pointless."""
ENDED_BY_SLURM = "SLURM or scancel ends the job"
LAST_OUTPUT_BYTES = 2**16
MEMORY_KILL_REGEX = re.compile(r"exceeded (job )?memory limit|oom[-_ ]kill", re.IGNORECASE)
"""What slurmstepd writes into the output of a job whose processes it has killed for memory."""


class StartedJob(Protocol):
    """A job with the name that scontrol takes."""

    @property
    def name(self) -> str: ...

    @property
    def num_earlier_starts(self) -> int: ...


class TermSignal:
    """Records whether TERM came to this process. While it exists, TERM does not end the process."""

    def __init__(self) -> None:
        self.received = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, _: int, __: FrameType | None) -> None:
        self.received = True


def signal_lead_s(run_dir: Path) -> float:
    """How many seconds before a job's time limit SLURM signals it to save and end: the run's `launcher.signal_lead_s`.

    `DEFAULT_LEAD_S` if the setting is 0, or cannot be read.
    """
    try:
        lead_s = read_settings_tree(run_dir / "config.yaml")["launcher"].get("signal_lead_s")
    except (ConfigError, KeyError, AttributeError):
        lead_s = None
    return float(lead_s or DEFAULT_LEAD_S)


def request_requeue_repeatedly(job: StartedJob, patience_s: float, term: TermSignal) -> str | None:
    """Ask SLURM to start the job again, until it agrees or `patience_s` seconds are over; returns None if it agreed.

    SLURM's controller may be down for a while. The job's own time limit bounds the attempts too.
    `term`: records whether this process received SIGTERM meanwhile.
    Otherwise returns why it did not agree:

    - "scontrol requeue failed: ..." after a refusal that is final (`FINAL_REFUSALS`);
    - "scontrol requeue failed until the end: ..." if it refused each time;
    - `ENDED_BY_SLURM` if SLURM ends or preempts the job itself meanwhile.
    """
    end_time = os.environ.get("SLURM_JOB_END_TIME", "")
    if end_time.isdecimal():
        remaining_s = int(end_time) - time.time() - SCRIPT_END_S
        patience_s = min(patience_s, remaining_s)
    deadline = time.monotonic() + patience_s
    wait_s = FIRST_WAIT_S
    while True:
        refusal = _request_requeue(job)
        if refusal is None:
            return None
        if any(phrase in refusal for phrase in FINAL_REFUSALS):
            return f"scontrol requeue failed: {refusal}"
        remaining_s = deadline - time.monotonic()
        if remaining_s < wait_s:
            return f"scontrol requeue failed until the end: {refusal}"
        print(f"job {job.name}: scontrol requeue failed: {refusal}; tried again for {remaining_s:.0f} s", flush=True)
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        # SLURM requeues a job that it preempts. Requeued from here as well, the job would run once too often.
        if is_ended_by_slurm(job, received_term=term.received):
            return ENDED_BY_SLURM


def _request_requeue(job: StartedJob) -> str | None:
    """Ask SLURM once to requeue the job; returns why it refused, None if it agreed."""
    command = ["scontrol", "requeue", job.name]
    try:
        scontrol = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SCONTROL_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"no answer within {SCONTROL_TIMEOUT_S:.0f} s"
    except OSError as error:
        return f"scontrol cannot be called ({error.strerror})"
    if scontrol.returncode == 0:
        return None
    message = scontrol.stderr or scontrol.stdout
    return " ".join(message.split()) or "without a word"


def is_ended_by_slurm(job: StartedJob, *, received_term: bool) -> bool:
    """Whether SLURM ends or preempts the job. Then only SLURM requeues it: from here as well would be once too often.

    `received_term`: whether the job script or this process received SIGTERM. If so, the answer is True without asking SLURM.
        Otherwise `scontrol show job` says whether SLURM preempts the job; False if scontrol does not answer.
    """
    if received_term:
        return True
    command = ["scontrol", "show", "job", job.name]
    try:
        scontrol = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SCONTROL_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return False
    # "PreemptTime=None", or the time at which SLURM decided to take the nodes away: "PreemptTime=2026-01-31T12:00:00".
    for job_field in scontrol.stdout.split():
        name, _, value = job_field.partition("=")
        if name == "PreemptTime" and value[:1].isdigit():
            return True
    return False


def was_killed_for_memory(job: StartedJob) -> bool:
    """Whether SLURM has killed processes of this start of the job for memory, which no rank could record.

    slurmstepd writes it into the job's output, the file behind this process's stdout. False if that cannot be read.
    """
    output_file = Path(os.path.realpath("/proc/self/fd/1"))
    try:
        with output_file.open("rb") as file:
            file.seek(max(0, output_file.stat().st_size - LAST_OUTPUT_BYTES))
            output = file.read().decode(errors="replace")
    except OSError:
        return False
    # All starts of a job append to one file. The job script prints this line at each start.
    first_line = f"job {job.name}, start {job.num_earlier_starts}, on "
    _, _, output_of_start = output.rpartition(first_line)
    return MEMORY_KILL_REGEX.search(output_of_start) is not None
