"""Processes of tests: their environment, their end, and the command in this one."""

import os
from pathlib import Path

import psutil

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
