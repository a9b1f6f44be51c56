"""One job of a pipeline: `python -m launch.job part`, called by its job script. Needs no torch itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

from launch.cluster import containers
from launch.runs.pipeline_jobs import PART_RESULTS_DIRECTORY, PIPELINE_FILE
from trainer.reporting.code_revision import CODE_DIRECTORY
from trainer.reporting.settings_file import read_settings_tree
from trainer.reporting.status import write_text_atomic


def pipeline_command(part: str, run_dir: Path, processes: int) -> list[str]:
    """The arguments of `shardtune` that do one part of a run submitted as a chain of jobs: prepare, evaluate or export.

    "export", runs/first, 2 -> ["export", "runs/first", "launcher.processes=2"].
    `processes`: ranks of an evaluation, or processes that write an export.
    """
    if part == "prepare":
        return ["prepare", str(run_dir / "config.yaml")]
    if part == "evaluate":
        return ["evaluate", str(run_dir), "launcher=local", f"launcher.processes={processes}"]
    return ["export", str(run_dir), f"launcher.processes={processes}"]


def run_part(part: str, run_dir: Path, processes: int) -> int:
    """Run one part of a run's chain of jobs (prepare, evaluate or export) within its job, and record how it ended.

    `processes`: ranks of an evaluation, or processes that write an export.
    Returns the exit code of the part. Raises ConfigError if the run's container cannot be started here, StorageError if the end
    cannot be recorded.
    """
    command = [*_interpreter_command(run_dir), "-m", "launch.main", *pipeline_command(part, run_dir, processes)]
    # With these variables the verb would take itself for a rank that srun started.
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_NTASKS", "SLURM_PROCID"))}
    print(f"job {os.environ.get('SLURM_JOB_ID')}: {part} of {run_dir}", flush=True)
    code = subprocess.run(command, env=env).returncode
    record_part_end(part, run_dir, code)
    return code


def record_part_end(part: str, run_dir: Path, code: int) -> None:
    """Record the exit code of a part in `<run>/pipeline/<part>.json`, if the run has a pipeline of jobs. Errors: StorageError."""
    if not (run_dir / PIPELINE_FILE).exists():
        return
    (run_dir / PART_RESULTS_DIRECTORY).mkdir(exist_ok=True)
    record = {"job": os.environ.get("SLURM_JOB_ID"), "code": code}
    write_text_atomic(run_dir / PART_RESULTS_DIRECTORY / f"{part}.json", json.dumps(record) + "\n")


def _interpreter_command(run_dir: Path) -> list[str]:
    """The command that starts Python for a part of a run: this interpreter, or srun with the run's container.

    In the container, srun first runs the shell function `setup`, whose text the job script has put into SHARDTUNE_SETUP. Raises
    ConfigError if the container cannot be started here.
    """
    settings = read_settings_tree(run_dir / "config.yaml")
    launcher = settings["launcher"]
    if containers.container_runtime(launcher) is None:
        return [sys.executable]
    containers.refuse_unavailable_container(launcher)
    container = containers.container_command(settings, [CODE_DIRECTORY, run_dir])
    srun = [
        "srun",
        f"--export=ALL,{containers.INSIDE_CONTAINER}=1",
        "--ntasks=1",
        "--cpu-bind=none",
        *container.srun_options,
    ]
    # The last "setup" is $0 of the script: its arguments begin after it.
    shell = ["bash", "-c", 'set -e; eval "$SHARDTUNE_SETUP"; setup; exec "$@"', "setup"]
    return [*srun, *container.prefix, *shell, launcher.get("python") or "python3"]
