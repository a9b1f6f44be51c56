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
from launch.cluster.sbatch_environment import sbatch_environment_value
from launch.config.prices import gpu_hour_price_of_kind
from launch.runs.slurm_time import format_slurm_time, parse_slurm_time
from strategies import exit_codes
from strategies.errors import ConfigError
from trainer.config.run import RunConfig, SlurmConfig
from trainer.config.sbatch_options import parse_sbatch_options

SINFO_FORMAT = "%R|%l|%L|%D|%c|%m|%G|%a"
"""Fields of a line of sinfo: name, time limit, default time, nodes, CPUs, memory in MB, GPUs and the like, availability."""
SINFO_TIMEOUT_S = 5.0
MEMORY_REGEX = re.compile(r"(?P<number>\d+)(?P<unit>[KMGT]?)B?", re.IGNORECASE)
"""`launcher.mem` as SLURM takes it: `64G`, `1024`."""
GPUS_REGEX = re.compile(r"gpu(?::(?P<kind>[^:,()]+))?:(?P<count>\d+)")
"""GPUs among the generic resources of a node: `gpu:h100:8`, `gpu:4`."""


@dataclass(frozen=True, slots=True)
class Partition:
    """A group of like nodes of a SLURM partition, as sinfo describes it; a partition may have several groups."""

    name: str
    is_default: bool
    """Whether jobs that name no partition run there."""
    limit_s: float
    """The longest time limit of a job."""
    nodes: int
    """How many nodes the group has; the next three are of each of them."""
    cpus: int
    memory_mb: int
    gpus: int
    gpu_kinds: frozenset[str]
    """The site's words for its GPUs."""
    is_up: bool = True
    """Whether it starts jobs."""


