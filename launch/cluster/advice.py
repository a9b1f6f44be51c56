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
    default: bool
    limit_s: float
    nodes: int
    cpus: int
    memory_mb: int
    gpus: int
    kinds: frozenset[str]
    """The site's words for its GPUs."""
    is_up: bool = True
    """Whether it starts jobs."""


def partitions() -> list[Partition]:
    """What the cluster has; empty where `sinfo` cannot tell."""
    # Exactly: else nodes that differ are one line, with the least that one of them has.
    command = ["sinfo", "--noheader", "--all", "--exact", f"--format=%P|{FORMAT}"]
    try:
        # The user's SINFO_PARTITION and the like would leave partitions out.
        env = {name: value for name, value in os.environ.items() if not name.startswith("SINFO_")}
        said = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in said.splitlines():
        cells = line.split("|")
        if len(cells) != 9:
            continue
        marked, name, limit, _, nodes, cpus, memory, gres, availability = cells
        gpus = [(each["kind"], int(each["count"])) for each in GPUS.finditer(gres)]
        kinds = frozenset(kind for kind, _ in gpus if kind)
        most = {"nodes": nodes, "cpus": cpus, "memory_mb": memory}
        numbers = {key: int(re.sub(r"\D.*", "", each) or 0) for key, each in most.items()}
        count = sum(number for _, number in gpus)
        is_default = marked.endswith("*")
        is_up = availability.strip() == "up"
        found.append(Partition(name, is_default, seconds(limit), gpus=count, kinds=kinds, is_up=is_up, **numbers))
    return found


def advise(config: RunConfig, run_dirs: list[Path]) -> list[str]:
    """Lines for people. Raises ConfigError for a job that can never start, or would be told to save as soon as it starts."""
    assert isinstance(config.launcher, SlurmConfig)
    slurm = as_submitted(config.launcher)
    if slurm.signal_lead_s >= seconds(slurm.time):
        raise ConfigError(
            f"launcher.signal_lead_s={slurm.signal_lead_s}: launcher.time={slurm.time} ({clock(seconds(slurm.time))}) is no "
            "longer, so that each start would be told to save before it has trained; give more time, or a shorter lead"
        )
    there = partitions()
    names = slurm.partition.split(",") if slurm.partition else [part.name for part in there if part.default]
    mine = [part for part in there if part.name in names]
    if mine and not (slurm.qos or slurm.reservation or slurm.extra):
        if problems := _never(slurm, mine):
            raise ConfigError(problems)
    elif there and slurm.partition and not mine:
        known = ", ".join(dict.fromkeys(part.name for part in there))
        raise ConfigError(f"launcher.partition={slurm.partition}: there is no such partition here; it has {known}")
    price = _price(slurm, mine, len(run_dirs))
    return [*ranks_lines(slurm), *_limits(slurm, mine), *_restarts(slurm, run_dirs), *price]


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


def _never(slurm: SlurmConfig, mine: list[Partition]) -> list[str]:
    """Why no node of these partitions could ever be given."""
    where, problems = "/".join(dict.fromkeys(part.name for part in mine)), []
    request = slurm.gpu_request
    gpus = 0 if request is None else request.count
    longest = max(part.limit_s for part in mine)
    if seconds(slurm.time) > longest:
        problems.append(
            f"launcher.time={slurm.time}: partition {where} gives {clock(longest)} at most: it would never start"
        )
    for key, asked, most in (
        ("" if request is None else request.setting, gpus, max(part.gpus for part in mine)),
        (f"launcher.cpus_per_task={slurm.cpus_per_task}", slurm.cpus_per_task or 0, max(part.cpus for part in mine)),
    ):
        if asked > most:
            problems.append(f"{key}: the nodes of partition {where} have {most or 'none'}: it would never start")
    memory, most = _mebibytes(slurm.mem), max(part.memory_mb for part in mine)
    if memory > most:
        problems.append(
            f"launcher.mem={slurm.mem}: the nodes of partition {where} have {most}M at most: it would never start"
        )
    fit = sum(
        part.nodes
        for part in mine
        if part.gpus >= gpus and part.cpus >= (slurm.cpus_per_task or 0) and part.memory_mb >= memory
    )
    if slurm.nodes > fit and not problems:
        problems.append(f"launcher.nodes={slurm.nodes}: partition {where} has {fit} such nodes: it would never start")
    return problems


