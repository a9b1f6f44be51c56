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

STARTS = "jobs.jsonl"
FIELDS = ("JobIDRaw", "State", "ElapsedRaw", "TotalCPU", "AllocCPUS", "MaxRSS", "TRESUsageInAve")
PATIENCE_S, AGAIN_S = 10.0, 1.0
CPU_TIME = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)")
SIZE = re.compile(r"([\d.]+)([KMGT]?)")
GPU_BUSY = re.compile(r"gres/gpuutil=(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
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


def record(run_dir: Path, job: str, start: int, code: int, env: Mapping[str, str] = os.environ) -> str:
    """Take the figures of the start that ends now, keep them with the run, and say them. Never raises: the run comes first."""
    found = measure(run_dir, job, start, code, env)
    try:
        with (run_dir / STARTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(found)) + "\n")
        add_to_run_record(run_dir, "jobs", starts(run_dir))
    except OSError as error:
        return f"{said(asdict(found))}; not recorded ({error.strerror or error})"
    return said(asdict(found))


def measure(run_dir: Path, job: str, start: int, code: int, env: Mapping[str, str]) -> Start:
    """What is known of the start that this process is the end of."""
    began, until = (_number(env.get(f"SLURM_JOB_{name}_TIME")) for name in ("START", "END"))
    elapsed = time.time() - began if began else None
    rows, unknown = _asked(env.get("SLURM_JOB_ID", job))
    step = next((row for row in rows if row["JobIDRaw"].endswith(".0")), {})
    elapsed = elapsed or _number(step.get("ElapsedRaw"))
    cpus = int(step.get("AllocCPUS") or 0) or None
    cpu, held = _cpu_s(step.get("TotalCPU", "")), _gib(step.get("MaxRSS", ""))
    ran = _number(step.get("ElapsedRaw"))
    busy = GPU_BUSY.search(step.get("TRESUsageInAve", ""))
    run_record = readable_run_record(run_dir)
    asked = _number(env.get("SLURM_MEM_PER_NODE"))
    gpus = run_record.world_size if run_record.device_name else 0
    price = price_of(run_record.device_name) if gpus and run_record.device_name else None
    return Start(
        job=job,
        start=start,
        code=code,
        elapsed_s=elapsed,
        limit_s=until - began if began and until else None,
        nodes=int(env.get("SLURM_JOB_NUM_NODES") or 0) or None,
        cpus=cpus,
        cpu_share=cpu / (ran * cpus) if cpu is not None and ran and cpus else None,
        memory_gib=held,
        memory_asked_gib=asked / 1024 if asked else None,
        gpus=gpus or None,
        gpu_share=min(1.0, int(busy[1]) / 100 / max(1, gpus)) if busy and gpus else None,
        dollars=price * gpus * elapsed / 3600 if price is not None and elapsed else None,
        price_per_hour=price,
        unknown=unknown if unknown else None if step else "sacct knows no step of the job",
    )


def said(start: Mapping[str, Any]) -> str:
    """One start in a line for people, of what `starts` has."""

    def share(value: Any) -> str:
        return f"{value:.0%}"

    parts = []
    if (elapsed := start.get("elapsed_s")) is not None:
        limit = start.get("limit_s")
        parts.append(clock(elapsed) + (f" of {clock(limit)} ({share(elapsed / limit)})" if limit else ""))
    if start.get("cpu_share") is not None:
        parts.append(f"{share(start['cpu_share'])} of {start['cpus']} CPUs")
    if (held := start.get("memory_gib")) is not None:
        asked = start.get("memory_asked_gib")
        parts.append(f"{held:.3g}" + (f" of {asked:.3g}" if asked else "") + " GiB of a node")
    if start.get("gpus"):
        busy = start.get("gpu_share")
        parts.append(
            f"{start['gpus']} GPUs" + (f" {share(busy)} busy" if busy is not None else ", how busy is not known")
        )
        price = start.get("dollars")
        parts.append(f"${price:,.2f}" if price is not None else "price not known")
    if start.get("unknown"):
        parts.append(str(start["unknown"]))
    return f"job {start.get('job')}, start {start.get('start')}: {', '.join(parts) or 'nothing is known'}"


def starts(run_dir: Path) -> list[dict[str, Any]]:
    """All starts that were recorded, in their order; torn lines are left out."""
    found = []
    with contextlib.suppress(OSError):
        for line in (run_dir / STARTS).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                if isinstance(value := json.loads(line), dict):
                    found.append(value)
    return found


def _asked(job: str) -> tuple[list[dict[str, str]], str | None]:
    """(sacct's rows, why there are none)."""
    command = ["sacct", "--jobs", job, "--noheader", "--parsable2", f"--format={','.join(FIELDS)}"]
    rows: list[dict[str, str]] = []
    for attempt in range(3):  # a step's end reaches the data base a moment later
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE_S)
        except FileNotFoundError:
            return [], "no sacct on this node: CPU, memory and GPUs are not known"
        except (OSError, subprocess.SubprocessError) as error:
            return [], f"sacct gave no answer ({type(error).__name__}): CPU, memory and GPUs are not known"
        if done.returncode:
            why = ((done.stderr or done.stdout).strip().splitlines() or ["without a word"])[-1]
            return [], f"sacct knows nothing ({why.removeprefix('sacct: ')}): CPU, memory and GPUs are not known"
        rows = [dict(zip(FIELDS, line.split("|"), strict=False)) for line in done.stdout.splitlines()]
        if any(row["JobIDRaw"].endswith(".0") and not row.get("State", "").startswith("RUNNING") for row in rows):
            return rows, None
        time.sleep(AGAIN_S * (attempt < 2))
    return rows, None


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _cpu_s(text: str) -> float | None:
    """Seconds of sacct's `[days-][hours:]minutes:seconds`."""
    found = CPU_TIME.fullmatch(text)
    if found is None:
        return None
    days, hours, minutes, rest = found.groups(default="0")
    return int(days) * 86400 + int(hours) * 3600 + int(minutes) * 60 + float(rest)


def _gib(text: str) -> float | None:
    """GiB of sacct's `676416K`."""
    found = SIZE.fullmatch(text)
    return float(found[1]) * 1024.0 ** ("KMGT".index(found[2]) - 2 if found[2] else -3) if found else None