def query_partitions() -> list[Partition]:
    """Ask SLURM (`sinfo`) for the partitions of the cluster and their nodes; empty if it cannot tell.

    A partition whose nodes differ gives several entries of the same name.
    """
    # --exact: else nodes that differ become one line, with the least that any of them has.
    command = ["sinfo", "--noheader", "--all", "--exact", f"--format=%P|{SINFO_FORMAT}"]
    # The user's SINFO_PARTITION and the like would leave partitions out.
    env = {name: value for name, value in os.environ.items() if not name.startswith("SINFO_")}
    try:
        sinfo = subprocess.run(command, env=env, capture_output=True, text=True, timeout=SINFO_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    partitions = []
    num_cells = SINFO_FORMAT.count("%") + 1  # the name with its mark comes before those of SINFO_FORMAT
    for line in sinfo.stdout.splitlines():
        cells = line.split("|")
        if len(cells) == num_cells:
            partitions.append(_parse_partition(cells))
    return partitions


def _parse_partition(cells: list[str]) -> Partition:
    """Read one line of sinfo, split into its cells, as a group of like nodes of a partition.

    The first cell is the name, marked with `*` for the default partition; the others are those of `SINFO_FORMAT`.
    """
    marked_name, name, time_limit, _, nodes, cpus, memory, generic_resources, availability = cells
    num_gpus = 0
    gpu_kinds = set()
    for gpu in GPUS_REGEX.finditer(generic_resources):
        num_gpus += int(gpu["count"])
        if gpu["kind"]:
            gpu_kinds.add(gpu["kind"])
    return Partition(
        name=name,
        is_default=marked_name.endswith("*"),
        limit_s=parse_slurm_time(time_limit),
        nodes=_leading_number(nodes),
        cpus=_leading_number(cpus),
        memory_mb=_leading_number(memory),
        gpus=num_gpus,
        gpu_kinds=frozenset(gpu_kinds),
        is_up=availability.strip() == "up",
    )


def _leading_number(cell: str) -> int:
    """The number at the beginning of sinfo's cell (`128+`: nodes have at least so many); 0 if there is none."""
    return int(re.sub(r"\D.*", "", cell) or 0)


def job_notes_if_startable(config: RunConfig, run_dirs: list[Path]) -> list[str]:
    """Check a job before it is submitted, and write the notes that `shardtune submit` shows about it.

    `config`: the configuration of the runs, and `run_dirs`: their directories; several are submitted as one job array.
    The notes are about ranks, time limit, long steps, restarts and price, such as "price   $40 at most a start: 16 GPU hours of
    $2.50 (conf/hardware)".
    Raises ConfigError for a job that can never start here, or would be told to save as soon as it starts.
    """
    assert isinstance(config.launcher, SlurmConfig)
    slurm = settings_as_submitted(config.launcher)
    refuse_lead_of_whole_time_limit(slurm)
    partitions = query_partitions()
    candidate_partitions = partitions_of_job(slurm, partitions)
    _refuse_job_that_never_starts(slurm, partitions, candidate_partitions)
    # How long a step takes: measured by an earlier start of the run, else computed from its configuration.
    step_s = _measured_step_s(run_dirs)
    if step_s is None:
        step_s = longest_step_s(config, gpu_kinds_of_job(slurm, candidate_partitions))
    return [
        *rank_layout_notes(slurm),
        *time_limit_lines(slurm, candidate_partitions),
        *(f"note    {note}" for note in long_step_notes(config, step_s)),
        *_restart_lines(slurm, run_dirs),
        *_price_lines(slurm, candidate_partitions, len(run_dirs)),
    ]


def refuse_lead_of_whole_time_limit(slurm: SlurmConfig) -> None:
    """Raise ConfigError if a job would be told to save as soon as it starts.

    SLURM sends that signal `signal_lead_s` seconds before the time limit, which must be longer.
    """
    limit_s = parse_slurm_time(slurm.time)
    if slurm.signal_lead_s >= limit_s:
        raise ConfigError(
            f"launcher.signal_lead_s={slurm.signal_lead_s}: launcher.time={slurm.time} ({format_slurm_time(limit_s)}) is no "
            "longer, so that each start would be told to save before it has trained; give more time, or a shorter lead"
        )


def _refuse_job_that_never_starts(
    slurm: SlurmConfig, partitions: list[Partition], candidate_partitions: list[Partition]
) -> None:
    """Raise ConfigError if the job's partition does not exist, or if no partition offers what the job requests.

    `partitions`: of the cluster; empty if sinfo cannot tell, and then nothing is checked.
    `candidate_partitions`: those in which the job may run.
    """
    # A QOS, a reservation or an option that is not read here may lift a partition's limits.
    limits_hold = not (slurm.qos or slurm.reservation or slurm.extra)
    if candidate_partitions and limits_hold:
        problems = _never_starting_problems(slurm, candidate_partitions)
        if problems:
            raise ConfigError(problems)
    elif partitions and slurm.partition and not candidate_partitions:
        known = ", ".join(dict.fromkeys(partition.name for partition in partitions))
        raise ConfigError(f"launcher.partition={slurm.partition}: there is no such partition here; it has {known}")


def partitions_of_job(slurm: SlurmConfig, partitions: list[Partition]) -> list[Partition]:
    """The partitions of the cluster in which the job may run: the ones that `launcher.partition` names, else the default."""
    if not slurm.partition:
        return [partition for partition in partitions if partition.is_default]
    names = slurm.partition.split(",")
    return [partition for partition in partitions if partition.name in names]


def settings_as_submitted(slurm: SlurmConfig) -> SlurmConfig:
    """The launcher's settings as sbatch will take them, for checks before the submission.

    `launcher.extra` (options of sbatch as typed) overrides them, and `SBATCH_*` variables fill in what they leave open. Only
    time, partition, QOS and reservation are looked at.
    """
    extra = parse_sbatch_options(slurm.extra)
    return replace(
        slurm,
        time=extra.get("time", slurm.time),
        partition=extra.get("partition", slurm.partition or sbatch_environment_value("partition")),
        qos=extra.get("qos", slurm.qos or sbatch_environment_value("qos")),
        reservation=extra.get("reservation", slurm.reservation or sbatch_environment_value("reservation")),
    )


def rank_layout_notes(slurm: SlurmConfig) -> list[str]:
    """Notes for the user on how many ranks each node runs and why, and on GPUs that no rank uses; none without GPUs.

    "ranks   2 x 4, one for each GPU of a node (launcher.gpus_per_node=4)": 2 nodes with 4 ranks each.
    """
    gpu_request = slurm.gpus_per_node_request  # how many GPUs of a node, and the setting that says so
    if gpu_request is None:
        return []
    ranks_text = f"ranks   {slurm.nodes} x {slurm.per_node}"
    if slurm.processes is None:
        return [f"{ranks_text}, one for each GPU of a node ({gpu_request.setting})"]
    num_idle_gpus = gpu_request.count - slurm.processes
    lines = [f"{ranks_text} (launcher.processes={slurm.processes})"]
    if num_idle_gpus > 0:
        lines.append(
            f"note    {num_idle_gpus} of {gpu_request.count} GPUs stay idle on each node: {gpu_request.setting}, but "
            f"launcher.processes={slurm.processes}; leave launcher.processes out to train on all"
        )
    return lines


def _never_starting_problems(slurm: SlurmConfig, candidate_partitions: list[Partition]) -> list[str]:
    """Why SLURM could never start the job in these partitions: it requests more than any of their nodes have.

    `candidate_partitions`: groups of like nodes of the partitions in which the job may run.
    Time, GPUs, CPUs, memory and the number of nodes are compared. Empty if the job can start.
    """
    names = "/".join(dict.fromkeys(partition.name for partition in candidate_partitions))
    # Each resource by itself: what the job requests against the most that any of the partitions has.
    problems = []
    longest_s = max(partition.limit_s for partition in candidate_partitions)
    if parse_slurm_time(slurm.time) > longest_s:
        problems.append(
            f"launcher.time={slurm.time}: partition {names} gives {format_slurm_time(longest_s)} at most: it would never start"
        )
    request = slurm.gpus_per_node_request
    gpus = 0 if request is None else request.count
    most_gpus = max(partition.gpus for partition in candidate_partitions)
    if request is not None and gpus > most_gpus:
        problems.append(
            f"{request.setting}: the nodes of partition {names} have {most_gpus or 'none'}: it would never start"
        )
    cpus = slurm.cpus_per_task or 0
    most_cpus = max(partition.cpus for partition in candidate_partitions)
    if cpus > most_cpus:
        problems.append(
            f"launcher.cpus_per_task={cpus}: the nodes of partition {names} have {most_cpus or 'none'}: "
            "it would never start"
        )
    memory_mib = memory_mib_of_setting(slurm.mem)
    most_mib = max(partition.memory_mb for partition in candidate_partitions)
    if memory_mib > most_mib:
        problems.append(
            f"launcher.mem={slurm.mem}: the nodes of partition {names} have {most_mib}M at most: it would never start"
        )

    # All resources together: nodes that have as many GPUs, and CPUs, and as much memory as the job requests.
    fitting_nodes = 0
    for partition in candidate_partitions:
        has_all = partition.gpus >= gpus and partition.cpus >= cpus and partition.memory_mb >= memory_mib
        if has_all:
            fitting_nodes += partition.nodes
    if slurm.nodes > fitting_nodes and not problems:
        problems.append(
            f"launcher.nodes={slurm.nodes}: partition {names} has {fitting_nodes} such nodes: it would never start"
        )
    return problems


def memory_mib_of_setting(memory: str | None) -> float:
    """`launcher.mem` (memory of a node, as SLURM writes it) in MiB: `64G` -> 65536.0, `512` -> 512.0 (MiB without a unit).

    0.0, so that nothing is compared, if no memory is requested, if its form is not known here, or for 0, by which SLURM gives all
    memory of the node.
    """
    size = MEMORY_REGEX.fullmatch((memory or "").strip())
    if size is None:
        return 0.0
    unit = size["unit"].upper() or "M"
    kibibytes = float(size["number"]) * 1024.0 ** "KMGT".index(unit)
    return kibibytes / 1024


def time_limit_lines(slurm: SlurmConfig, candidate_partitions: list[Partition]) -> list[str]:
    """Notes for the user on what happens at the job's time limit, on a partition that is down, and on a long `signal_lead_s`.

    The first is always there: "time    1-0:00:00 a start, 120 s before its end it saves and is requeued".
    `candidate_partitions`: groups of nodes of the partitions in which the job may run; the first one's name stands for all in the
        text.
    """
    limit_s = parse_slurm_time(slurm.time)
    consequence = "is requeued"
    if "no-requeue" in parse_sbatch_options(slurm.extra):
        consequence = f"ends with {exit_codes.PREEMPTED}, not requeued (launcher.extra: --no-requeue)"
    line = f"time    {format_slurm_time(limit_s)} a start, {slurm.signal_lead_s} s before its end it saves and {consequence}"
    if not slurm.signal_lead_s:
        line = f"time    {format_slurm_time(limit_s)} a start; nothing tells it to save before its end (launcher.signal_lead_s=0)"
    if candidate_partitions:
        longest_s = max(partition.limit_s for partition in candidate_partitions)
        line += f"; partition {candidate_partitions[0].name} gives {format_slurm_time(longest_s)} at most"
    lines = [line]
    if candidate_partitions and not any(partition.is_up for partition in candidate_partitions):
        lines.append(
            f"note    partition {candidate_partitions[0].name} is not up: no job starts there until it is; or set "
            "launcher.partition"
        )
    if slurm.signal_lead_s * 2 > limit_s:
        lines.append(
            f"note    launcher.signal_lead_s={slurm.signal_lead_s} is most of launcher.time={slurm.time}; SLURM may send "
            "its signal a minute early"
        )
    return lines


def _measured_step_s(run_dirs: list[Path]) -> float | None:
    """How long a training step takes, as an earlier start of the run measured it: the median of its last steps, in seconds.

    None if no step was measured, or if several runs are submitted together, whose steps may differ.
    """
    from launch.runs import metrics_tail

    if len(run_dirs) > 1:
        return None
    # Only rows of training steps have `loss`.
    rows = [row for row in metrics_tail.read_last_rows(run_dirs[0] / "metrics.jsonl") if "loss" in row]
    return metrics_tail.recent_median(rows, "step_s")


def _restart_lines(slurm: SlurmConfig, run_dirs: list[Path]) -> list[str]:
    """A note for the user on how many restarts the rest of a run takes, and whether `launcher.retry` allows as many.

    Steps left x seconds a step / seconds of a start. If one of these is not known, the line says so. Empty if several runs are
    submitted together.
    """
    from launch.runs import metrics_tail
    from trainer.reporting.run_record import readable_run_record

    if len(run_dirs) > 1:
        return []
    step_rows = [row for row in metrics_tail.read_last_rows(run_dirs[0] / "metrics.jsonl") if "loss" in row]
    total_steps = readable_run_record(run_dirs[0]).total_steps
    step_s = metrics_tail.recent_median(step_rows, "step_s")
    if not step_rows or not total_steps or step_s is None:
        return ["starts  not known: no step of this run was measured yet (shardtune plan estimates one)"]
    remaining_steps = max(0, total_steps - int(step_rows[-1]["step"]))
    remaining_s = remaining_steps * step_s
    # A start of the job trains until SLURM's signal tells it to save.
    seconds_per_start = max(1.0, parse_slurm_time(slurm.time) - slurm.signal_lead_s)
    num_restarts = max(0, math.ceil(remaining_s / seconds_per_start) - 1)
    plural = "" if num_restarts == 1 else "s"
    # SLURM's requeue after a save is what `launcher.retry` calls "preempted".
    time_left = format_slurm_time(remaining_s)
    line = (
        f"starts  {time_left} of steps are left at {step_s:.3g} s a step: {num_restarts} restart{plural} at the limit"
    )
    max_restarts = slurm.retry.get("preempted", 0)
    if num_restarts > max_restarts:
        line += f", but launcher.retry allows {max_restarts}"
    return [line]


def gpu_kinds_of_job(slurm: SlurmConfig, candidate_partitions: list[Partition]) -> set[str]:
    """The kinds of GPU that a job may get, by the cluster's own names, for its speed and price: {"a100", "h100"}.

    `candidate_partitions`: those in which the job may run.
    Empty if the job requests no GPUs, or if neither its settings nor sinfo name a kind.
    """
    request = slurm.gpus_per_node_request
    if request is None:
        return set()
    if request.kind:
        return {request.kind}
    # Any card of the partitions may be given.
    return {kind for partition in candidate_partitions for kind in partition.gpu_kinds}


def _price_lines(slurm: SlurmConfig, candidate_partitions: list[Partition], num_runs: int) -> list[str]:
    """A note for the user on the most that one start costs, in GPU hours and US dollars; empty for a job without GPUs.

    `num_runs`: runs submitted together, which are the tasks of one job array; each starts once.
    `candidate_partitions`: partitions in which the job may run.
    The price of a GPU hour is known only if all kinds of GPU that the job may get cost the same.
    """
    gpu_request = slurm.gpus_per_node_request
    if gpu_request is None:
        return []
    gpu_kinds = gpu_kinds_of_job(slurm, candidate_partitions)
    gpu_hour_prices: set[float | None] = {gpu_hour_price_of_kind(kind) for kind in gpu_kinds}
    gpu_hour_price = gpu_hour_prices.pop() if len(gpu_hour_prices) == 1 else None
    gpu_hours = gpu_request.count * slurm.nodes * num_runs * parse_slurm_time(slurm.time) / 3600
    if gpu_hour_price is None:
        cards = ", ".join(sorted(gpu_kinds)) or "these cards"
        return [f"price   {gpu_hours:,.0f} GPU hours at most a start; what one costs is not known of {cards}"]
    return [
        f"price   ${gpu_hours * gpu_hour_price:,.0f} at most a start: {gpu_hours:,.0f} GPU hours of ${gpu_hour_price:.2f} "
        "(conf/hardware)"
    ]
