"""Processes of tests: their environment, their ports, their end, and the command in this one."""

import contextlib
import os
import random
import socket
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
PORTS, SHARES = range(10_000, 20_000), 8
"""Linux gives out those from 32768 on, and jobs of SLURM and over ssh take theirs from 20000 on."""


def clean_environment(**extra: str) -> dict[str, str]:
    """The environment without traces of a job around us."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("SLURM_", "TORCHELASTIC", "SHARDTUNE_"))
        and key not in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    }
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **extra}


def free_port() -> int:
    """A port for ranks to meet at, that nobody else is given before they do.

    It is below those that the system gives out by itself, and one of this worker's own: others look while nobody listens yet.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = PORTS[0] + random.SystemRandom().randrange(len(PORTS) // SHARES) * SHARES + worker % SHARES
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


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
