"""Measures what one start of a SLURM job used of its allocation, and what that cost: time, CPUs, memory, GPUs.

The numbers come from SLURM's `sacct`; what it does not know is reported as unknown. Each start is a line of
`<run>/jobs.jsonl`, and `run.json` has all of them. Needs no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from launch.config.prices import gpu_hour_price
from launch.runs.slurm_time import format_slurm_time
from trainer.reporting.results import add_to_run_record
from trainer.reporting.run_record import RunRecord, readable_run_record

JOB_STARTS_FILE = "jobs.jsonl"
"""The file in a run's directory with what each start of its jobs used."""
SACCT_FIELDS = ("JobIDRaw", "State", "ElapsedRaw", "TotalCPU", "AllocCPUS", "MaxRSS", "TRESUsageInAve")
SACCT_TIMEOUT_S = 10.0
"""Seconds that sacct may take."""
SACCT_ATTEMPTS = 3
"""Calls of sacct: the end of a job's step reaches SLURM's data base a moment later."""
SACCT_RETRY_S = 1.0
"""Seconds between two calls of sacct."""
CPU_TIME_REGEX = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)")
SIZE_REGEX = re.compile(r"([\d.]+)([KMGT]?)")
GPU_UTILISATION_REGEX = re.compile(r"gres/gpuutil=(\d+)")
"""In sacct's `TRESUsageInAve`, such as `cpu=00:01:30,gres/gpuutil=180`: per cent, summed over the GPUs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StartUsage:
    """What one start of a job used; what is not known is None. The field names are the keys of `jobs.jsonl`."""

    job: str
    start: int
    code: int
    """Exit code of its ranks."""
    elapsed_s: float | None = None
    limit_s: float | None = None
    nodes: int | None = None
    cpus: int | None = None
    """CPUs that were allocated on all nodes together."""
    cpu_share: float | None = None
    """CPU time that was used, over elapsed time times allocated CPUs; 1 if all were busy all the time."""
    memory_gib: float | None = None
    """Peak memory of the processes of a node, of the node with the most."""
    memory_asked_gib: float | None = None
    """Memory that was requested for each node."""
    gpus: int | None = None
    gpu_share: float | None = None
    """Mean utilisation of the GPUs, from 0 to 1, as SLURM sampled it."""
    dollars: float | None = None
    """What all GPUs cost for the elapsed time, in US dollars."""
    price_per_hour: float | None = None
    """US dollars an hour for one GPU."""
    unknown: str | None = None
    """Why SLURM's figures are missing."""


def record_start_usage(
    run_dir: Path, job_id: str, start_number: int, exit_code: int, env: Mapping[str, str] = os.environ
) -> str:
    """Measure what a start of a SLURM job used of its allocation, keep it in the run's files, and return a line for the log.

    Called at the end of each start that has started the ranks; a job that is requeued has several.

    `start_number`: 0 for the first one, then one more for each requeue.

    Writes `jobs.jsonl` and `run.json`. Never raises: a missing figure must not end the job script.
    """
    usage = measure_start(run_dir, job_id, start_number, exit_code, env)
    line = start_usage_text(asdict(usage))
    try:
        with (run_dir / JOB_STARTS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(usage)) + "\n")
        add_to_run_record(run_dir, "jobs", recorded_starts(run_dir))
    except OSError as error:
        return f"{line}; not recorded ({error.strerror or error})"
    return line


def measure_start(run_dir: Path, job_id: str, start_number: int, exit_code: int, env: Mapping[str, str]) -> StartUsage:
    """Measure what a start of a job used until now: time, CPUs, memory and GPUs, each None where it is not known.

    The figures come from SLURM's variables in `env`, from sacct (SLURM's accounting), and from `run.json`. A job has
    several starts if it is requeued.
    """
    # The time is taken before sacct is called, which may take half a minute.
    began_at = _number_or_none(env.get("SLURM_JOB_START_TIME"))
    ends_at = _number_or_none(env.get("SLURM_JOB_END_TIME"))
    elapsed_s = time.time() - began_at if began_at else None
    limit_s = ends_at - began_at if began_at and ends_at else None

    answer = _ask_sacct(env.get("SLURM_JOB_ID", job_id))
    # The ranks run as a step of the job; other rows are of the whole job and of its script.
    ranks_row = next((row for row in answer.rows if _is_ranks_step(row)), {})
    why_unknown = answer.problem
    if not why_unknown and not ranks_row:
        why_unknown = "sacct knows no step of the job"
    if elapsed_s is None:
        elapsed_s = _number_or_none(ranks_row.get("ElapsedRaw"))

    requested_memory_mib = _number_or_none(env.get("SLURM_MEM_PER_NODE"))
    return StartUsage(
        job=job_id,
        start=start_number,
        code=exit_code,
        elapsed_s=elapsed_s,
        limit_s=limit_s,
        nodes=int(env.get("SLURM_JOB_NUM_NODES") or 0) or None,
        memory_gib=_parse_size_gib(ranks_row.get("MaxRSS", "")),
        memory_asked_gib=requested_memory_mib / 1024 if requested_memory_mib else None,
        unknown=why_unknown,
        **_cpu_usage(ranks_row),
        **_gpu_usage(ranks_row, readable_run_record(run_dir), elapsed_s),
    )


