"""A run as a chain of jobs: prepare, train, evaluate, export. Each starts after the one before has succeeded.

This module owns the scripts of the jobs beside training, the resources of each, and the submission of the chain. If a
job fails, SLURM cancels those that depend on it. `<run>/pipeline.json` lists the jobs, `<run>/pipeline/<part>.json`
says how each ended.
"""

import json
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from launch.cluster.export_part import export_resources
from launch.output import TableColumn, TableRow
from launch.output import format_table as draw_table
from launch.runs.pipeline_jobs import PIPELINE_FILE
from strategies.errors import ConfigError, StorageError
from trainer.config.run import RunConfig, SlurmConfig
from trainer.config.sbatch_options import GPU_OPTIONS, MEMORY_OPTIONS, drop_options, parse_sbatch_options
from trainer.reporting.status import write_text_atomic

PIPELINE_COLUMNS = (
    TableColumn("job"),
    TableColumn("part"),
    TableColumn("nodes", is_number=True),
    TableColumn("gpus", is_number=True),
    TableColumn("partition"),
    TableColumn("starts"),
)
PARTS_WITHOUT_GPUS = ("prepare", "export")
"""Parts that compute nothing on a GPU."""
PART_SCRIPT_BODY = r"""
set -e
export PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 # a trainer.py where the job was submitted hides nothing
SHARDTUNE_SETUP=$(declare -f setup)
export SHARDTUNE_SETUP
setup
exec "$python" -m launch.job part "$part" "$run" "$processes"
"""


class PartJob(NamedTuple):
    """A job of a chain that SLURM has taken."""

    part: str
    """prepare, train, evaluate or export."""
    job_id: str


def part_settings(config: RunConfig, part: str, run_dir: Path) -> SlurmConfig:
    """The launcher settings for one job of a run that is submitted as a chain of jobs: what that job asks of SLURM.

    `part`: prepare, train, evaluate or export.

    - train: the run's own settings;
    - evaluate: one node with the run's GPUs;
    - prepare: one node without GPUs, in `launcher.cpu_partition` if that is set;
    - export: as prepare, with the cores and the memory of its own processes.

    Each adds the options of sbatch that `launcher.part_options` has for it.
    """
    run_settings = config.launcher
    assert isinstance(run_settings, SlurmConfig)
    part_options = run_settings.part_options.get(part, [])
    with_part_options = replace(run_settings, extra=[*run_settings.extra, *part_options])
    if part == "train":
        return with_part_options
    settings = replace(
        with_part_options,
        nodes=1,
        job_name=f"{run_settings.job_name or run_dir.name}-{part}",
        signal_lead_s=0,  # these parts have nothing to save before the time limit
        array_limit=None,
    )
    if part not in PARTS_WITHOUT_GPUS:
        return settings
    settings = replace(
        settings,
        gpus_per_node=0,
        gres=None,
        extra=[*drop_options(run_settings.extra, GPU_OPTIONS), *part_options],
        exclusive=False,  # a few cores do not need a node of their own
    )
    if part == "export":
        settings = _with_export_resources(settings, config, run_settings.extra, part_options)
    if run_settings.cpu_partition:  # the constraint names nodes of the other partition
        return replace(settings, partition=run_settings.cpu_partition, constraint=None)
    return settings


def _with_export_resources(
    export_settings: SlurmConfig, config: RunConfig, run_options: list[str], part_options: list[str]
) -> SlurmConfig:
    """The settings of the job that writes a run's export, with the cores and memory that it takes; one process if not known.

    `export_settings`: as far as they are decided.
    `run_options`: the user's options of sbatch for all jobs of the run (`launcher.extra`), whose memory is that of the nodes that
        train.
    `part_options`: those for this part. sbatch takes one option of memory: that in `part_options`, else the computed one.
    """
    resources = export_resources(config)
    if resources is None:
        return replace(export_settings, processes=1)
    has_own_memory = bool(MEMORY_OPTIONS & parse_sbatch_options(part_options).keys())
    return replace(
        export_settings,
        processes=resources.processes,
        cpus_per_task=resources.processes,
        mem=None if has_own_memory else f"{resources.memory_gib}G",
        extra=[*drop_options(run_options, GPU_OPTIONS | MEMORY_OPTIONS), *part_options],
    )


