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

from launch.cluster.export_part import export_resources
from launch.output import Column, TableRow
from launch.output import table as draw_table
from launch.runs.pipeline_jobs import PIPELINE_FILE
from strategies.errors import ConfigError, StorageError
from trainer.config.run import RunConfig, SlurmConfig
from trainer.config.sbatch_options import MEMORY_OPTIONS, options_of, without_gpus, without_memory
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
PART_BODY = r"""
set -e
export PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 # a trainer.py where the job was submitted hides nothing
SHARDTUNE_SETUP=$(declare -f setup)
export SHARDTUNE_SETUP
setup
exec "$python" -m launch.job part "$part" "$run" "$processes"
"""


def part_settings(config: RunConfig, part: str, run_dir: Path) -> SlurmConfig:
    """The launcher settings of one job of the chain. `part`: prepare, train, evaluate or export.

    - train: the run's own settings;
    - a part that computes on GPUs: one node with the run's GPUs;
    - a part in `WITHOUT_GPUS`: one node without GPUs, in `launcher.cpu_partition` if that is set;
    - export: as that, with the cores and the memory of its own processes.
    Each adds its options of `launcher.part_options`.
    """
    slurm = config.launcher
    assert isinstance(slurm, SlurmConfig)
    part_options = slurm.part_options.get(part, [])
    if part == "train":
        return replace(slurm, extra=[*slurm.extra, *part_options])
    settings = replace(
        slurm,
        nodes=1,
        job_name=f"{slurm.job_name or run_dir.name}-{part}",
        extra=[*slurm.extra, *part_options],
        signal_lead_s=0,
        array_limit=None,
    )
    if part not in WITHOUT_GPUS:
        return settings
    settings = replace(
        settings,
        gpus_per_node=0,
        gres=None,
        extra=[*without_gpus(slurm.extra), *part_options],
        exclusive=False,
    )
    if part == "export":
        # The settings of the run are those of the nodes that train.
        resources = export_resources(config)
        if resources is None:
            settings = replace(settings, processes=1)
        else:
            # sbatch takes one option of memory: the user's for this part, or ours in place of that for training.
            has_own_memory = bool(MEMORY_OPTIONS & options_of(part_options).keys())
            settings = replace(
                settings,
                processes=resources.processes,
                cpus_per_task=resources.processes,
                mem=None if has_own_memory else f"{resources.memory_gib}G",
                extra=[*without_memory(without_gpus(slurm.extra)), *part_options],
            )
    if slurm.cpu_partition:  # the constraint names nodes of the other partition
        return replace(settings, partition=slurm.cpu_partition, constraint=None)
    return settings


def part_script(config: RunConfig, part: str, run_dir: Path, head: Callable[[RunConfig, list[Path]], list[str]]) -> str:
    """The job script of a part other than training. `head` makes the beginning of a script, up to its function `setup`."""
    launcher = part_settings(config, part, run_dir)
    part_config = replace(config, launcher=launcher)
    ranks = 1 if part == "prepare" else launcher.per_node
    lines = [*head(part_config, [run_dir]), f"run=${{runs[0]}} part={part} processes={ranks}"]
    return "\n".join(lines) + PART_BODY


def submit_chain(
    scripts: dict[str, Path], run_dir: Path, sbatch: Callable[[Path, list[str]], str]
) -> list[tuple[str, str]]:
    """Submit the script of each part, to start after the one before has succeeded; returns (part, job id) of all.

    `sbatch`: submits a script with options and returns the job id. If SLURM refuses one part, those before it are cancelled.
    Errors: ConfigError, StorageError.
    """
    jobs: list[tuple[str, str]] = []  # (part, job id)
    for part, script in scripts.items():
        dependency = []
        if jobs:
            _, previous_job = jobs[-1]
            dependency = [f"--dependency=afterok:{previous_job}", "--kill-on-invalid-dep=yes"]
        try:
            jobs.append((part, sbatch(script, dependency)))
        except ConfigError as error:
            if jobs:
                subprocess.run(["scancel", *(job for _, job in jobs)], capture_output=True)
            raise ConfigError([f"{part}: {problem}; nothing was submitted" for problem in error.problems]) from error
    # Record the chain, as [{"part": "prepare", "job": "1234"}, ...].
    record_file = run_dir / PIPELINE_FILE
    try:
        if len(jobs) == 1:  # no chain: a record that is there is of an earlier submission
            record_file.unlink(missing_ok=True)
            return jobs
        rows = [{"part": part, "job": job} for part, job in jobs]
        write_text_atomic(record_file, json.dumps(rows) + "\n")
    except OSError as error:
        raise StorageError(f"{record_file}: cannot be written ({error.strerror or error})") from error
    return jobs


def chain_table(jobs: list[tuple[str, str]], config: RunConfig, run_dir: Path) -> str:
    """A table for people of the chain's jobs, given as (part, job id), with what each asks for and when it starts."""
    slurm = config.launcher
    assert isinstance(slurm, SlurmConfig)
    rows = []
    starts = f"when job {slurm.after} has ended well" if slurm.after else "when SLURM has the nodes"
    for part, job in jobs:
        settings = part_settings(config, part, run_dir)
        request = settings.gpu_request
        gpus = request.count * settings.nodes if request is not None else 0
        cells = (job, part, str(settings.nodes), str(gpus or "-"), settings.partition or "default", starts)
        rows.append(TableRow(cells))
        starts = f"when {part} has ended well"  # the next one
    lines = draw_table(COLUMNS, rows)
    return "\n".join([*lines, f"a part that fails ends the rest; shardtune status {shlex.quote(str(run_dir))}"])


def train_config(config: RunConfig, run_dir: Path) -> RunConfig:
    """The configuration for the job that trains in a chain: with the options of `launcher.part_options` for training."""
    return replace(config, launcher=part_settings(config, "train", run_dir))
