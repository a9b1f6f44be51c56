"""Checks a job before it is submitted: what its partition offers, how often SLURM may restart it, what it costs.

If `sinfo` says that a job can never start, and no reservation or QOS may lift the limit, the job is refused.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from launch.cluster.long_steps import long_step_notes, longest_step_s
from launch.cluster.sbatch_environment import environment_value
from launch.config.prices import price_by_word
from launch.runs.slurm_time import clock, seconds
from strategies.errors import ConfigError
from trainer.config.run import RunConfig, SlurmConfig
from trainer.config.sbatch_options import options_of

FORMAT = "%R|%l|%L|%D|%c|%m|%G|%a"
PATIENCE_S = 5.0
MEMORY = re.compile(r"(?P<number>\d+)(?P<unit>[KMGT]?)B?", re.IGNORECASE)
GPUS = re.compile(r"gpu(?::(?P<kind>[^:,()]+))?:(?P<count>\d+)")


@dataclass(frozen=True, slots=True)
class Partition:
    """Some nodes that are alike, of a partition, in sinfo's words."""

    name: str
    is_default: bool
    limit_s: float
    nodes: int
    cpus: int
    memory_mb: int
    gpus: int
    kinds: frozenset[str]
    """The site's words for its GPUs."""
    is_up: bool = True
    """Whether it starts jobs."""


def list_partitions() -> list[Partition]:
    """What the cluster has; empty if `sinfo` cannot tell."""
    # --exact: else nodes that differ become one line, with the least that any of them has.
    command = ["sinfo", "--noheader", "--all", "--exact", f"--format=%P|{FORMAT}"]
    # The user's SINFO_PARTITION and the like would leave partitions out.
    env = {name: value for name, value in os.environ.items() if not name.startswith("SINFO_")}
    try:
        answer = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    partitions = []
    for line in answer.stdout.splitlines():
        cells = line.split("|")
        if len(cells) == FORMAT.count("%") + 1:
            partitions.append(_partition(cells))
    return partitions


def _partition(cells: list[str]) -> Partition:
    """One line of sinfo: the fields of `FORMAT` behind the name with its mark."""
    name_and_mark, name, limit, _, nodes, cpus, memory, gres, availability = cells
    gpus = 0
    kinds = set()
    for gpu in GPUS.finditer(gres):
        gpus += int(gpu["count"])
        if gpu["kind"]:
            kinds.add(gpu["kind"])
    return Partition(
        name=name,
        is_default=name_and_mark.endswith("*"),
        limit_s=seconds(limit),
        nodes=_leading_number(nodes),
        cpus=_leading_number(cpus),
        memory_mb=_leading_number(memory),
        gpus=gpus,
        kinds=frozenset(kinds),
        is_up=availability.strip() == "up",
    )


def _leading_number(cell: str) -> int:
    """The number that a cell begins with (`128+`: nodes have at least so many); 0 if it begins with none."""
    return int(re.sub(r"\D.*", "", cell) or 0)


def advise(config: RunConfig, run_dirs: list[Path]) -> list[str]:
    """Lines for people. Raises ConfigError for a job that can never start, or would be told to save as soon as it starts."""
    assert isinstance(config.launcher, SlurmConfig)
    slurm = as_submitted(config.launcher)
    if slurm.signal_lead_s >= seconds(slurm.time):
        raise ConfigError(
            f"launcher.signal_lead_s={slurm.signal_lead_s}: launcher.time={slurm.time} ({clock(seconds(slurm.time))}) is no "
            "longer, so that each start would be told to save before it has trained; give more time, or a shorter lead"
        )
    partitions = list_partitions()
    if slurm.partition:
        names = slurm.partition.split(",")
    else:
        names = [part.name for part in partitions if part.is_default]
    candidates = [part for part in partitions if part.name in names]
    # A QOS, a reservation or an option that is not read here may lift a partition's limits.
    limits_hold = not (slurm.qos or slurm.reservation or slurm.extra)
    if candidates and limits_hold:
        if problems := _impossible(slurm, candidates):
            raise ConfigError(problems)
    elif partitions and slurm.partition and not candidates:
        known = ", ".join(dict.fromkeys(part.name for part in partitions))
        raise ConfigError(f"launcher.partition={slurm.partition}: there is no such partition here; it has {known}")
    step_s = _measured_step_s(run_dirs)
    if step_s is None:
        step_s = longest_step_s(config, gpu_kinds(slurm, candidates))
    return [
        *ranks_lines(slurm),
        *_time_lines(slurm, candidates),
        *(f"note    {note}" for note in long_step_notes(config, step_s)),
        *_restart_lines(slurm, run_dirs),
        *_price_lines(slurm, candidates, len(run_dirs)),
    ]


