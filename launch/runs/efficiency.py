"""What one start of a job used of its allocation, and what that cost: time, CPUs, memory, GPUs. Needs no torch.

The numbers come from SLURM's `sacct`; what it does not know is reported as unknown. Each start is a line of
`<run>/jobs.jsonl`, and `run.json` has all of them.
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
from typing import Any

from launch.config.prices import price_of
from launch.runs.slurm_time import clock
from trainer.reporting.results import add_to_run_record
from trainer.reporting.run_record import readable_run_record

STARTS_FILE = "jobs.jsonl"
FIELDS = ("JobIDRaw", "State", "ElapsedRaw", "TotalCPU", "AllocCPUS", "MaxRSS", "TRESUsageInAve")
PATIENCE_S = 10.0
"""Seconds that sacct may take."""
AGAIN_S = 1.0
"""Seconds between two calls of sacct."""
CPU_TIME = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)")
SIZE = re.compile(r"([\d.]+)([KMGT]?)")
GPU_BUSY = re.compile(r"gres/gpuutil=(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class StartUsage:
    """One start of a job; what is not known is None."""

    job: str
    start: int
    code: int
    """Exit code of its ranks."""
    elapsed_s: float | None = None
    limit_s: float | None = None
    nodes: int | None = None
    cpus: int | None = None
    """Of all nodes."""
    cpu_share: float | None = None
    """CPU time over the time of all CPUs that it had."""
    memory_gib: float | None = None
    """The most that a node's processes held together."""
    memory_asked_gib: float | None = None
    """Of a node."""
    gpus: int | None = None
    gpu_share: float | None = None
    """How busy the GPUs were, as SLURM sampled them."""
    dollars: float | None = None
    price_per_hour: float | None = None
    """Of one GPU."""
    unknown: str | None = None
    """Why SLURM's figures are not here."""


def record_start(run_dir: Path, job: str, start: int, code: int, env: Mapping[str, str] = os.environ) -> str:
    """Measure the start that ends now, and record it with the run; returns a line for people.

    Never raises: a missing figure must not end the job script.
    """
    usage = measure_start(run_dir, job, start, code, env)
    line = describe_start(asdict(usage))
    try:
        with (run_dir / STARTS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(usage)) + "\n")
        add_to_run_record(run_dir, "jobs", recorded_starts(run_dir))
    except OSError as error:
        return f"{line}; not recorded ({error.strerror or error})"
    return line


def measure_start(run_dir: Path, job: str, start: int, code: int, env: Mapping[str, str]) -> StartUsage:
    """What is known of the start that this process is the end of."""
    began = _number(env.get("SLURM_JOB_START_TIME"))
    ends = _number(env.get("SLURM_JOB_END_TIME"))
    # Taken before sacct is asked, which may take half a minute.
    elapsed_s = time.time() - began if began else None
    rows, unknown = _sacct_rows(env.get("SLURM_JOB_ID", job))
    # Step 0 is the srun that runs the ranks; other rows are of the job and of its script.
    step = next((row for row in rows if row["JobIDRaw"].endswith(".0")), {})
    if not unknown and not step:
        unknown = "sacct knows no step of the job"
    step_elapsed_s = _number(step.get("ElapsedRaw"))
    if elapsed_s is None:
        elapsed_s = step_elapsed_s
    memory_asked_mib = _number(env.get("SLURM_MEM_PER_NODE"))

    cpus = int(step.get("AllocCPUS") or 0) or None
    cpu_s = _cpu_s(step.get("TotalCPU", ""))
    cpu_share = None
    if cpu_s is not None and step_elapsed_s and cpus:
        cpu_share = cpu_s / (step_elapsed_s * cpus)

    run_record = readable_run_record(run_dir)
    gpus = run_record.world_size if run_record.device_name else 0
    gpu_share = None
    price = None
    dollars = None
    if gpus:
        busy = GPU_BUSY.search(step.get("TRESUsageInAve", ""))  # per cent, summed over the GPUs
        gpu_share = min(1.0, int(busy[1]) / 100 / gpus) if busy else None
        price = price_of(run_record.device_name) if run_record.device_name else None
        if price is not None and elapsed_s:
            dollars = price * gpus * elapsed_s / 3600
    return StartUsage(
        job=job,
        start=start,
        code=code,
        elapsed_s=elapsed_s,
        limit_s=ends - began if began and ends else None,
        nodes=int(env.get("SLURM_JOB_NUM_NODES") or 0) or None,
        cpus=cpus,
        cpu_share=cpu_share,
        memory_gib=_gib(step.get("MaxRSS", "")),
        memory_asked_gib=memory_asked_mib / 1024 if memory_asked_mib else None,
        gpus=gpus or None,
        gpu_share=gpu_share,
        dollars=dollars,
        price_per_hour=price,
        unknown=unknown,
    )


