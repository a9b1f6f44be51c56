"""What W&B's own tools say of the files of an offline run."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any


def inspected(part: Path, *flags: str) -> str:
    """What `wandb leet inspect --json` prints of a run's directory.

    Asks the program that the command starts: the command itself imports wandb, which takes 15 times as long.
    """
    from wandb.util import get_core_path

    run_files = list(part.absolute().glob("run-*.wandb"))
    assert len(run_files) == 1, f"{part} holds {sorted(path.name for path in part.iterdir())}"
    run_file = run_files[0]
    command = [get_core_path(), "leet", "inspect", "--json", "--no-observability", *flags]
    command += ["--run-file", str(run_file), str(run_file.parent.parent)]
    # A run that this process tracked has left the address of its W&B service.
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    completed = subprocess.run(command, capture_output=True, text=True, env=environment)
    if completed.returncode:
        # Three times in some thousand calls, each on a busy machine, the command ended with 1, and nobody knows why.
        first_error = completed.stderr
        time.sleep(1)
        completed = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert completed.returncode == 0, (
            f"{command} ended with {completed.returncode}: {first_error}, then {completed.stderr}\n{completed.stdout}"
        )
        print(f"W&B's tool could read {run_file} at the second try only: {first_error}")
    return completed.stdout


def record(part: Path, kind: str) -> dict[str, Any]:
    """The last record of a kind, such as `run`, `exit` or `alert`; empty where there is none."""
    found = [json.loads(line) for line in inspected(part).splitlines()]
    return next((each[kind] for each in reversed(found) if each["type"] == kind), {})


def summary(part: Path) -> dict[str, Any]:
    """State, exit code, name, tags, config and summary."""
    shown: dict[str, Any] = json.loads(inspected(part, "--summary"))
    return shown
