"""Starts a test job on several gloo ranks and returns what its rank 0 reported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil

from tests.helpers.speed import seconds

ROOT = Path(__file__).resolve().parents[2]


def clean_environment(**extra: str) -> dict[str, str]:
    """The environment without traces of a job around us."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("SLURM_", "TORCHELASTIC", "SHARDTUNE_"))
        and key not in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    }
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **extra}


def ended(pid: int) -> bool:
    """Whether a process is over. One whose parent is gone may stay as a zombie: not every machine has an init that reaps."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def command_here(words: list[str]) -> int:
    """What `shardtune <words>` returns, called in this process, from whose environment what it sets is taken again."""
    from launch.main import main

    before = dict(os.environ)
    try:
        return main(words)
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_job(module: str, world: int, directory: Path, *arguments: str, timeout_s: float = 300) -> dict:
    """Run `python -m module directory *arguments` on `world` ranks; the job writes `directory/report.json`.

    `timeout_s` is scaled to the machine.
    """
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command += ["-m", module, str(directory), *arguments]
    done = subprocess.run(
        command, env=clean_environment(), cwd=ROOT, capture_output=True, text=True, timeout=seconds(timeout_s)
    )
    report = directory / "report.json"
    assert done.returncode == 0 and report.exists(), (done.stdout + done.stderr)[-6000:]
    return json.loads(report.read_text())