def as_submitted(slurm: SlurmConfig) -> SlurmConfig:
    """The settings as sbatch takes them: `launcher.extra` in their place, `SBATCH_*` for what they leave open."""
    extra = options_of(slurm.extra)
    return replace(
        slurm,
        time=extra.get("time", slurm.time),
        partition=extra.get("partition", slurm.partition or environment_value("partition")),
        qos=extra.get("qos", slurm.qos or environment_value("qos")),
        reservation=extra.get("reservation", slurm.reservation or environment_value("reservation")),
    )


def ranks_lines(slurm: SlurmConfig) -> list[str]:
    """How many ranks a node has, and why; GPUs that no rank uses."""
    request = slurm.gpu_request
    if request is None:
        return []
    ranks = f"ranks   {slurm.nodes} x {slurm.per_node}"
    if slurm.processes is None:
        return [f"{ranks}, one for each GPU of a node ({request.setting})"]
    idle = request.count - slurm.processes
    lines = [f"{ranks} (launcher.processes={slurm.processes})"]
    if idle > 0:
        lines.append(
            f"note    {idle} of {request.count} GPUs stay idle on each node: {request.setting}, but "
            f"launcher.processes={slurm.processes}; leave launcher.processes out to train on all"
        )
    return lines


def _impossible(slurm: SlurmConfig, candidates: list[Partition]) -> list[str]:
    """Why no node of these partitions could ever be given."""
    names = "/".join(dict.fromkeys(part.name for part in candidates))
    problems = []
    longest = max(part.limit_s for part in candidates)
    if seconds(slurm.time) > longest:
        problems.append(
            f"launcher.time={slurm.time}: partition {names} gives {clock(longest)} at most: it would never start"
        )
    request = slurm.gpu_request
    gpus = 0 if request is None else request.count
    most_gpus = max(part.gpus for part in candidates)
    if request is not None and gpus > most_gpus:
        problems.append(
            f"{request.setting}: the nodes of partition {names} have {most_gpus or 'none'}: it would never start"
        )
    cpus = slurm.cpus_per_task or 0
    most_cpus = max(part.cpus for part in candidates)
    if cpus > most_cpus:
        problems.append(
            f"launcher.cpus_per_task={cpus}: the nodes of partition {names} have {most_cpus or 'none'}: "
            "it would never start"
        )
    memory_mib = mebibytes(slurm.mem)
    most_mib = max(part.memory_mb for part in candidates)
    if memory_mib > most_mib:
        problems.append(
            f"launcher.mem={slurm.mem}: the nodes of partition {names} have {most_mib}M at most: it would never start"
        )
    fit = 0
    for part in candidates:
        if part.gpus >= gpus and part.cpus >= cpus and part.memory_mb >= memory_mib:
            fit += part.nodes
    if slurm.nodes > fit and not problems:
        problems.append(f"launcher.nodes={slurm.nodes}: partition {names} has {fit} such nodes: it would never start")
    return problems


def mebibytes(memory: str | None) -> float:
    """`launcher.mem` (SLURM's memory of a node, `64G`) in MiB.

    0, which is all of a node's for SLURM, if nothing is asked for, or in a form that is not read here.
    """
    size = MEMORY.fullmatch((memory or "").strip())
    if size is None:
        return 0.0
    unit = size["unit"].upper() or "M"
    return float(size["number"]) * 1024.0 ** "KMGT".index(unit) / 1024