def _cpu_usage(ranks_row: Mapping[str, str]) -> dict[str, Any]:
    """How many CPUs the ranks had, and how busy these were: the fields `cpus` and `cpu_share` of `StartUsage`.

    `ranks_row`: sacct's row of the ranks' step, such as {"AllocCPUS": "16", "TotalCPU": "03:10:00", ...}; empty if it has
    none.
    """
    cpus = int(ranks_row.get("AllocCPUS") or 0) or None
    cpu_s = _parse_cpu_time(ranks_row.get("TotalCPU", ""))
    step_elapsed_s = _number_or_none(ranks_row.get("ElapsedRaw"))
    cpu_share = None
    if cpu_s is not None and step_elapsed_s and cpus:
        cpu_share = cpu_s / (step_elapsed_s * cpus)
    return {"cpus": cpus, "cpu_share": cpu_share}


def _gpu_usage(ranks_row: Mapping[str, str], run_record: RunRecord, elapsed_s: float | None) -> dict[str, Any]:
    """How many GPUs the run has, how busy they were, and what they cost for the elapsed time: fields of `StartUsage`.

    Empty if the run has no GPU. `ranks_row`: sacct's row of the ranks' step; empty if it has none.
    """
    gpus = run_record.world_size  # a rank has a GPU each
    if not run_record.device_name or not gpus:
        return {}
    gpu_share = None  # how busy they were on average, 0 to 1
    # SLURM sums the utilisation of all GPUs: 180 for two GPUs that are 90 % busy.
    summed_percent = GPU_UTILISATION_REGEX.search(ranks_row.get("TRESUsageInAve", ""))
    if summed_percent:
        gpu_share = min(1.0, int(summed_percent[1]) / 100 / gpus)
    price_per_hour = gpu_hour_price(run_record.device_name)
    dollars = None
    if price_per_hour is not None and elapsed_s:
        dollars = price_per_hour * gpus * elapsed_s / 3600
    return {"gpus": gpus, "gpu_share": gpu_share, "dollars": dollars, "price_per_hour": price_per_hour}


def _is_ranks_step(row: Mapping[str, str]) -> bool:
    """Whether a row of sacct is of the srun that runs the ranks: step 0. Others are of the whole job and of its script."""
    return row["JobIDRaw"].endswith(".0")


def start_usage_text(usage: Mapping[str, Any]) -> str:
    """Write a line on what a start of a job used: `job 17, start 0: 1:02:03 of 2:00:00 (52%), 8 GPUs 91% busy, $12.34`.

    `usage` has the keys of `StartUsage`, as `recorded_starts` returns them.
    """
    clauses = [*_time_and_cpu_clauses(usage), *_gpu_clauses(usage)]
    if usage.get("unknown"):
        clauses.append(str(usage["unknown"]))
    return f"job {usage.get('job')}, start {usage.get('start')}: {', '.join(clauses) or 'nothing is known'}"


def _time_and_cpu_clauses(usage: Mapping[str, Any]) -> list[str]:
    """Clauses on what a start of a job used: ["1:02:03 of 2:00:00 (52%)", "60% of 16 CPUs", "40 of 64 GiB of a node"].

    `usage` has the keys of `StartUsage`. What is not known has no clause.
    """
    clauses = []
    elapsed_s = usage.get("elapsed_s")
    if elapsed_s is not None:
        limit_s = usage.get("limit_s")
        of_limit = f" of {format_slurm_time(limit_s)} ({elapsed_s / limit_s:.0%})" if limit_s else ""
        clauses.append(f"{format_slurm_time(elapsed_s)}{of_limit}")
    if usage.get("cpu_share") is not None:
        clauses.append(f"{usage['cpu_share']:.0%} of {usage['cpus']} CPUs")
    memory_gib = usage.get("memory_gib")
    if memory_gib is not None:
        requested_gib = usage.get("memory_asked_gib")
        of_requested = f" of {requested_gib:.3g}" if requested_gib else ""
        clauses.append(f"{memory_gib:.3g}{of_requested} GiB of a node")
    return clauses