def _mebibytes(asked: str | None) -> float:
    """SLURM's memory of a node, in MiB; 0 (which is all of a node's) where nothing is asked, or nothing that is read here."""
    found = MEMORY.fullmatch((asked or "").strip())
    return float(found["number"]) * 1024.0 ** "KMGT".index(found["unit"].upper() or "M") / 1024 if found else 0.0


def _limits(slurm: SlurmConfig, mine: list[Partition]) -> list[str]:
    limit = seconds(slurm.time)
    then = "is requeued"
    if "no-requeue" in options_of(slurm.extra):
        then = "ends with 75, not requeued (launcher.extra: --no-requeue)"
    said = [f"time    {clock(limit)} a start, {slurm.signal_lead_s} s before its end it saves and {then}"]
    if not slurm.signal_lead_s:
        said = [f"time    {clock(limit)} a start; nothing tells it to save before its end (launcher.signal_lead_s=0)"]
    if mine:
        said[0] += f"; partition {mine[0].name} gives {clock(max(part.limit_s for part in mine))} at most"
    if mine and not any(part.is_up for part in mine):
        said.append(
            f"note    partition {mine[0].name} is not up: no job starts there until it is; or set launcher.partition"
        )
    if slurm.signal_lead_s * 2 > limit:
        said.append(
            f"note    launcher.signal_lead_s={slurm.signal_lead_s} is most of launcher.time={slurm.time}; SLURM may send "
            "its signal a minute early"
        )
    return said


def _restarts(slurm: SlurmConfig, run_dirs: list[Path]) -> list[str]:
    """How many starts the rest of a run takes, where an earlier start has measured its steps."""
    from launch.runs import metrics_tail
    from trainer.reporting.run_record import readable_run_record

    if len(run_dirs) > 1:
        return []
    newest = [row for row in metrics_tail.newest(run_dirs[0] / "metrics.jsonl") if "loss" in row]
    total = readable_run_record(run_dirs[0]).total_steps
    pace = metrics_tail.recent(newest, "step_s")
    if not newest or not total or pace is None:
        return ["starts  not known: no step of this run was measured yet (shardtune plan estimates one)"]
    left = max(0, total - int(newest[-1]["step"])) * pace
    each = max(1.0, seconds(slurm.time) - slurm.signal_lead_s)
    again = max(0, math.ceil(left / each) - 1)
    said = f"starts  {clock(left)} of steps are left at {pace:.3g} s a step: {again} restart{'s' * (again != 1)} at the limit"
    allowed = slurm.retry.get("preempted", 0)
    return [said + (f", but launcher.retry allows {allowed}" if again > allowed else "")]


def _price(slurm: SlurmConfig, mine: list[Partition], runs: int) -> list[str]:
    request = slurm.gpu_request
    if request is None:
        return []
    gpus = request.count * slurm.nodes * runs
    kinds = {kind for part in mine for kind in part.kinds} if request.kind is None else {request.kind}
    prices = {price_by_word(kind) for kind in kinds if kind}
    price = prices.pop() if len(prices) == 1 else None
    hours = gpus * seconds(slurm.time) / 3600
    if price is None:
        which = ", ".join(sorted(filter(None, kinds))) or "these cards"
        return [f"price   {hours:,.0f} GPU hours at most a start; what one costs is not known of {which}"]
    return [f"price   ${hours * price:,.0f} at most a start: {hours:,.0f} GPU hours of ${price:.2f} (conf/hardware)"]
