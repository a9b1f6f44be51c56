"""A run as a chain of jobs: prepare, train, evaluate, export. Each starts after the one before has succeeded.

This module owns the scripts of the jobs beside training, the resources of each, and the submission of the chain. If a
job fails, SLURM cancels those that depend on it. `<run>/pipeline.json` lists the jobs, `<run>/pipeline/<part>.json`
says how each ended.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from launch.output import Column, TableRow
from launch.output import table as draw_table
from launch.runs.pipeline_jobs import RECORD
from strategies.errors import ConfigError, StorageError
from trainer.config.run import RunConfig, SlurmConfig
from trainer.config.sbatch_options import without_gpus
from trainer.reporting.status import write_text_atomic

COLUMNS = (
    Column("job"),
    Column("part"),
    Column("nodes", is_number=True),
    Column("gpus", is_number=True),
    Column("partition"),
    Column("starts"),
)
WITHOUT_GPUS = ("prepare", "export")
"""Parts that compute nothing on a GPU."""
PART = r"""
set -e
export PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 # a trainer.py where the job was submitted hides nothing
SHARDTUNE_SETUP=$(declare -f setup)
export SHARDTUNE_SETUP
setup
exec "$python" -m launch.job part "$part" "$run" "$processes"
"""


def part_of(slurm: SlurmConfig, part: str, run_dir: Path) -> SlurmConfig:
    """What is asked of SLURM for one part: one node, and GPUs only where there is something to compute on them."""
    name = slurm.job_name or run_dir.name
    extra = [*slurm.extra, *slurm.part_options.get(part, [])]
    if part == "train":
        return replace(slurm, extra=extra)
    one = replace(slurm, nodes=1, job_name=f"{name}-{part}", extra=extra, signal_lead_s=0, array_limit=None)
    if part in WITHOUT_GPUS:
        partition = slurm.cpu_partition or slurm.partition
        constraint = None if slurm.cpu_partition else slurm.constraint
        own_extra = [*without_gpus(slurm.extra), *slurm.part_options.get(part, [])]
        one = replace(one, gpus_per_node=0, gres=None, extra=own_extra, exclusive=False)
        one = replace(one, partition=partition, constraint=constraint)
    return one


def script_of(config: RunConfig, part: str, run_dir: Path, head: Callable[[RunConfig, list[Path]], list[str]]) -> str:
    """The script of a part other than training. `head` is the header of a job script, up to its set-up."""
    assert isinstance(config.launcher, SlurmConfig)
    launcher = part_of(config.launcher, part, run_dir)
    own = replace(config, launcher=launcher)
    ranks = launcher.per_node if part == "evaluate" else 1
    lines = [*head(own, [run_dir]), f"run=${{runs[0]}} part={part} processes={ranks}"]
    return "\n".join(lines) + PART


def submit_chain(
    scripts: dict[str, Path], run_dir: Path, sbatch: Callable[[Path, list[str]], str]
) -> list[tuple[str, str]]:
    """Submit the parts, each after the one before; (part, job) of all. Where one is refused, those before it are cancelled."""
    jobs: list[tuple[str, str]] = []
    for part, script in scripts.items():
        after = [f"--dependency=afterok:{jobs[-1][1]}", "--kill-on-invalid-dep=yes"] if jobs else []
        try:
            jobs.append((part, sbatch(script, after)))
        except ConfigError as error:
            if jobs:
                subprocess.run(["scancel", *(job for _, job in jobs)], capture_output=True)
            raise ConfigError([f"{part}: {problem}; nothing was submitted" for problem in error.problems]) from error
    try:
        if len(jobs) == 1:  # no chain, and no longer one
            (run_dir / RECORD).unlink(missing_ok=True)
            return jobs
        write_text_atomic(run_dir / RECORD, json.dumps([{"part": part, "job": job} for part, job in jobs]) + "\n")
    except OSError as error:
        raise StorageError(f"{run_dir / RECORD}: cannot be written ({error.strerror or error})") from error
    return jobs


def table(jobs: list[tuple[str, str]], config: RunConfig, run_dir: Path) -> str:
    """The chain, for people."""
    slurm = config.launcher
    assert isinstance(slurm, SlurmConfig)
    rows = []
    for number, (part, job) in enumerate(jobs):
        asked = part_of(slurm, part, run_dir)
        request = asked.gpu_request
        gpus = request.count * asked.nodes if request is not None else 0
        starts = f"when {jobs[number - 1][0]} has ended well" if number else "when SLURM has the nodes"
        if not number and slurm.after:
            starts = f"when job {slurm.after} has ended well"
        rows.append(TableRow((job, part, str(asked.nodes), str(gpus or "-"), asked.partition or "default", starts)))
    lines = draw_table(COLUMNS, rows)
    return "\n".join([*lines, f"a part that fails ends the rest; shardtune status {shlex.quote(str(run_dir))}"])


def train_of(config: RunConfig, run_dir: Path) -> RunConfig:
    """The configuration of the part that trains: with options of its own."""
    assert isinstance(config.launcher, SlurmConfig)
    return replace(config, launcher=part_of(config.launcher, "train", run_dir))