def part_script_text(
    config: RunConfig, part: str, run_dir: Path, make_script_head: Callable[[RunConfig, list[Path]], list[str]]
) -> str:
    """The job script of a part of a run's chain of jobs, other than training: prepare, evaluate or export.

    `make_script_head`: takes (the configuration of the part, run directories) and returns the lines of a script up to its shell
        function `setup`.
    """
    launcher = part_settings(config, part, run_dir)
    part_config = replace(config, launcher=launcher)
    num_processes = 1 if part == "prepare" else launcher.per_node  # preparation starts its own workers
    lines = [*make_script_head(part_config, [run_dir]), f"run=${{runs[0]}} part={part} processes={num_processes}"]
    return "\n".join(lines) + PART_SCRIPT_BODY


def submit_pipeline(
    script_by_part: dict[str, Path], run_dir: Path, sbatch: Callable[[Path, list[str]], str]
) -> list[PartJob]:
    """Submit a run's chain of jobs, each to start after the one before has succeeded; returns the jobs in order.

    `script_by_part`: {"prepare": path, "train": path, ...}. `sbatch`: submits a script with options and returns the job id.

    The jobs are recorded in `<run>/pipeline.json`. Raises ConfigError if SLURM refuses a part: then the jobs before it are
    cancelled. Raises StorageError if the record cannot be written; the jobs stay submitted.
    """
    jobs: list[PartJob] = []
    for part, script in script_by_part.items():
        dependency_options = []
        if jobs:
            dependency_options = [f"--dependency=afterok:{jobs[-1].job_id}", "--kill-on-invalid-dep=yes"]
        try:
            jobs.append(PartJob(part, sbatch(script, dependency_options)))
        except ConfigError as error:
            if jobs:
                subprocess.run(["scancel", *(job.job_id for job in jobs)], capture_output=True)
            raise ConfigError([f"{part}: {problem}; nothing was submitted" for problem in error.problems]) from error
    _write_pipeline_record(jobs, run_dir)
    return jobs


def _write_pipeline_record(jobs: list[PartJob], run_dir: Path) -> None:
    """Record a run's chain of jobs in `<run>/pipeline.json`, for `shardtune status`: [{"part": "prepare", "job": "1234"}, ...].

    A single job is no chain: then the record of an earlier submission is removed. Raises StorageError if it cannot be written.
    """
    record_file = run_dir / PIPELINE_FILE
    try:
        if len(jobs) == 1:
            record_file.unlink(missing_ok=True)
            return
        rows = [{"part": job.part, "job": job.job_id} for job in jobs]
        write_text_atomic(record_file, json.dumps(rows) + "\n")
    except OSError as error:
        raise StorageError(f"{record_file}: cannot be written ({error.strerror or error})") from error


def pipeline_table(jobs: list[PartJob], config: RunConfig, run_dir: Path) -> str:
    """Draw the table of a run's chain of jobs after their submission: nodes, GPUs, partition, and when each starts."""
    slurm = config.launcher
    assert isinstance(slurm, SlurmConfig)
    rows = []
    for index, (part, job_id) in enumerate(jobs):
        settings = part_settings(config, part, run_dir)
        gpu_request = settings.gpus_per_node_request
        num_gpus = 0 if gpu_request is None else gpu_request.count * settings.nodes
        if index > 0:
            start_condition = f"when {jobs[index - 1].part} has ended well"
        elif slurm.after:
            start_condition = f"when job {slurm.after} has ended well"
        else:
            start_condition = "when SLURM has the nodes"
        partition = settings.partition or "default"
        rows.append(TableRow((job_id, part, str(settings.nodes), str(num_gpus or "-"), partition, start_condition)))
    lines = draw_table(PIPELINE_COLUMNS, rows)
    return "\n".join([*lines, f"a part that fails ends the rest; shardtune status {shlex.quote(str(run_dir))}"])


def train_job_config(config: RunConfig, run_dir: Path) -> RunConfig:
    """The configuration for the job of a pipeline that trains: with the options of `launcher.part_options` for training."""
    return replace(config, launcher=part_settings(config, "train", run_dir))