def describe_start(start: Mapping[str, Any]) -> str:
    """A start, as `recorded_starts` has it, in a line for people."""
    parts = [*_time_and_cpu_parts(start), *_gpu_parts(start)]
    if start.get("unknown"):
        parts.append(str(start["unknown"]))
    return f"job {start.get('job')}, start {start.get('start')}: {', '.join(parts) or 'nothing is known'}"


def _time_and_cpu_parts(start: Mapping[str, Any]) -> list[str]:
    """Time, CPU and memory of a start, as far as they are known."""
    parts = []
    elapsed_s = start.get("elapsed_s")
    if elapsed_s is not None:
        limit_s = start.get("limit_s")
        of_limit = f" of {clock(limit_s)} ({elapsed_s / limit_s:.0%})" if limit_s else ""
        parts.append(f"{clock(elapsed_s)}{of_limit}")
    if start.get("cpu_share") is not None:
        parts.append(f"{start['cpu_share']:.0%} of {start['cpus']} CPUs")
    memory_gib = start.get("memory_gib")
    if memory_gib is not None:
        asked_gib = start.get("memory_asked_gib")
        of_asked = f" of {asked_gib:.3g}" if asked_gib else ""
        parts.append(f"{memory_gib:.3g}{of_asked} GiB of a node")
    return parts


def _gpu_parts(start: Mapping[str, Any]) -> list[str]:
    if not start.get("gpus"):
        return []
    busy = start.get("gpu_share")
    use = f" {busy:.0%} busy" if busy is not None else ", how busy is not known"
    dollars = start.get("dollars")
    price = f"${dollars:,.2f}" if dollars is not None else "price not known"
    return [f"{start['gpus']} GPUs{use}", price]


def recorded_starts(run_dir: Path) -> list[dict[str, Any]]:
    """All starts that were recorded, in their order; torn lines are left out."""
    starts = []
    with contextlib.suppress(OSError):
        for line in (run_dir / STARTS_FILE).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                if isinstance(start := json.loads(line), dict):
                    starts.append(start)
    return starts


def _sacct_rows(job: str) -> tuple[list[dict[str, str]], str | None]:
    """(rows of sacct by `FIELDS`, why there are none)."""
    command = ["sacct", "--jobs", job, "--noheader", "--parsable2", f"--format={','.join(FIELDS)}"]
    rows: list[dict[str, str]] = []
    for attempt in range(3):  # the end of a step reaches SLURM's data base a moment later
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE_S)
        except FileNotFoundError:
            return [], "no sacct on this node: CPU, memory and GPUs are not known"
        except (OSError, subprocess.SubprocessError) as error:
            return [], f"sacct gave no answer ({type(error).__name__}): CPU, memory and GPUs are not known"
        if done.returncode:
            why = ((done.stderr or done.stdout).strip().splitlines() or ["without a message"])[-1]
            return [], f"sacct knows nothing ({why.removeprefix('sacct: ')}): CPU, memory and GPUs are not known"
        rows = [dict(zip(FIELDS, line.split("|"), strict=False)) for line in done.stdout.splitlines()]
        for row in rows:
            if row["JobIDRaw"].endswith(".0") and not row.get("State", "").startswith("RUNNING"):
                return rows, None
        if attempt < 2:
            time.sleep(AGAIN_S)
    return rows, None


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _cpu_s(text: str) -> float | None:
    """Seconds of sacct's `[days-][hours:]minutes:seconds`."""
    match = CPU_TIME.fullmatch(text)
    if match is None:
        return None
    days, hours, minutes, seconds = match.groups(default="0")
    return int(days) * 86400 + int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def _gib(text: str) -> float | None:
    """GiB of sacct's `676416K`; a number without a unit is bytes."""
    match = SIZE.fullmatch(text)
    if match is None:
        return None
    exponent = "KMGT".index(match[2]) - 2 if match[2] else -3  # powers of 1024, relative to GiB
    return float(match[1]) * 1024.0**exponent