def _gpu_clauses(usage: Mapping[str, Any]) -> list[str]:
    """Clauses on how busy the GPUs of a start were, and what they cost: ["8 GPUs 91% busy", "$12.34"]; none without GPUs.

    `usage` has the keys of `StartUsage`.
    """
    if not usage.get("gpus"):
        return []
    utilisation = f"{usage['gpus']} GPUs, how busy is not known"
    if usage.get("gpu_share") is not None:
        utilisation = f"{usage['gpus']} GPUs {usage['gpu_share']:.0%} busy"
    price = "price not known"
    if usage.get("dollars") is not None:
        price = f"${usage['dollars']:,.2f}"
    return [utilisation, price]


def recorded_starts(run_dir: Path) -> list[dict[str, Any]]:
    """Read what each start of the run's jobs used, in order, with the keys of `StartUsage`; torn lines are left out."""
    starts = []
    with contextlib.suppress(OSError):
        for line in (run_dir / JOB_STARTS_FILE).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                start = json.loads(line)
                if isinstance(start, dict):
                    starts.append(start)
    return starts


class _SacctAnswer(NamedTuple):
    """What sacct says about a job."""

    rows: list[dict[str, str]]
    """A row for the job and for each of its steps, by `SACCT_FIELDS`."""
    problem: str | None = None
    """Why there are no rows; None if sacct was asked successfully."""


def _ask_sacct(job_id: str) -> _SacctAnswer:
    """Ask sacct, SLURM's accounting, what a job used: a row for the job, and one for each of its steps.

    It is called up to `SACCT_ATTEMPTS` times, until it knows how the step of the ranks ended.
    """
    answer = _SacctAnswer([])
    for attempt in range(SACCT_ATTEMPTS):
        if attempt > 0:
            time.sleep(SACCT_RETRY_S)
        answer = _call_sacct(job_id)
        if answer.problem is not None:
            return answer
        for row in answer.rows:
            has_ended = not row.get("State", "").startswith("RUNNING")
            if _is_ranks_step(row) and has_ended:
                return answer
    return answer


def _call_sacct(job_id: str) -> _SacctAnswer:
    """Ask sacct, SLURM's accounting, once what a job used; `problem` of the answer says if it is missing or fails."""
    command = ["sacct", "--jobs", job_id, "--noheader", "--parsable2", f"--format={','.join(SACCT_FIELDS)}"]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SACCT_TIMEOUT_S)
    except FileNotFoundError:
        return _SacctAnswer([], "no sacct on this node: CPU, memory and GPUs are not known")
    except (OSError, subprocess.SubprocessError) as error:
        return _SacctAnswer([], f"sacct gave no answer ({type(error).__name__}): CPU, memory and GPUs are not known")
    if completed.returncode:
        message_lines = (completed.stderr or completed.stdout).strip().splitlines() or ["without a message"]
        reason = message_lines[-1].removeprefix("sacct: ")
        return _SacctAnswer([], f"sacct knows nothing ({reason}): CPU, memory and GPUs are not known")
    rows = [dict(zip(SACCT_FIELDS, line.split("|"), strict=False)) for line in completed.stdout.splitlines()]
    return _SacctAnswer(rows)


def _number_or_none(text: str | None) -> float | None:
    """The number that a text holds; None for None, for an empty text, and for one that is no number."""
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _parse_cpu_time(cpu_time: str) -> float | None:
    """Read a CPU time of sacct, in seconds: `01:30` is 90, `1-00:00:00` a day; None for another text."""
    match = CPU_TIME_REGEX.fullmatch(cpu_time)
    if match is None:
        return None
    days, hours, minutes, seconds = match.groups(default="0")
    return int(days) * 86400 + int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def _parse_size_gib(size: str) -> float | None:
    """Read a size of sacct, in GiB: `676416K` -> 0.645; a number without a unit is bytes. None for another text."""
    match = SIZE_REGEX.fullmatch(size)
    if match is None:
        return None
    number, unit = match.groups()
    bytes_per_unit = 1024.0 ** " KMGT".index(unit or " ")
    return float(number) * bytes_per_unit / 2**30
