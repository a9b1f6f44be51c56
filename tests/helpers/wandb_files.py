"""What W&B's own tools say of the files of an offline run."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def inspected(part: Path, *flags: str) -> str:
    """What `wandb leet inspect --json` prints of a run's directory."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *flags, str(part)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def record(part: Path, kind: str) -> dict[str, Any]:
    """The last record of a kind, such as `run`, `exit` or `alert`; empty where there is none."""
    found = [json.loads(line) for line in inspected(part).splitlines()]
    return next((each[kind] for each in reversed(found) if each["type"] == kind), {})


def summary(part: Path) -> dict[str, Any]:
    """State, exit code, name, tags, config and summary."""
    shown: dict[str, Any] = json.loads(inspected(part, "--summary"))
    return shown
