"""Run directories as runs leave them, without a run."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from tests.helpers.launching import ROOT
from trainer.session.lease_owner import LeaseOwner, process_identity

SQUEUE = """#!/bin/sh
[ -z "$STANDIN_WAITS" ] || sleep "$STANDIN_WAITS"
cat "$(dirname "$0")/queue"
exit "${STANDIN_CODE:-0}"
"""


def made(root: Path, name: str, *, state: str | None = "running", steps: int = 3, **status) -> Path:
    """A run of so many steps; `state=None` has no status. What is not given is as a run has it."""
    run = root / name
    (run / "lease").mkdir(parents=True)
    (run / "config.yaml").write_text("# Frozen by shardtune; do not edit.\n# sha256: 0\ncheckpoint:\n  keep: 2\n")
    (run / "run.json").write_text(json.dumps({"total_steps": 10, "slurm_job_id": None}))
    if state is not None:
        about = {
            "state": state,
            "reason": None,
            "step": steps,
            "restart": 0,
            "host": "n1",
            "pid": 7,
            "time": time.time(),
        }
        (run / "status.json").write_text(json.dumps({**about, **status}))
    rows = [
        {"step": step, "loss": 5.0 - step, "tokens_per_s": 1000.0, "step_s": 2.0, "memory_gib": 1.5}
        for step in range(1, steps + 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def owned(run: Path, number: int = 1, *, heartbeat_age_s: float = 0, **about) -> LeaseOwner:
    """Claim the directory as another host's attempt does, which was last heard of so long ago."""
    owner = LeaseOwner(**{"host": "n1", "pid": 7, "process": "boot/namespace/1", **about})
    (run / "lease" / f"{number:06d}.json").write_text(json.dumps(asdict(owner)))
    beat = run / "lease" / f"{number:06d}.beat"
    beat.write_text("3")
    os.utime(beat, (time.time() - heartbeat_age_s,) * 2)
    return owner


def here(pid: int) -> dict:
    """What the claim of a process of this host says."""
    return {"host": socket.gethostname(), "pid": pid, "process": process_identity(pid)}


def stand_in_for_squeue(directory: Path, rows: list[list[str]]) -> str:
    """A `squeue` that answers these rows; returns the PATH on which it is found first."""
    directory.mkdir(exist_ok=True)
    (directory / "squeue").write_text(SQUEUE)
    (directory / "squeue").chmod(0o755)
    (directory / "queue").write_text("".join("\x1f".join(row) + "\n" for row in rows))
    return f"{directory}:/usr/bin:/bin"


def without_torch(*words: str, before: str = "", **environment: str) -> subprocess.CompletedProcess:
    """The command in a process of its own that cannot import what is heavy; `before` is run first."""
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in {"torch", "numpy", "hydra", "omegaconf", "transformers"}:
            raise AssertionError(f"imports {name}")
sys.meta_path.insert(0, Refuse())
%s
from launch.main import main
code = main(sys.argv[1:])
sys.stdout.flush()
sys.exit(code)
"""
    env = {key: value for key, value in os.environ.items() if key != "COLUMNS"} | environment
    command = [sys.executable, "-c", code % before, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