def _time_lines(slurm: SlurmConfig, candidates: list[Partition]) -> list[str]:
    """What happens at the time limit, and notes about a partition that is down or a long lead."""
    limit_s = seconds(slurm.time)
    consequence = "is requeued"
    if "no-requeue" in options_of(slurm.extra):
        consequence = "ends with 75, not requeued (launcher.extra: --no-requeue)"
    line = f"time    {clock(limit_s)} a start, {slurm.signal_lead_s} s before its end it saves and {consequence}"
    if not slurm.signal_lead_s:
        line = f"time    {clock(limit_s)} a start; nothing tells it to save before its end (launcher.signal_lead_s=0)"
    if candidates:
        longest = max(part.limit_s for part in candidates)
        line += f"; partition {candidates[0].name} gives {clock(longest)} at most"
    lines = [line]
    if candidates and not any(part.is_up for part in candidates):
        lines.append(
            f"note    partition {candidates[0].name} is not up: no job starts there until it is; or set launcher.partition"
        )
    if slurm.signal_lead_s * 2 > limit_s:
        lines.append(
            f"note    launcher.signal_lead_s={slurm.signal_lead_s} is most of launcher.time={slurm.time}; SLURM may send "
            "its signal a minute early"
        )
    return lines


def _measured_step_s(run_dirs: list[Path]) -> float | None:
    """Seconds of a step by the last rows of the run's metrics; None if no earlier start has measured any, or of several runs."""
    from launch.runs import metrics_tail

    if len(run_dirs) > 1:
        return None
    rows = [row for row in metrics_tail.last_rows(run_dirs[0] / "metrics.jsonl") if "loss" in row]
    return metrics_tail.recent_median(rows, "step_s")


def _restart_lines(slurm: SlurmConfig, run_dirs: list[Path]) -> list[str]:
    """How many starts the rest of a run takes, if an earlier start has measured its steps."""
    from launch.runs import metrics_tail
    from trainer.reporting.run_record import readable_run_record

    if len(run_dirs) > 1:
        return []
    step_rows = [row for row in metrics_tail.last_rows(run_dirs[0] / "metrics.jsonl") if "loss" in row]
    total_steps = readable_run_record(run_dirs[0]).total_steps
    step_s = metrics_tail.recent_median(step_rows, "step_s")
    if not step_rows or not total_steps or step_s is None:
        return ["starts  not known: no step of this run was measured yet (shardtune plan estimates one)"]
    remaining_s = max(0, total_steps - int(step_rows[-1]["step"])) * step_s
    # A start trains until SLURM's signal tells it to save.
    start_s = max(1.0, seconds(slurm.time) - slurm.signal_lead_s)
    restarts = max(0, math.ceil(remaining_s / start_s) - 1)
    plural = "" if restarts == 1 else "s"
    line = f"starts  {clock(remaining_s)} of steps are left at {step_s:.3g} s a step: {restarts} restart{plural} at the limit"
    allowed = slurm.retry.get("preempted", 0)
    if restarts > allowed:
        line += f", but launcher.retry allows {allowed}"
    return [line]


def gpu_kinds(slurm: SlurmConfig, candidates: list[Partition]) -> set[str]:
    """The site's words for the cards that the job may be given; empty if it asks for none, or nobody says which."""
    request = slurm.gpu_request
    if request is None:
        return set()
    if request.kind:
        return {request.kind}
    # Any card of the partitions may be given.
    return {kind for part in candidates for kind in part.kinds}


def _price_lines(slurm: SlurmConfig, candidates: list[Partition], runs: int) -> list[str]:
    """The most that a start of all runs costs, in GPU hours and US dollars; empty for a job without GPUs."""
    request = slurm.gpu_request
    if request is None:
        return []
    kinds = gpu_kinds(slurm, candidates)
    prices = {price_by_word(kind) for kind in kinds}
    price = prices.pop() if len(prices) == 1 else None
    gpu_hours = request.count * slurm.nodes * runs * seconds(slurm.time) / 3600
    if price is None:
        cards = ", ".join(sorted(kinds)) or "these cards"
        return [f"price   {gpu_hours:,.0f} GPU hours at most a start; what one costs is not known of {cards}"]
    return [
        f"price   ${gpu_hours * price:,.0f} at most a start: {gpu_hours:,.0f} GPU hours of ${price:.2f} (conf/hardware)"
    ]
